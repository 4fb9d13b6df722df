"""The panel: what rewards are handed, side by side, and what is said about those that fail."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from swift.config.option import ConfigError, build
from swift.config.rewards import RewardConfig
from swift.config.runs import RlhfRun
from swift.data import datasets
from swift.plugins.hooks import ORM, AsyncORM, orms
from swift.plugins.registry import load_object, load_plugins
from swift.rewards.panel import Answer, Panel, RewardError

COUNTDOWN = Path(__file__).parents[1] / "data" / "countdown.py"
SETTINGS = {"max_completion_length": 100, "soft_cache_length": 20, "learning_rate": 0.5}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(datasets, "_REGISTERED", {})
    known = dict(orms)
    yield
    orms.clear()
    orms.update(known)
    for name in ("countdown", "alarmed"):
        sys.modules.pop(name, None)


def answer(text: str = "x", number: int = 1, **columns: Any) -> Answer:
    return Answer(
        text=text, messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}],
        columns=columns, token_ids=[5] * len(text), finish_reason="length" if "..." in text else "stop",
        prompt_id=f"p{number}", request_id=f"r{number}", place=f"data.jsonl line {number}",
    )  # fmt: skip


def panel_of(*rewards: Any, settings: dict | None = None, **flags: Any) -> Panel:
    names = [reward if isinstance(reward, str) else f"own{i}" for i, reward in enumerate(rewards)]
    orms.update({name: reward for name, reward in zip(names, rewards, strict=True) if name != reward})
    config = RewardConfig(reward_funcs=tuple(names), **flags)
    return Panel.build(config, settings=SETTINGS | (settings or {}))


def test_users_plugin_and_shipped_ones() -> None:
    load_plugins([str(COUNTDOWN)])
    panel = panel_of("external_countdown", "format", "soft_overlong", reward_weights=(2.0, 1.0, 0.5))
    assert panel.names == ["CountdownORM", "Format", "SoftOverlong"]
    assert panel.weights.tolist() == [2, 1, 0.5]
    texts = ["<think>x</think><answer>1+2+3</answer>", "<answer>1+2</answer>", "y" * 95]
    rewards = panel.judge([answer(text, i, nums=[1, 2, 3], target=6) for i, text in enumerate(texts)])
    assert rewards.dtype == np.float64
    assert rewards.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, -0.75]]
    assert panel.judge([]).shape == (0, 3)


def test_what_a_reward_is_handed() -> None:
    seen: dict[str, Any] = {}

    def everything(completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, completions=completions)
        return [0.0] * len(completions)

    def some(completions: list[str], nums: list[Any], is_truncated: list[bool]) -> list[float]:
        return [float(bool(n)) + cut for n, cut in zip(nums, is_truncated, strict=True)]

    panel = panel_of(everything, some)
    rows = [answer("ab", 1, nums=[1], completions="mine"), answer("abc...", 2, target=6)]
    state = SimpleNamespace(global_step=3)
    assert panel.judge(rows, trainer_state=state)[:, 1].tolist() == [1, 1]
    assert seen["completions"] == ["ab", "abc..."]
    assert (seen["nums"], seen["target"]) == ([[1], None], [None, 6])
    assert (seen["prompt_id"], seen["request_id"]) == (["p1", "p2"], ["r1", "r2"])
    assert (seen["finish_reason"], seen["is_truncated"]) == (["stop", "length"], [False, True])
    assert seen["response_token_ids"] == [[5] * 2, [5] * 6]
    assert seen["rollout_infos"] == [{}, {}]
    assert seen["messages"][1][-1] == {"role": "assistant", "content": "abc..."}
    assert seen["trainer_state"] is state


def test_classes_are_given_flags_by_name() -> None:
    class Plain(ORM):
        def __init__(self, args: Any = None) -> None:
            self.value = args.learning_rate

        def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
            return [self.value, None]

    class Named:
        def __init__(self, soft_max_length: int, tokenizer: str, factor: int = 2, **rest: Any) -> None:
            self.value = soft_max_length * factor + len(tokenizer) + len(rest)

        def __call__(self, completions: list[str]) -> np.ndarray:
            return np.full(2, self.value)

    panel = panel_of(Plain, Named, Plain(SimpleNamespace(learning_rate=7)), settings={"tokenizer": "abc"})
    assert panel.names == ["Plain", "Named", "Plain_3"]
    rewards = panel.judge([answer(), answer()])
    assert np.array_equal(rewards, [[0.5, 203, 7], [np.nan, 203, np.nan]], equal_nan=True)


def test_they_run_side_by_side() -> None:
    """Two plain functions and two coroutines that wait for each other: one after the other never ends."""
    barrier = threading.Barrier(3)
    meeting = asyncio.Event()

    def plain(completions: list[str]) -> list[float]:
        barrier.wait(60)
        return [1.0]

    def other(completions: list[str]) -> list[float]:
        barrier.wait(60)
        return [2.0]

    class Waits(AsyncORM):
        async def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
            await asyncio.to_thread(barrier.wait, 60)
            await meeting.wait()
            return [3.0]

    async def wakes(completions: list[str]) -> list[float]:
        meeting.set()
        return [4.0]

    panel = panel_of(plain, other, Waits, wakes)
    assert panel.judge([answer()]).tolist() == [[1, 2, 3, 4]]
    assert panel.names == ["plain", "other", "Waits", "wakes"]


def test_signals_work_in_what_uses_them(tmp_path: Path) -> None:
    """Functions whose file imports signal have the main thread, and then only those."""
    (tmp_path / "alarmed.py").write_text(
        "import signal\n"
        "def alarmed(completions):\n"
        "    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))\n"
        "    return [1.0]\n"
        "def other(completions):\n"
        "    return alarmed(completions)\n"
        "def rings():\n"
        "    return signal.getsignal(signal.SIGUSR2) != signal.SIG_DFL\n"
    )

    def is_main(completions: list[str]) -> list[float]:
        return [float(threading.current_thread() is threading.main_thread())]

    file = tmp_path / "alarmed.py"
    panel = panel_of(is_main, f"{file}:alarmed", is_main, f"{file}:other")
    assert panel.judge([answer()]).tolist() == [[0, 1, 0, 1]]
    assert panel_of(is_main, is_main, is_main).judge([answer()]).tolist() == [[1, 0, 0]]
    assert load_object(f"{file}:rings")() is False


@pytest.mark.parametrize("kind", ["first", "second", "coroutine"])
def test_one_that_is_late(kind: str) -> None:
    release = threading.Event()

    def quick(completions: list[str]) -> list[float]:
        return [0.0] * 2

    def slow(completions: list[str]) -> list[float]:
        release.wait(60)
        return [0.0]

    async def waits(completions: list[str]) -> list[float]:
        await asyncio.sleep(60)
        return [0.0]

    rewards: dict[str, list[Callable]] = {
        "first": [slow, quick],
        "second": [quick, slow],
        "coroutine": [waits],
    }
    panel = panel_of(*rewards[kind], reward_timeout=1.0)
    asked = panel.functions[-1 if kind == "second" else 0].asked
    with pytest.raises(RewardError) as caught:
        panel.judge([answer(), answer()])
    assert caught.value.message == f"{asked} was not done with 2 answers after 1 s"
    assert caught.value.hint == "raise --reward_timeout, or let it wait for less"
    release.set()


def broken(completions: list[str], target: list[Any]) -> list[float]:
    return [1.0 / number for number in target]


async def broken_later(completions: list[str], target: list[Any]) -> list[float]:
    return [1.0 / number for number in target]


def broken_together(completions: list[str]) -> list[float]:
    raise KeyError("k") if len(completions) > 1 else ValueError("alone")


@pytest.mark.parametrize("function", [broken, broken_later])
@pytest.mark.parametrize("first", [True, False])
def test_one_that_raises_names_the_row_and_its_own_line(function: Callable, first: bool) -> None:
    def fine(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    panel = panel_of(*([function, fine] if first else [fine, function]))
    rows = [answer(number=1, target=3), answer(number=8, target=0), answer(number=9, target=0)]
    with pytest.raises(RewardError) as caught:
        panel.judge(rows)
    line = function.__code__.co_firstlineno + 1
    assert caught.value.message == (
        f"--reward_funcs own{int(not first)}: data.jsonl line 8: ZeroDivisionError: float division by zero "
        f"(test_rewards_panel.py line {line})"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_one_that_raises_for_no_single_row() -> None:
    with pytest.raises(RewardError, match=r"own0: data.jsonl line 1 to data.jsonl line 2: KeyError: 'k' "):
        panel_of(broken_together).judge([answer(number=1), answer(number=2)])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "--reward_funcs own0 returned 1 values for 2 answers"),
        (0.5, "--reward_funcs own0 returned a float"),
        ("ab", "--reward_funcs own0 returned a str"),
        ([1.0, "2"], "--reward_funcs own0 returned '2' for an answer to data.jsonl line 4"),
        ([1.0, [2]], "--reward_funcs own0 returned [2] for an answer to data.jsonl line 4"),
        ([1.0, float("nan")], "--reward_funcs own0 returned nan for an answer to data.jsonl line 4"),
    ],
)
def test_what_is_no_reward(returned: Any, message: str) -> None:
    panel = panel_of(lambda completions: returned)
    with pytest.raises(RewardError) as caught:
        panel.judge([answer(number=3), answer(number=4)])
    assert caught.value.message == message


def test_column_that_is_missing_is_told_before_anything_runs() -> None:
    panel = panel_of(broken)
    with pytest.raises(RewardError) as caught:
        panel.check_columns(["solution", "id"])
    assert caught.value.message == (
        "--reward_funcs own0: it needs the column target, which the rows do not have"
    )
    assert caught.value.hint == "they have id, solution"
    panel_of("format", "soft_overlong").check_columns([])
    with pytest.raises(RewardError, match="needs the column target"):
        panel.judge([answer()])


def test_rows_that_all_lack_a_column_of_others() -> None:
    """One process may have rows of one dataset only."""
    panel = panel_of(lambda completions, target: target)
    panel.check_columns(["target", "id"])
    assert np.isnan(panel.judge([answer(), answer()])).all()
    assert panel.judge([answer(), answer(target=2)])[1, 0] == 2


def test_names_and_classes_that_cannot_be_used(tmp_path: Path) -> None:
    class Wants(ORM):
        def __init__(self, something: int) -> None: ...

    class Breaks(ORM):
        def __init__(self) -> None:
            raise OSError("no server")

    with pytest.raises(ConfigError) as caught:
        panel_of("acuracy")
    assert caught.value.message == "no reward is called acuracy"
    assert caught.value.hint and caught.value.hint.startswith(
        "did you mean accuracy? known: accuracy, cosine"
    )
    with pytest.raises(ConfigError, match="own0: Wants wants something, which is no flag of this command"):
        panel_of(Wants)
    with pytest.raises(ConfigError, match=r"own0: OSError: no server \(test_rewards_panel.py line \d+\)"):
        panel_of(Breaks)
    orms["nothing"] = 7
    with pytest.raises(ConfigError, match="--reward_funcs nothing is a int, not a class or a function"):
        panel_of("nothing")


def test_environment_and_models_come_after_functions() -> None:
    class Model:
        name = "my-model"

        def judge(self, answers: list[Answer]) -> list[float | None]:
            return [float(len(a.text)) for a in answers]

    config = RewardConfig(reward_funcs=("format",), reward_weights=(1.0, 2.0, 3.0))
    panel = Panel.build(config, settings=SETTINGS, has_environment=True)
    panel.add_models([Model()])
    assert panel.names == ["Format", "gym_reward", "my-model"]
    rows = [replace(answer("abc"), rollout_infos=infos) for infos in ({}, {"total_reward": 0.5})]
    assert np.array_equal(panel.judge(rows), [[0, np.nan, 3], [0, 0.5, 3]], equal_nan=True)


def test_flags_of_rewards_belong_to_methods_that_have_them() -> None:
    values = {"model": "m", "dataset": ("d",), "reward_funcs": ("format",), "rlhf_type": "dpo"}
    with pytest.raises(ConfigError, match="--reward_funcs has no effect with --rlhf_type dpo") as caught:
        build(RlhfRun, values).check()
    assert caught.value.hint == "it belongs to grpo, ppo; leave it out"
    build(RlhfRun, values | {"rlhf_type": "grpo"}).check()
