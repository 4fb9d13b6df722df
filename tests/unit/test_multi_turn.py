"""Conversations of several turns: tokens only grow, only the model's own are trained, plugins decide."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import PreTrainedTokenizerBase

from swift.config.option import ConfigError, build
from swift.config.runs import RlhfRun
from swift.config.template import TemplateConfig
from swift.config.turns import TurnConfig
from swift.plugins.turns import Env, MultiTurnScheduler, envs, multi_turns
from swift.rollout.multi_turn import Start, Trajectory, Turns, build_scheduler, run_turns
from swift.rollout.types import Completion, Request, Sampling
from swift.template.chat import ChatTemplate

EOS = 2  # <|im_end|>


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    known = dict(multi_turns), dict(envs)
    yield
    for registry, entries in zip((multi_turns, envs), known, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def template(tiny_tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer, TemplateConfig())


class Scripted:
    """Answers with the texts of a script, whatever it is asked; remembers what it was asked."""

    def __init__(self, template: ChatTemplate, *script: Sequence[str]) -> None:
        self.tokenizer, self.script, self.asked = template.tokenizer, list(script), list[list[Request]]()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self.asked.append(list(requests))
        texts = iter(self.script.pop(0) if requests else ())
        return [[self.answer(next(texts)) for _ in range(request.count)] for request in requests]

    def answer(self, text: str) -> Completion:
        text, cut, _ = text.partition("...")  # an answer that was too long
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + ([] if cut else [EOS])
        return Completion(ids, [-0.5 - i for i in range(len(ids))], "length" if cut else "stop", text)


def start(question: str = "What is 7 + 5?", number: int = 0, **columns: Any) -> Start:
    return Start(
        messages=[{"role": "user", "content": question}], columns=columns, request_id=f"r{number}",
        place=f"data.jsonl line {number + 1}", seed=11, number=number,
    )  # fmt: skip


def run(
    engine: Scripted, scheduler: MultiTurnScheduler, template: ChatTemplate, *starts: Start, **options: Any
) -> list[Trajectory]:
    given = {"sampling": Sampling(max_tokens=64), "context": 512, "timeout_seconds": 60} | options
    asked = {name: given.pop(name) for name in ("sampling", "collect") if name in given}
    return run_turns(engine, starts, Turns(scheduler, "mine", template, **given), **asked)


def text_of(template: ChatTemplate, trajectory: Trajectory, kind: int | None = None) -> str:
    """The tokens behind the prompt as text; of one kind only, 1 = the model's own."""
    ids = [
        token
        for token, mask in zip(trajectory.token_ids, trajectory.loss_mask, strict=True)
        if kind in (None, mask)
    ]
    return template.tokenizer.decode(ids)


class Asks(MultiTurnScheduler):
    """Asks on until an answer has a 12 in it."""

    def check_finished(self, request: Any, choice: Any, turn: int) -> bool:
        return "12" in choice.message.content or super().check_finished(request, choice, turn)

    def step(self, infer_request: Any, response_choice: Any, current_turn: int) -> dict:
        infer_request.messages.append({"role": "user", "content": f"No. Turn {current_turn}"})
        return {"infer_request": infer_request, "rollout_infos": {"asked": current_turn}}


def test_tokens_grow_and_only_the_models_own_are_trained(template: ChatTemplate) -> None:
    engine = Scripted(template, ["13", "It is 12."], ["14"], ["12"])
    first, second = run(engine, Asks(), template, start(number=0), start(number=1))
    assert text_of(template, first) == (
        "13<|im_end|>\n<|im_start|>user\nNo. Turn 1<|im_end|>\n<|im_start|>assistant\n"
        "14<|im_end|>\n<|im_start|>user\nNo. Turn 2<|im_end|>\n<|im_start|>assistant\n12<|im_end|>"
    )
    assert text_of(template, first, 1) == "13<|im_end|>14<|im_end|>12<|im_end|>"
    # the same tokens as the whole conversation has when it is written at once
    whole = template.tokenizer(template.render(first.messages).text.rstrip("\n")).input_ids
    assert first.prompt_ids + first.token_ids == whole
    own = [logp for logp, mask in zip(first.logps, first.loss_mask, strict=True) if mask]
    assert own == [logp for text in ("13", "14", "12") for logp in engine.answer(text).logps]
    assert all(logp == 0 for logp, mask in zip(first.logps, first.loss_mask, strict=True) if not mask)
    assert [message["role"] for message in first.messages] == ["user", "assistant"] * 3
    assert first.infos == {"asked": 2, "num_turns": 3} and first.finish_reason == "stop"
    assert second.infos == {"num_turns": 1} and second.messages[-1]["content"] == "It is 12."
    # what the model was asked with is what it is trained on, up to the answer
    for asked, trajectory in zip(engine.asked, (first, first, first), strict=True):
        ids = asked[0].token_ids
        assert (trajectory.prompt_ids + trajectory.token_ids)[: len(ids)] == ids


def test_first_turns_share_a_prompt_and_later_ones_draw_anew(template: ChatTemplate) -> None:
    engine = Scripted(template, ["1", "2", "3", "12"], ["4", "5", "12"], ["12", "12"])
    starts = [start(number=0), start(number=1), start(number=2), start("Who are you?", number=0)]
    found = run(engine, Asks(), template, *starts)
    assert [(r.first, r.count) for r in engine.asked[0]] == [(0, 3), (0, 1)]
    assert [(r.first, r.count) for r in engine.asked[1]] == [(0, 1), (1, 1), (2, 1)]
    seeds = [asked[0].sampling.seed for asked in engine.asked]
    assert seeds[0] == 11 and len(set(seeds)) == 3 and min(seeds) >= 0
    assert [trajectory.num_turns for trajectory in found] == [3, 3, 2, 1]


def test_limits(template: ChatTemplate) -> None:
    answers = [["1"]] * 9
    (found,) = run(Scripted(template, *answers), Asks(max_turns=2), template, start())
    assert (found.num_turns, found.finish_reason) == (2, "stop")
    (found,) = run(Scripted(template), Asks(), template, start(), context=4)
    assert (found.num_turns, found.token_ids, found.text) == (0, [], "")
    (found,) = run(Scripted(template, ["1..."]), Asks(), template, start())
    assert (found.num_turns, found.finish_reason, text_of(template, found)) == (1, "length", "1")
    engine = Scripted(template, *answers)
    prompt = len(engine.tokenizer(template.prompt(start().messages)).input_ids)
    (found,) = run(engine, Asks(), template, start(), context=prompt + 40)
    for (asked,) in engine.asked:
        assert asked.sampling.max_tokens == min(64, prompt + 40 - len(asked.token_ids)) > 0
    assert found.num_turns == len(engine.asked) < 9
    # What was told last is taken back: nothing of it is left for an answer.
    assert (found.text, found.finish_reason, found.loss_mask[-1]) == ("1", "length", 1)
    assert found.messages[-1] == {"role": "assistant", "content": "1"}
    assert prompt + len(found.token_ids) <= prompt + 40
    engine = Scripted(template, *answers)  # two tokens each
    (found,) = run(engine, Asks(), template, start(), sampling=Sampling(5), limits_all=True)
    assert [asked.sampling.max_tokens for (asked,) in engine.asked] == [5, 3, 1]
    assert (found.num_turns, found.finish_reason, sum(found.loss_mask)) == (3, "length", 6)


def test_ranks_ask_as_often_as_the_one_with_the_longest_conversation(template: ChatTemplate) -> None:
    engine, others = Scripted(template, ["12"]), iter([True, True, True, False])
    (found,) = run(engine, Asks(), template, start(), collect=lambda here: [here, next(others)])
    assert found.num_turns == 1 and [len(asked) for asked in engine.asked] == [1, 0, 0]

    class First(Asks):
        def on_trajectory_start(self, requests: Any) -> None:
            requests[0].data_dict["seen"] = True

    assert run(Scripted(template), First(), template) == []  # nobody is asked about no conversations


def test_a_scheduler_that_fails_on_another_rank_ends_this_one(template: ChatTemplate) -> None:
    told: list[Any] = []

    def collect(value: Any) -> list[Any]:
        told.append(value)
        return [value, ConfigError("over there") if len(told) == 2 else True]

    with pytest.raises(ConfigError, match="over there"):
        run(Scripted(template, ["1"], ["2"]), Asks(), template, start(), collect=collect)
    assert told == [True, True]  # not told again
    told.clear()
    with pytest.raises(ConfigError, match="step added no message"):
        run(Scripted(template, ["1"], ["2"]), stepping(len), template, start(), collect=collect)
    assert [type(value) for value in told] == [bool, ConfigError]  # the others are


def test_a_template_that_drops_thoughts_does_not_drop_them_here(tiny_tokenizer: Any) -> None:
    """As Qwen3's does: thoughts are shown only behind the last question."""
    source = (
        "{% for m in messages %}{% set text = m.content %}"
        "{% if m.role == 'assistant' and not loop.last %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>"
    )
    tokenizer.chat_template = source
    template = ChatTemplate(tokenizer, TemplateConfig(response_prefix="<think>"))
    engine = Scripted(template, ["one</think>13"], ["two</think>12"])
    (found,) = run(engine, Asks(), template, start())
    assert text_of(template, found) == (
        "one</think>13<|im_end|>\n<|im_start|>user\nNo. Turn 1<|im_end|>\n<|im_start|>assistant\n<think>"
        "two</think>12<|im_end|>"
    )
    assert [m["content"] for m in found.messages if m["role"] == "assistant"] == [
        "<think>one</think>13",
        "<think>two</think>12",
    ]


def test_math_tips_take_a_wrong_answer_back(template: ChatTemplate) -> None:
    pytest.importorskip("math_verify")
    scheduler = build_scheduler(TurnConfig(multi_turn_scheduler="math_tip_trick"))
    script = ["<think>7 and 5</think><answer>13</answer>", "<answer>12</answer>", "13"], [" 12</think>12"]
    engine = Scripted(template, *script)
    starts = [start(number=0, solution="12"), start(number=1, solution=12), start(number=2)]
    wrong, right, without = run(engine, scheduler, template, *starts)
    tip = "But wait... It seems I made a mistake,"
    assert text_of(template, wrong) == f"<think>7 and 5{tip} 12</think>12<|im_end|>"
    assert text_of(template, wrong, 1) == "<think>7 and 5 12</think>12<|im_end|>"
    assert [m["content"] for m in wrong.messages[1:]] == [f"<think>7 and 5{tip} 12</think>12"]
    assert [t.num_turns for t in (wrong, right, without)] == [2, 1, 1]
    kept = wrong.loss_mask.index(0)
    assert wrong.logps[:kept] == [-0.5 - i for i in range(kept)]  # those it was sampled with


def test_an_answer_that_was_taken_back_stands_where_there_is_no_room_for_another(
    template: ChatTemplate,
) -> None:
    class Cuts(MultiTurnScheduler):
        def step(self, request: Any, choice: Any, turn: int) -> dict:
            request.messages[-1]["content"] = "No. " + "Wait. " * 50
            return {}

    engine = Scripted(template, ["No way"])
    prompt = len(engine.tokenizer(template.prompt(start().messages)).input_ids)
    (found,) = run(engine, Cuts(), template, start(), context=prompt + 40)
    assert (found.text, text_of(template, found), found.finish_reason) == (
        "No way",
        "No way<|im_end|>",
        "length",
    )
    assert found.logps == [-0.5 - i for i in range(len(found.token_ids))]


def test_an_answer_cut_inside_a_token(template: ChatTemplate) -> None:
    """What is kept of a token that is cut through is written again, as somebody else's."""

    class Cuts(MultiTurnScheduler):
        def step(self, request: Any, choice: Any, turn: int) -> dict:
            request.messages[-1]["content"] = "The capi, said"
            return {}

    answer = "The capital of France"
    pieces = [template.tokenizer.decode([i]) for i in template.tokenizer(answer).input_ids]
    assert any(piece.strip() not in ("", "The") and "capi" in piece for piece in pieces)
    engine = Scripted(template, [answer], [" Paris"])
    (found,) = run(engine, Cuts(max_turns=2), template, start())
    assert text_of(template, found) == "The capi, said Paris<|im_end|>"
    assert text_of(template, found, 1) == "The Paris<|im_end|>"
    assert found.text == "The capi, said Paris"


class Counting(Env):
    """Adds what it is told up to a goal. Half of its methods are coroutines."""

    closed: ClassVar[list[int]] = []

    async def reset(self, config: Any) -> tuple[str, dict, str]:
        self.total = 0
        return f"Reach {config.data_dict['goal']}", {}, "Count."

    async def step(self, action: list[dict[str, Any]]) -> tuple[str, float, bool, dict]:
        await asyncio.sleep(0)
        self.total += int(action[-1]["content"])
        return f"now {self.total}", 0.5, self.total >= self.env_config["goal"], {"total": self.total}

    def close(self) -> None:
        self.closed.append(self.total)


def test_environments(template: ChatTemplate) -> None:
    envs["counting"] = Counting
    scheduler = build_scheduler(TurnConfig(use_gym_env=True, gym_env="counting"))
    engine = Scripted(template, ["5", "2"], ["3"])
    starts = [start(goal=5, env_config={"goal": 5}) for _ in range(2)]  # the same row twice
    Counting.closed.clear()
    first, second = run(engine, scheduler, template, *starts)
    assert first.infos == {
        "total_reward": 0.5, "step_rewards": [0.5], "trajectory_info": {"total": 5}, "num_turns": 1
    }  # fmt: skip
    assert second.infos["total_reward"] == 1.0 and second.infos["step_rewards"] == [0.5, 0.5]
    assert [m["content"] for m in second.messages] == ["Count.", "Reach 5", "2", "now 2", "3"]
    assert template.tokenizer.decode(second.prompt_ids).startswith("<|im_start|>system\nCount.<|im_end|>\n")
    assert Counting.closed == [5, 5]
    with pytest.raises(ConfigError, match="no environment is called nothing"):
        run(engine, scheduler, template, start(env_config={"name": "nothing"}))
    with pytest.raises(ConfigError, match="no environment is named"):
        run(engine, build_scheduler(TurnConfig(use_gym_env=True)), template, start())


def stepping(change: Callable[[list[dict[str, Any]]], Any], result: Any = None) -> MultiTurnScheduler:
    class Steps(MultiTurnScheduler):
        def step(self, request: Any, choice: Any, turn: int) -> Any:
            change(request.messages)
            return result

    return Steps()


def rename_question(messages: list[dict[str, Any]]) -> None:
    messages[0] = {"role": "user", "content": "Another"}


def change_and_append(messages: list[dict[str, Any]]) -> None:
    messages[-1]["content"] = "x"
    messages.append({"role": "user", "content": "y"})


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (stepping(rename_question), "step changed an earlier message, which the model has already read"),
        (stepping(list.clear), "step changed an earlier message"),
        (stepping(change_and_append), "step changed the answer and added messages behind it"),
        (stepping(len), "step added no message for the model to answer"),
        (
            stepping(len, {"response_loss_mask": []}),
            "step gave response_loss_mask: tokens and",
        ),
    ],
)
def test_what_a_scheduler_may_not_do(template: ChatTemplate, scheduler: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--multi_turn_scheduler mine: data.jsonl line 1: {message}"):
        run(Scripted(template, ["13"]), scheduler, template, start())


def test_a_scheduler_that_raises_or_is_late(template: ChatTemplate) -> None:
    def fail(messages: Any) -> None:
        raise KeyError("k")

    class Waits(MultiTurnScheduler):
        async def on_turn_end(self, request: Any, choice: Any, turn: int) -> None:
            await asyncio.sleep(60)

    starts = start(number=0), start(number=4)
    with pytest.raises(ConfigError) as caught:
        run(Scripted(template, ["1", "2"]), stepping(fail), template, *starts)
    line = fail.__code__.co_firstlineno + 1
    assert caught.value.message == (
        "--multi_turn_scheduler mine: step, data.jsonl line 1 to data.jsonl line 5: KeyError: 'k' "
        f"(test_multi_turn.py line {line})"
    )
    with pytest.raises(ConfigError, match=r"on_turn_end, data.jsonl line 1 to .* 5: not done after 0.1 s"):
        run(Scripted(template, ["1", "2"]), Waits(), template, *starts, timeout_seconds=0.1)


def test_flags(tmp_path: Path) -> None:
    values = {"model": "m", "dataset": ("d",), "rlhf_type": "grpo"}
    for given, message in (
        ({"max_turns": 2}, "--max_turns has no effect without --multi_turn_scheduler or --use_gym_env true"),
        ({"completion_length_limit_scope": "total"}, "--completion_length_limit_scope has no effect without"),
        ({"gym_env": "x"}, "--gym_env has no effect without --use_gym_env true"),
        ({"max_turns": 2, "rlhf_type": "dpo"}, "--max_turns has no effect with --rlhf_type dpo"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(RlhfRun, values | given).check()
    multi_turns["function"] = len
    with pytest.raises(ConfigError, match="--multi_turn_scheduler function is no class"):
        build_scheduler(TurnConfig(multi_turn_scheduler="function"))
    with pytest.raises(ConfigError, match="no multi-turn scheduler is called nothing"):
        build_scheduler(TurnConfig(multi_turn_scheduler="nothing"))
    (tmp_path / "mine_turns.py").write_text(
        "from swift.plugin import MultiTurnScheduler, multi_turns\n"
        "class Mine(MultiTurnScheduler):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
    )
    found = build_scheduler(
        TurnConfig(multi_turn_scheduler=f"{tmp_path}/mine_turns.py:Mine", max_turns=3), tokenizer="t"
    )
    assert (found.max_turns, found.tokenizer) == (3, "t")
