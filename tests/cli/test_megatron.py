"""The command line of megatron: both spellings, what its engine does not have, and exports."""

from pathlib import Path

import pytest
import yaml

from swift.cli.commands import find_command
from swift.cli.flags import resolve, split_arguments
from swift.cli.main import run
from swift.cli.shell import repair_arguments
from swift.config.export import ExportOptions
from swift.config.megatron_runs import MegatronExportRun
from swift.config.option import ConfigError
from swift.config.runs import ExportRun, ModelConfig
from user_calls import FILES, record_calls

MEGATRON = "megatron"


def print_config(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert run([*argv, "--print_config"], program=MEGATRON) == 0
    return capsys.readouterr().out


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str], program: str = MEGATRON) -> str:
    assert run([*argv, "--print_config"], program=program) == 2
    return capsys.readouterr().err


SPELLINGS = """
    --load D                        --mcore_model D
    --save S                        --output_dir S
    --save_interval 50              --save_steps 50
    --eval_interval 20              --eval_steps 20
    --log_interval 2                --logging_steps 2
    --micro_batch_size 2            --per_device_train_batch_size 2
    --lr 1e-5                       --learning_rate 1e-5
    --min_lr 1e-6                   --min_lr 1e-6
    --max_epochs 2                  --num_train_epochs 2
    --train_iters 30                --max_steps 30
    --lr_warmup_fraction 0.05       --warmup_ratio 0.05
    --lr_warmup_iters 9             --warmup_steps 9
    --lr_decay_style constant       --lr_scheduler_type constant_with_warmup
    --clip_grad 0.5                 --max_grad_norm 0.5
    --adam_eps 1e-6                 --adam_epsilon 1e-6
    --num_workers 3                 --dataloader_num_workers 3
    --tensorboard_dir T             --logging_dir T
    --seq_length 99                 --max_length 99
    --no_save_optim                 --save_only_model true
    --wandb_project p               --project p
    --wandb_exp_name n              --run_name n
    --adapter_load A                --adapters A
    --bf16 true                     --torch_dtype bfloat16
    --tuner_type lora               --train_type lora
    --cp_comm_type p2p              --cp_comm_type all_gather
    --transformer_impl local        --transformer_impl torch
    --router_aux_loss_coef 0.1      --moe_aux_loss_coeff 0.1
    --num_virtual_stages_per_pipeline_rank 3  --virtual_pipeline_model_parallel_size 3
"""


def test_both_spellings_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [line.split() for line in SPELLINGS.strip().splitlines()]
    old = [word for line in pairs for word in line[: len(line) - 2]]
    new = [word for line in pairs for word in line[-2:]]
    assert run(["sft", *old, "--print_config"], program=MEGATRON) == 0
    first = capsys.readouterr()
    assert first.err == ""  # neither spelling is the wrong one
    assert first.out == print_config(["sft", *new], capsys)
    plain = yaml.safe_load(print_config(["sft"], capsys))
    changed = {name for name, value in yaml.safe_load(first.out).items() if value != plain[name]}
    assert changed == {flag.removeprefix("--") for flag in new[::2]} - {"cp_comm_type"}


def test_defaults_of_megatron(capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(print_config(["sft"], capsys))
    expected = {
        "train_type": "full", "padding_free": True, "global_batch_size": 16, "per_device_train_batch_size": 1,
        "finetune": True, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "adam_beta2": 0.95, "min_lr": 0,
        "recompute_granularity": "selective", "recompute_modules": ["core_attn"], "eval_iters": -1,
        "use_distributed_optimizer": True, "moe_grouped_gemm": True,
        "attention_backend": "flash", "save_safetensors": True, "save_steps": 500,
        "virtual_pipeline_model_parallel_size": None, "expert_tensor_parallel_size": 1,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    pt = yaml.safe_load(print_config(["pt"], capsys))
    assert (pt["loss_scale"], pt["use_chat_template"]) == ("all", False)
    assert yaml.safe_load(print_config(["rlhf"], capsys))["loss_scale"] == "last_round"


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (
            "--fsdp fsdp2",
            "--use_distributed_optimizer slices the optimizer, --tensor_model_parallel_size the",
        ),
        (
            "--deepspeed zero3",
            "--use_distributed_optimizer slices the optimizer, --tensor_model_parallel_size",
        ),
        ("--sequence_parallel_size 2", "use --context_parallel_size"),
        ("--gradient_checkpointing", "use --recompute_granularity full"),
        ("--gradient_accumulation_steps 4", "give the rows of a step: --global_batch_size"),
        ("--attn_impl sdpa", "use --attention_backend"),
        ("--torch_compile", "leave it out"),
        ("--optim sgd", "Adam is the optimizer here"),
        ("--distributed_timeout_minutes 5", "give --ddp_timeout, in seconds"),
    ],
)
def test_flags_of_swift_that_are_another_here(
    words: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = words.split()[0]
    assert f"error: {flag} is not supported: {instead}" in refusal(["sft", *words.split()], capsys)
    assert flag not in print_config(["sft"], capsys)


def test_flags_whose_engine_is_not_there_yet(capsys: pytest.CaptureFixture[str]) -> None:
    given = split_arguments(
        ["--use_dora", "true", "--quant_method", "bnb", "--fsdp", "none", "--lora_rank", "4"]
    )
    resolved = resolve(find_command(MEGATRON, "sft"), given)
    assert (resolved.stops, resolved.values) == (["--use_dora", "--quant_method"], {"lora_rank": 4})
    assert resolve(find_command("swift", "sft"), given[:2]).stops == []


def test_bare_switches_and_values_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--finetune", "--sequence_parallel", "--no_gradient_accumulation_fusion"]
    values = yaml.safe_load(print_config(["sft", *words], capsys))
    assert (values["finetune"], values["sequence_parallel"]) == (True, True)
    assert values["gradient_accumulation_fusion"] is False
    assert "--tensor_model_parallel_size must be at least 1, got 0" in refusal(
        ["sft", "--tensor_model_parallel_size", "0"], capsys
    )
    assert "--recompute_modules must be one of core_attn, " in refusal(
        ["sft", "--recompute_modules", "attention"], capsys
    )
    assert "--cp_comm_type must be one of all_gather, a2a, got a2a+p2p" in refusal(
        ["sft", "--cp_comm_type", "a2a+p2p"], capsys
    )


def seed_calls(tmp_path: Path) -> list[tuple[str, list[str]]]:
    found = []
    for path in FILES:
        (tmp_path / path.stem).mkdir()
        for call in record_calls(path.read_text(encoding="utf-8"), tmp_path / path.stem):
            if call[0] == MEGATRON or {"--to_mcore", "--to_hf"} & set(call):
                found.append((path.stem, call))
    return found


def test_every_command_of_users_has_all_its_flags(tmp_path: Path) -> None:
    """Nothing in them is `later`, and the fields have what was written, whatever it was called."""
    calls = seed_calls(tmp_path)
    assert [name for name, call in calls if call[0] == MEGATRON] == [
        "001_09", "003_12", "003_12", "003_13", "003_14", "003_17", "004_21", "004_24", "004_25",
    ]  # fmt: skip
    assert len(calls) == 16
    built = {}
    for name, call in calls:
        argv, _ = repair_arguments(call[1:])
        resolved = resolve(find_command(call[0], argv[0]), split_arguments(argv[1:]))
        assert (resolved.stops, resolved.later) == ([], {}), name
        built[name] = resolved.values
    moe = built["004_24"]
    assert (moe["pipeline_model_parallel_size"], moe["expert_model_parallel_size"]) == (2, 8)
    assert (moe["moe_aux_loss_coeff"], moe["moe_permute_fusion"], moe["moe_shared_expert_overlap"]) == (
        1e-3, True, True,
    )  # fmt: skip
    assert (moe["eval_steps"], moe["save_steps"], moe["save_only_model"]) == (200, 200, True)
    assert (moe["max_length"], moe["packing"], moe["attention_backend"]) == (8192, True, "flash")
    assert (built["001_09"]["max_steps"], built["001_09"]["eval_iters"]) == (2000, 50)
    tp = built["004_21"]
    assert (tp["mcore_model"], tp["per_device_train_batch_size"], tp["global_batch_size"]) == (
        "Qwen2.5-7B-Instruct-mcore", 16, 16,
    )  # fmt: skip
    assert (tp["learning_rate"], tp["min_lr"], tp["warmup_ratio"]) == (1e-5, 1e-6, 0.05)
    assert (tp["recompute_granularity"], tp["recompute_method"], tp["recompute_num_layers"]) == (
        "full", "uniform", 1,
    )  # fmt: skip
    assert built["004_22"] == {
        "mcore_model": "megatron_output/Qwen2.5-7B-Instruct/vx-xxx", "to_hf": True, "torch_dtype": "bfloat16",
        "output_dir": "megatron_output/Qwen2.5-7B-Instruct/vx-xxx-hf", "test_convert_precision": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to export"),
        ({"to_mcore": True, "to_hf": True}, "--to_mcore and --to_hf are 2 exports"),
        (
            {"merge_lora": True, "to_cached_dataset": True},
            "--merge_lora and --to_cached_dataset are 2 exports",
        ),
        ({"to_mcore": True}, "--to_mcore needs --model"),
        ({"to_hf": True}, "--to_hf needs --mcore_model"),
        ({"to_mcore": True, "mcore_model": "D"}, "--to_mcore starts from --model, not --mcore_model"),
        ({"to_hf": True, "mcore_model": "D", "adapters": ("A",)}, "--adapters has no effect on a conversion"),
        (
            {"merge_lora": True, "adapters": ("A",), "mcore_model": "D"},
            "--mcore_model has no effect without --to_hf",
        ),
        (
            {"merge_lora": True, "adapters": ("A",), "test_convert_precision": True},
            "--test_convert_precision has no effect without --to_hf or --to_mcore true",
        ),
        (
            {"to_hf": True, "mcore_model": "D", "test_convert_dtype": "float16"},
            "--test_convert_dtype has no effect without --test_convert_precision true",
        ),
    ],
)
def test_exports_that_make_no_sense(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExportRun(export=ExportOptions(**values)).check()
    assert caught.value.message.startswith(message)


def test_exports_that_make_sense() -> None:
    to_hf = ExportOptions(to_hf=True, mcore_model="D", test_convert_precision=True)
    for run_class in (ExportRun, MegatronExportRun):
        checked = run_class(export=to_hf)
        checked.check()
        assert checked.megatron.tensor_model_parallel_size == 1
    ExportRun(model=ModelConfig(model="m"), export=ExportOptions(to_mcore=True)).check()
    with pytest.raises(ConfigError, match="megatron export converts weights"):
        MegatronExportRun(export=ExportOptions(merge_lora=True, adapters=("A",))).check()


def test_export_in_parallel_has_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--load", "D", "--to_hf", "--mcore_adapter", "A", "--tensor_model_parallel_size", "2"]
    values = yaml.safe_load(print_config(words, capsys))
    assert (values["mcore_model"], values["mcore_adapters"], values["tensor_model_parallel_size"]) == (
        "D",
        "A",
        2,
    )
    assert "--to_cached_dataset is not supported: use swift export" in refusal(
        ["export", "--to_cached_dataset"], capsys
    )
