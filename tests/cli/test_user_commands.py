"""Commands as users have them in notes and scripts, split by a real shell, resolve and print themselves.

bash runs each file with a PATH that holds nothing but recorders named swift, megatron and the like, so that
quoting, line ends, comments and background jobs are the shell's own business. Only paths in /data are ours.
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from swift.cli.main import run
from user_calls import FILES, FOLDER, record_calls

CALLS = {
    "003_12": 3,
    "003_17": 3,
    "002_26": 0,
    "002_27": 0,
    "002_28": 0,
    "002_29": 0,
    "002_30": 0,
}  # others: 1


def print_config(call: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    code = run([*call[1:], "--print_config", "true"], program=call[0])
    captured = capsys.readouterr()
    assert code == 0, f"{call}\n{captured.err}"
    return captured.out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_command_resolves_to_a_fixed_point(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = record_calls(path.read_text(encoding="utf-8"), tmp_path)
    assert len(calls) == CALLS.get(path.stem, 1)
    for number, call in enumerate(calls):
        first = print_config(call, capsys)
        saved = tmp_path / f"{number}.yaml"
        saved.write_text(first, encoding="utf-8")
        assert print_config([*call[:2], str(saved)], capsys) == first


def resolve_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: int = 0) -> dict:
    calls = record_calls((FOLDER / f"{name}.sh").read_text(encoding="utf-8"), tmp_path)
    return yaml.safe_load(print_config(calls[call], capsys))


def test_all_files_are_here() -> None:
    assert len(FILES) == 31


def test_values_of_a_lora_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = resolve_file("001_03", tmp_path, capsys)
    assert values["dataset"] == ["swift/Qwen3-SFT-Mixin#2000", "swift/self-cognition:qwen3#600"]
    assert values["learning_rate"] == 1e-4
    assert (values["model_author"], values["model_name"]) == (["swift"], ["swift-robot"])
    assert (values["eval_steps"], values["max_length"], values["warmup_ratio"]) == (50, 2048, 0.05)
    assert values["num_train_epochs"] == 1 and values["weight_decay"] == 0.1


def test_old_names_of_vllm_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = resolve_file("001_02", tmp_path, capsys)
    assert values["vllm_gpu_memory_utilization"] == 0.9
    assert (values["vllm_tensor_parallel_size"], values["vllm_max_model_len"]) == (2, 8192)
    assert values["infer_backend"] == "vllm"
    assert "tensor_parallel_size" not in values


def test_response_prefix_keeps_its_backslashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_file("001_01", tmp_path, capsys)["response_prefix"] == "<think>\\n\\n</think>\\n\\n"


def test_hub_token_is_never_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = resolve_file("001_06", tmp_path, capsys)
    assert values["hub_token"] is None
    assert (values["push_to_hub"], values["hub_model_id"]) == (True, "<hub-model-id>")


def test_megatron_flags_without_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = resolve_file("003_12", tmp_path, capsys, call=1)
    assert values["mcore_model"] == "Qwen3-8B-mcore"
    assert (values["output_dir"], values["save_steps"], values["num_train_epochs"]) == (
        "/dev/shm/Qwen3-8B-sft",
        50,
        1,
    )
    assert all(values[name] is True for name in ("sequence_parallel", "finetune"))
    assert (values["train_type"], values["add_version"]) == ("full", False)
    assert len(values["dataset"]) == 2


def test_blank_arguments_are_ignored_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = record_calls((FOLDER / "003_11.sh").read_text(encoding="utf-8"), tmp_path)[0]
    assert call.count(" ") == 5
    assert run([*call[1:], "--print_config"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("blank argument") == 1
    assert yaml.safe_load(captured.out)["to_hf"] is True


def test_a_command_cut_by_comments_is_whole_without_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (FOLDER / "004_25.sh").read_text(encoding="utf-8")
    cut = record_calls(text, tmp_path)[0]
    assert "--micro_batch_size" not in cut
    text = re.sub(r"(?m)^(\\|#.*)\n", "", re.sub(r"\\ #.*", r"\\", text))
    (tmp_path / "whole").mkdir()
    values = yaml.safe_load(print_config(record_calls(text, tmp_path / "whole")[0], capsys))
    assert values["recompute_modules"] == ["core_attn", "moe"]
    assert (values["per_device_train_batch_size"], values["moe_aux_loss_coeff"]) == (4, 0.001)
    assert json.dumps(values)  # every value is plain
