"""Whole runs through the command line: sequence parallel, DeepSpeed, half precision; and what is refused."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_processes import assert_same_curve, assert_same_weights, batch, read_curve, train, write_rows

from swift.cli.main import may_take_all_gpus, quiet_deepspeed
from swift.config.option import ConfigError
from swift.engines import launch
from swift.engines.sequence_parallel import SequenceRanks
from swift.utils import env

FULL = ("--train_type", "full")


@pytest.mark.slow
def test_one_run_moves_through_every_layout(workers, tiny_qwen3_dir, tmp_path):
    """Packs over sequence ranks, then DeepSpeed's slices, then one process: always the same curve."""
    pytest.importorskip("deepspeed")
    data = write_rows(tmp_path / "rows.jsonl")
    run = partial(train, workers, data, tiny_qwen3_dir)
    single = run(tmp_path / "single", 1, *batch(8, 1), *FULL)
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"}
    written = {"bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "zero_optimization": zero}
    config.write_text(json.dumps(written))
    sliced = run(tmp_path / "zero", 2, *batch(2, 2), *FULL, "--deepspeed", str(config))
    assert_same_curve(sliced, single)
    assert_same_weights(sliced, single, "model.safetensors")
    resume = ["sft", "--resume_from_checkpoint", str(sliced / "checkpoint-6")]
    layouts = (
        (1, ("--deepspeed", "zero0")),
        (2, ("--deepspeed", "zero2", "--sequence_parallel_size", "2", *batch(2, 4))),
    )
    for processes, flags in layouts:
        result = workers.run([*resume, *flags], processes)
        assert result.code == 0, result.stderr[-3000:]
        assert "ccelerator" not in result.stdout + result.stderr  # DeepSpeed's account of its search for GPUs
        assert_same_curve(sliced, single)
        assert_same_weights(sliced, single, "model.safetensors")


@pytest.mark.slow
def test_packs_over_sequence_ranks(workers, tiny_llama_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    packing = ("--packing", "true", "--max_length", "128", "--max_steps", "4", "--save_steps", "4")
    run = partial(train, workers, data, tiny_llama_dir)
    single = read_curve(run(tmp_path / "single", 1, *batch(1, 4), *packing))
    spread = read_curve(
        run(
            tmp_path / "spread", 4, *batch(1, 2), *packing, "--sequence_parallel_size", "2", "--fsdp", "fsdp2"
        )
    )
    assert len(single) == 4
    assert spread == [pytest.approx(row, rel=1e-5) for row in single]
    assert [row[0] for row in spread] == pytest.approx([row[0] for row in single], rel=1e-6)


@pytest.mark.slow
def test_half_precision_beside_float32_weights(workers, tiny_llama_dir, tmp_path):
    """bfloat16 and float16 arithmetic follow float32; the trained weights stay float32 and go on exactly."""
    data = write_rows(tmp_path / "rows.jsonl")
    run = partial(train, workers, data, tiny_llama_dir)
    exact = read_curve(run(tmp_path / "exact", 1, *batch(8, 1), *FULL))
    for name, flags in {
        "bf16": ("--torch_dtype", "float32", "--bf16", "true"),
        "fp16": ("--torch_dtype", "float16"),
    }.items():
        output = run(tmp_path / name, 1, *batch(8, 1), *FULL, *flags)
        curve = read_curve(output)
        overflows = [i for i, row in enumerate(curve) if row[1] is None]
        rows = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
        assert [row.get("skipped_steps", 0) for row in rows if "loss" in row][-1] == len(overflows)
        if not overflows:
            assert [row[0] for row in curve] == pytest.approx([row[0] for row in exact], rel=5e-3)
        assert curve[0][0] != exact[0][0]  # it is another arithmetic
        weights = load_file(output / "last" / "model.safetensors")
        assert {t.dtype for t in weights.values()} == {torch.float32}
        # Loss scale and weights go on where they were.
        result = workers.run(["sft", "--resume_from_checkpoint", str(output / "checkpoint-6")], 1)
        assert result.code == 0, result.stderr[-3000:]
        assert read_curve(output) == curve


def refuse(workers, model: Path, tmp_path: Path, flags: list[str], processes: int = 1) -> str:
    """What is said; nothing was written, and no weight was read."""
    data = write_rows(tmp_path / "rows.jsonl")
    command = ["sft", "--model", str(model), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    result = workers.run([*command, *flags], processes, environment={"SWIFT_OFFLINE": "1"})
    assert result.code == 2, result.stderr[-3000:]
    assert not (tmp_path / "out").exists() and " M parameters" not in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sequence_parallel_size", "2"], "--sequence_parallel_size 2 does not divide the 1 process(es)"),
        (["--bf16", "true", "--fp16", "true"], "--bf16 and --fp16 contradict each other"),
        (["--fp16", "true", "--torch_dtype", "bfloat16"], "--fp16 true contradicts --torch_dtype bfloat16"),
        (["--fsdp", "fsdp2", "--deepspeed", "zero2"], "--fsdp and --deepspeed both slice the model"),
        (["--ddp_backend", "nccl"], "--ddp_backend nccl needs GPUs"),
        (["--activation_cpu_offload", "true"], "--activation_cpu_offload true needs a GPU"),
        (["--tf32", "true"], "--tf32 true needs a GPU"),
        (["--fsdp", "fsdp2", "--ddp_bucket_cap_mb", "9"], "--ddp_bucket_cap_mb has no effect with --fsdp"),
        (
            ["--sequence_parallel_size", "2", "--padding_free", "false"],
            "--padding_free false cannot be combined with --sequence_parallel_size 2",
        ),
        (
            ["--fsdp", "fsdp2", "--ddp_find_unused_parameters", "true"],
            "--ddp_find_unused_parameters has no effect with --fsdp",
        ),
    ],
)
@pytest.mark.slow
def test_contradictions_are_told(workers, tiny_llama_dir, tmp_path, flags, message):
    assert message in refuse(workers, tiny_llama_dir, tmp_path, flags)


@pytest.mark.slow
def test_sizes_that_do_not_divide_are_told(workers, make_tiny_model_dir, tmp_path):
    model = make_tiny_model_dir(tmp_path, num_attention_heads=2)
    (model / "model.safetensors").write_bytes(b"no weights")  # they are not looked at
    said = refuse(workers, model, tmp_path, ["--sequence_parallel_size", "3"], 4)
    assert "--sequence_parallel_size 3 does not divide the 4 process(es)" in said
    said = refuse(workers, model, tmp_path, ["--sequence_parallel_size", "4"], 4)
    assert "--sequence_parallel_size 4 does not divide the model's 2 attention heads" in said


def test_contradicting_deepspeed_configs_are_told(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    from swift.engines.transformers.wrap import load_zero

    zero = load_zero()
    quiet_deepspeed()
    logger = logging.getLogger("DeepSpeed")
    records = [logger.makeRecord("", level, "", 0, "", (), None) for level in (30, 40)]
    assert [bool(logger.filter(record)) for record in records] == [False, True]
    numbers = {"micro_batch": 2, "accumulation": 4, "data_world": 2, "clip": 1.0, "width": 64}
    settle = partial(zero.settle, compute="bfloat16", **numbers)
    stage = {"zero_optimization": {"stage": 2}}
    for config, message in (
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps 8 contradicts --gradient_acc"),
        ({"train_batch_size": 8}, "train_batch_size 8 contradicts the rows that the batch flags make a step"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5 contradicts --max_grad_norm, which is 1.0"),
        ({"fp16": {"enabled": True}}, "fp16.enabled true contradicts --torch_dtype, which is bfloat16"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            'optimizer.params {"lr": 0.001} contradicts',
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage 0 is not supported"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device nvme is not supported",
        ),
        (
            {"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}},
            "allgather_bucket_size cannot be",
        ),
    ):
        with pytest.raises(ConfigError, match="--deepspeed: ") as told:
            settle(json.dumps({**stage, **config}))
        assert message in told.value.message
    repeated = {"train_micro_batch_size_per_gpu": 2, "train_batch_size": 16, "bf16": {"enabled": True}}
    assert settle(json.dumps({**stage, **repeated}))["gradient_clipping"] == 1.0
    assert settle("zero3")["zero_optimization"]["stage3_param_persistence_threshold"] == 640
    for text, message in (("zero9", "neither a preset nor a file"), ("{", "is not JSON"), ("[1]", "neither")):
        with pytest.raises(ConfigError, match=message):
            settle(text)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs the package deepspeed") as missing:
        load_zero()
    assert missing.value.hint == "pip install 'swiftune[deepspeed]'"


def test_gpus_are_counted_without_torch(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert env.count_gpus(tmp_path) == 3
    for listed, count in (("0,1", 2), ("", 0), ("2", 1), ("0,-1,1", 1), ("GPU-ab, GPU-cd", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert env.count_gpus(tmp_path) == count


def test_training_takes_all_gpus_unless_told_otherwise(monkeypatch, capsys):
    for name in ("NPROC_PER_NODE", "NNODES", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert may_take_all_gpus({}) and not may_take_all_gpus({"device": "cuda:1"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.launch_on_gpus("swift", ["sft"]) is None
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch, "run", started.append)
    monkeypatch.setenv("NPROC_PER_NODE", "")  # so that what is set below is undone
    monkeypatch.delenv("NPROC_PER_NODE")
    assert launch.launch_on_gpus("swift", ["sft", "--model", "m"]) == 0
    assert started[0].nproc_per_node == "4" and started[0].training_script_args == ["sft", "--model", "m"]
    assert "training on all 4 GPUs" in capsys.readouterr().err
    assert not may_take_all_gpus({})  # the processes that were started do not start others


def test_padding_to_a_multiple_is_a_segment_of_its_own(tiny_llama_dir):
    from test_layouts import make_rows

    from swift.data.collate import collate

    batch_of_5 = collate(make_rows()[:1])
    padded = SequenceRanks(1, 4).pad(batch_of_5)
    assert padded.segment_ids.tolist() == [0] * 5 + [1] * 3 and padded.num_segments == 2
    assert not padded.trained[5:].any() and padded.positions().tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert SequenceRanks(1, 4).own(padded.positions()).tolist() == [2, 3]
    assert SequenceRanks(0, 5).pad(batch_of_5) is batch_of_5
