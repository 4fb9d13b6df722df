"""The loops of examples/minimal do what they say, on a tiny model."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples/minimal"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """`load(name)`: the module as a program next to its parts, gone from memory afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("parts", "sft", "dpo", "grpo"):
        sys.modules.pop(name, None)


def run(module: ModuleType, model: Path, monkeypatch: pytest.MonkeyPatch, capsys, *more: str) -> str:
    monkeypatch.setattr(sys, "argv", ["loop", "--model", str(model), *more])
    module.main()
    return capsys.readouterr().out


def numbers(name: str, out: str) -> list[float]:
    return [float(found) for found in re.findall(rf"{name} (-?[\d.]+)", out)]


def test_sft_lowers_the_loss(load, tiny_llama_dir, monkeypatch, capsys, tmp_path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "Who are you?", "response": "swift"}\n' * 4)
    more = ("--dataset", str(data), "--steps", "12", "--rows", "4")
    losses = numbers("loss", run(load("sft"), tiny_llama_dir, monkeypatch, capsys, *more))
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.005


def test_dpo_starts_at_ln_2_and_parts_the_answers(
    load, tiny_llama_dir, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    out = run(load("dpo"), tiny_llama_dir, monkeypatch, capsys, "--steps", "4")
    losses, margins = numbers("loss", out), numbers("margin", out)
    assert losses[0] == 0.6931
    assert margins[0] == 0 < margins[-1]
    assert losses[-1] < losses[0]


def test_grpo_learns_from_the_difference_within_groups(load, tiny_llama_dir, monkeypatch, capsys) -> None:
    module = load("grpo")
    monkeypatch.chdir(FOLDER.parents[1])
    monkeypatch.setattr(module, "reward", lambda answer, right: float(len(answer.text)))
    out = run(module, tiny_llama_dir, monkeypatch, capsys, "--steps", "2", "--rows", "2")
    assert all(norm > 0 for norm in numbers("grad_norm", out))
    monkeypatch.setattr(module, "reward", lambda answer, right: 1.0)
    out = run(module, tiny_llama_dir, monkeypatch, capsys, "--steps", "1", "--rows", "2")
    assert numbers("grad_norm", out) == [0.0]
    assert "equal rewards in 100% of groups" in out
