"""`swift infer` from its flags: what is loaded, what args.json settles, where answers go."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from swift.config.option import ConfigError, build, flatten
from swift.config.runs import InferRun, SftRun
from swift.infer import run as run_module
from swift.infer.run import find_source, run_infer


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    seen: list[str] = []
    for name in ("run", "batch"):
        monkeypatch.setattr(f"swift.infer.{name}.say", seen.append)
    return seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama_dir) -> Path:
    """A run as training leaves it: checkpoint-2 and checkpoint-10 with adapters that change the answers."""
    directory = tmp_path_factory.mktemp("run")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
    saved = flatten(
        build(
            SftRun, {"model": str(tiny_llama_dir), "system": "Be brief.", "max_length": 64, "dataset": ("x",)}
        )
    )
    for step in (2, 10):
        checkpoint = directory / f"checkpoint-{step}"
        model.save_pretrained(checkpoint)
        (checkpoint / "args.json").write_text(json.dumps(saved))
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]}
        for i in "ab"
    ]
    (directory / "val_dataset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def infer_run(**flags) -> InferRun:
    return build(InferRun, {"device": "cpu", "temperature": 0.0, "max_new_tokens": 4} | flags)


def answer(path: Path) -> list[str]:
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]


def test_a_checkpoint_needs_nothing_repeated(trained, tiny_llama_dir, notices) -> None:
    source = find_source(infer_run(adapters=(str(trained / "checkpoint-10"),)))
    assert source.model == tiny_llama_dir
    assert source.adapter == source.checkpoint == trained / "checkpoint-10"
    assert source.run.template.system == "Be brief."
    assert source.run.template.max_length is None
    assert notices == [f"from the checkpoint: model {str(tiny_llama_dir)!r}, system 'Be brief.'"]


def test_the_command_line_wins_over_args_json(trained, tiny_qwen3_dir, notices) -> None:
    run = infer_run(adapters=(str(trained / "checkpoint-2"),), model=str(tiny_qwen3_dir), system="Mine.")
    source = find_source(run)
    assert source.model == tiny_qwen3_dir
    assert source.run.template.system == "Mine."
    assert notices == []


def test_without_load_args_only_the_base_is_found(trained, tiny_llama_dir, notices) -> None:
    source = find_source(infer_run(adapters=(str(trained / "checkpoint-2"),), load_args=False))
    assert source.model == tiny_llama_dir
    assert source.run.template.system is None
    assert notices == [f"from the checkpoint: model {str(tiny_llama_dir)!r}"]


def test_a_whole_checkpoint_keeps_its_own_weights(tmp_path, make_tiny_model_dir, notices) -> None:
    path = make_tiny_model_dir(tmp_path)
    saved = {"model": "somewhere/else", "system": "Be kind.", "enable_thinking": False, "use_hf": True}
    (path / "args.json").write_text(json.dumps(saved))
    source = find_source(infer_run(model=str(path)))
    assert source.model == source.checkpoint == path
    assert source.run.template.system == "Be kind."
    assert source.run.template.enable_thinking is False
    assert source.run.model.use_hf is False
    assert notices == ["from the checkpoint: system 'Be kind.', enable_thinking False"]


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        ({"adapters": ("{run}",)}, "adapter_config.json", "checkpoint-10"),
        ({"model": "{run}"}, "config.json", "checkpoint-10"),
        ({"model": "{run}/checkpoint-2"}, "config.json", "--adapters"),
        ({"adapters": ("{run}/none/none",)}, "no such directory", ""),
        ({"adapters": ("a", "b")}, "names 2 directories", "leave one"),
        ({}, "--model or --adapters is missing", ""),
        ({"model": "x", "repetition_penalty": 0.0}, "--repetition_penalty must be above 0", "1 = no"),
        ({"model": "x", "top_k": -5}, "--top_k must be at least -1", "all tokens"),
        ({"model": "x", "top_logprobs": 2}, "--top_logprobs has no effect without --logprobs true", ""),
        ({"model": "x", "logprobs": True}, "--logprobs is written with rows", "--val_dataset"),
        ({"model": "x", "merge_lora": True}, "--merge_lora needs --adapters", "checkpoint"),
        ({"model": "x", "quant_bits": 4}, "--quant_bits 4 has no effect without --quant_method", "bnb"),
    ],
)
def test_mistakes_are_named(trained, flags, message, hint) -> None:
    def fill(value):
        if isinstance(value, tuple):
            return tuple(fill(v) for v in value)
        return value.format(run=trained) if isinstance(value, str) else value

    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        run_infer(infer_run(**{name: fill(value) for name, value in flags.items()}))
    assert hint in (error.value.hint or "")


def test_log_probabilities_need_our_own_decoder(tiny_llama_dir, tmp_path, make_tiny_model_dir) -> None:
    asked = {"val_dataset": ("x.jsonl",), "logprobs": True}
    with pytest.raises(
        ConfigError, match=r"--logprobs: transformers' generate, .* because of --attn_impl sdpa"
    ):
        run_infer(infer_run(model=str(tiny_llama_dir), attn_impl="sdpa", **asked))
    path = make_tiny_model_dir(tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"attn_logit_softcapping": 30.0}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="because its config sets attn_logit_softcapping") as error:
        run_infer(infer_run(model=str(path), **asked))
    assert error.value.hint == "--infer_backend vllm does"


def test_held_out_rows_are_answered_beside_the_checkpoint(trained, notices) -> None:
    adapter = trained / "checkpoint-10"
    assert run_infer(infer_run(adapters=(str(adapter),), load_data_args=True, metric="acc")) == 0
    (result,) = (adapter / "infer_result").glob("*.jsonl")
    assert re.fullmatch(r"\d{8}-\d{6}\.jsonl", result.name)
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["a", "b"]
    assert [row["labels"] for row in rows] == ["x", "x"]
    loaded = next(line for line in notices if line.startswith("model "))
    assert loaded.endswith(f"adapters {adapter}, float32, cpu, system prompt 'Be brief.'")
    assert any(line.startswith("acc 0.0000 (0 of 2") for line in notices)
    assert notices[-1] == f"answers in {result}"


def test_adapters_change_the_answers(trained, tiny_llama_dir, tmp_path, notices) -> None:
    data = str(trained / "val_dataset.jsonl")
    answers = []
    for number, flags in enumerate(
        [{"model": str(tiny_llama_dir)}, {"adapters": (str(trained / "checkpoint-2"),)}]
    ):
        path = tmp_path / f"{number}.jsonl"
        run_infer(infer_run(val_dataset=(data,), result_path=str(path), system="Be brief.", **flags))
        answers.append(answer(path))
    assert len(answers[0]) == len(answers[1]) == 2
    assert answers[0] != answers[1]
    merged = tmp_path / "merged.jsonl"
    run_infer(
        infer_run(val_dataset=(data,), result_path=str(merged), system="Be brief.", merge_lora=True, **flags)
    )
    assert answer(merged) == answers[1]


def test_a_plain_model_writes_under_result(tiny_llama_dir, trained, tmp_path, monkeypatch, notices) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run_infer(infer_run(model=str(tiny_llama_dir), val_dataset=(str(trained / "val_dataset.jsonl"),)))
        == 0
    )
    (result,) = (tmp_path / "result" / tiny_llama_dir.name / "infer_result").glob("*.jsonl")
    assert len(answer(result)) == 2
    loaded = next(line for line in notices if line.startswith("model "))
    assert loaded.endswith("no system prompt given, prompts start with '<|im_start|>user\\n'")


def test_bad_data_and_bad_paths_are_found_before_the_model_is_loaded(
    tiny_llama_dir, trained, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(run_module, "load_engine", lambda *_: pytest.fail("the model was loaded"))
    model = {"model": str(tiny_llama_dir)}
    with pytest.raises(ConfigError, match=r"missing\.jsonl"):
        run_infer(infer_run(val_dataset=(str(tmp_path / "missing.jsonl"),), **model))
    blocked = tmp_path / "file" / "result.jsonl"
    blocked.parent.write_text("a file, not a directory")
    with pytest.raises(ConfigError, match=r"--result_path .* cannot be written"):
        run_infer(
            infer_run(val_dataset=(str(trained / "val_dataset.jsonl"),), result_path=str(blocked), **model)
        )
    with pytest.raises(ConfigError, match="--load_data_args: the model is no checkpoint"):
        run_infer(infer_run(load_data_args=True, **model))
