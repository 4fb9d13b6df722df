"""Reward models beside a training: the numbers of transformers itself, plugins, refusals before loading."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.rewards import RewardConfig
from swift.engines.transformers import scorer
from swift.plugins.hooks import rm_plugins
from swift.rewards.panel import Answer, Panel, RewardError
from swift.train.judge import read_verdict
from swift.train.reward_models import find_reward_models, load_reward_models

CPU = torch.device("cpu")
QUESTION = {"role": "user", "content": "What is 7 + 5?"}
TEXTS = ("12", "It is 13, I think.", "", "A day has 24 hours. " * 60)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    known = dict(rm_plugins)
    yield
    rm_plugins.clear()
    rm_plugins.update(known)


@pytest.fixture(scope="module", params=[1, 3])
def headed(request: pytest.FixtureRequest, tmp_path_factory: Any, tiny_llama_dir: Path) -> Path:
    """A model with so many scores."""
    path = tmp_path_factory.mktemp("heads") / f"scores-{request.param}"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=request.param)
    model.config.pad_token_id = 0
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(path)
    return path


def answers() -> list[Answer]:
    return [
        Answer(
            text=text, messages=[QUESTION, {"role": "assistant", "content": text}],
            columns={"bonus": number}, token_ids=[], finish_reason="stop", prompt_id="p",
            request_id=str(number), place=f"data.jsonl line {number}",
        )
        for number, text in enumerate(TEXTS, start=1)
    ]  # fmt: skip


def load(path: Path, **flags: Any) -> list[Any]:
    sources = find_reward_models(RewardConfig(reward_model=(str(path),), **flags), ModelConfig())
    return load_reward_models(sources, ModelConfig(), CPU)


def test_scores_are_those_of_transformers(headed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if headed.name != "scores-1":
        with pytest.raises(ConfigError, match=f"--reward_model {headed} has 3 scores"):
            load(headed)
        return
    tokenizer = AutoTokenizer.from_pretrained(headed)
    model = AutoModelForSequenceClassification.from_pretrained(headed).eval()
    expected = []
    for one in answers():
        ids = tokenizer.apply_chat_template(list(one.messages), return_tensors="pt", return_dict=False)
        with torch.no_grad():
            expected.append(float(model(ids[:, -512:]).logits))  # of a text that is too long, its end
    assert len(set(expected)) == 4
    (member,) = load(headed)
    for together in (10_000, 1):
        monkeypatch.setattr(scorer, "TOKENS_TOGETHER", together)
        assert member.judge(answers()) == pytest.approx(expected, abs=1e-5)
    panel = Panel([], weights=None, timeout_seconds=1)
    panel.add_models([member])
    assert panel.names == ["scores-1"]
    assert panel.judge(answers())[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


class Bonus:
    def __init__(self, model: Any, template: Any) -> None:
        self.parameters, self.template = sum(p.numel() for p in model.parameters()), template
        assert not any(p.requires_grad for p in model.parameters())

    def __call__(self, inputs: list[dict[str, Any]]) -> torch.Tensor:
        assert self.template.prompt(inputs[0]["messages"][:1]).endswith("assistant\n")
        return torch.tensor([row["bonus"] * 0.5 for row in inputs])


def breaks(model: Any, template: Any) -> Callable:
    def ask(inputs: list[dict[str, Any]]) -> list[float]:
        raise OSError("no server")

    return ask


def test_plugins_read_any_model(headed: Path, tiny_llama_dir: Path) -> None:
    rm_plugins["bonus"] = Bonus
    for path in (headed, tiny_llama_dir):
        (member,) = load(path, reward_model_plugin=("bonus",))
        assert member.judge(answers()) == [0.5, 1, 1.5, 2]
        assert member.name == path.name and member.ask.parameters > 10_000


def test_a_language_model_can_be_the_judge(tiny_llama_dir: Path, headed: Path) -> None:
    """It is asked with the conversation, greedily; what it does not judge stays open."""
    (member,) = load(tiny_llama_dir, reward_model_plugin=("genrm",))
    judge = member.ask
    asked = judge.template.tokenizer.decode(judge._ask(answers()[0].messages))
    assert "User: What is 7 + 5?\nAssistant: 12" in asked and "Reward: x" in asked
    assert len(member.judge(answers()[:2])) == 2
    texts = (
        "It is right.\nReward: 0.85.",
        "Reward: 1",
        "Reward: 0.2, no: Reward:  1.0 .",
        "Reward: 7",
        "good",
    )
    assert [read_verdict(text) for text in texts] == [0.85, 1.0, 1.0, None, None]
    with pytest.raises(ConfigError, match="genrm needs a model that writes"):
        load(headed, reward_model_plugin=("genrm",))


def test_mistakes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tiny_llama_dir)
    assert caught.value.message == (
        f"--reward_model {tiny_llama_dir} is a language model without a score head"
    )
    assert "--rlhf_type rm" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="no reward model plugin is called nothing"):
        load(tiny_llama_dir, reward_model_plugin=("nothing",))
    rm_plugins["breaks"] = breaks
    (member,) = load(tiny_llama_dir, reward_model_plugin=("breaks",))
    with pytest.raises(RewardError, match=r"line 1 to data.jsonl line 4: OSError: no server \(test_reward_m"):
        member.judge(answers())
    rm_plugins["broken"] = lambda model: None
    with pytest.raises(ConfigError, match="--reward_model_plugin of tiny-llama: TypeError"):
        load(tiny_llama_dir, reward_model_plugin=("broken",))
