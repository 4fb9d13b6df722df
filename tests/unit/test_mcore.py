"""--load: which directory counts, what its args.json adds, and one line for each that is not whole."""

import dataclasses
import json
from pathlib import Path

import pytest

from swift.config.layout import Layout
from swift.config.megatron_runs import MegatronRlhfRun, MegatronSftRun
from swift.config.option import ConfigError, build, flatten
from swift.models.mcore import McoreCheckpoint, find_mcore, find_weights
from swift.train.megatron import as_resumption, settle, with_accumulation
from swift.train.resume import load_resumption
from swift.train.saving import ARGS, STATE, write_manifest
from swift.train.state import TrainState
from swift.utils.files import write_json


def write_mcore(directory: Path, iteration: int = 1, **args: object) -> Path:
    """What is beside the weights of a converted directory."""
    weights = directory / f"iter_{iteration:07d}"
    weights.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "common.pt"):
        (weights / name).write_bytes(b"12345678")
    files = {name: {"bytes": 8, "sha256": "-"} for name in (".metadata", "__0_0.distcp", "common.pt")}
    (weights / "manifest.json").write_text(json.dumps({"files": files}))
    (directory / "args.json").write_text(json.dumps({"model": "org/Model-1B", **args}))
    (directory / "config.json").write_text("{}")
    (directory / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return directory


def sft_run(**values: object) -> MegatronSftRun:
    return build(MegatronSftRun, {"dataset": ("data.jsonl",), **values})


def refusal(path: Path) -> tuple[str, str | None]:
    with pytest.raises(ConfigError) as caught:
        find_mcore(path)
    assert "\n" not in caught.value.message
    said = (caught.value.message, caught.value.hint)
    return tuple(text and text.replace(str(path), "D") for text in said)


def test_the_iteration_that_counts(tmp_path: Path) -> None:
    directory = write_mcore(tmp_path / "m", 100)
    (write_mcore(tmp_path / "other", 200) / "iter_0000200").rename(directory / "iter_0000200")
    found = find_mcore(directory)
    assert (found.weights, found.iteration) == (directory / "iter_0000100", 100)
    assert (found.model, found.config_directory) == ("org/Model-1B", directory)
    assert find_mcore(directory / "iter_0000200").iteration == 200
    run = tmp_path / "v0-20260101-000000"
    for step in (9, 10):
        write_mcore(run / f"checkpoint-{step}", step)
    assert find_mcore(run).directory == run / "checkpoint-10"


def test_what_is_not_whole_is_said_in_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none")[0] == "--mcore_model D: no such directory"
    empty = tmp_path / "empty"
    (empty / "v0-20260101-000000").mkdir(parents=True)
    assert refusal(empty) == (
        "--mcore_model D has no latest_checkpointed_iteration.txt",
        "a run inside it: D/v0-20260101-000000",
    )
    directory = write_mcore(tmp_path / "m", 100)
    tracker = directory / "latest_checkpointed_iteration.txt"
    tracker.write_text("200")
    assert refusal(directory) == (
        "--mcore_model D has no iter_0000200, which its latest_checkpointed_iteration.txt names",
        "it has iter_0000100",
    )
    (directory / "adapter_config.json").write_text("{}")
    tracker.write_text("100")
    assert refusal(directory) == (
        "--mcore_model D holds adapters alone",
        "--model MODEL --adapters D trains them on",
    )
    (directory / "adapter_config.json").unlink()
    tracker.write_text("ten")
    assert refusal(directory)[0] == (
        "D/latest_checkpointed_iteration.txt holds 'ten' instead of the number of an iteration"
    )
    tracker.unlink()
    assert refusal(directory) == (
        "--mcore_model D has no latest_checkpointed_iteration.txt",
        "it was not written to the end; --mcore_model D/iter_0000100 takes that one",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".metadata", "--mcore_model D/iter_0000001 has no .metadata: it was not written to the end"),
        ("__0_0.distcp", "--mcore_model D/iter_0000001: __0_0.distcp is missing"),
    ],
)
def test_a_file_that_is_missing(name: str, message: str, tmp_path: Path) -> None:
    directory = write_mcore(tmp_path / "m")
    (directory / "iter_0000001" / name).unlink()
    assert refusal(directory) == (message, "convert or copy it again")


def test_a_file_that_was_cut_off_and_a_model_without_a_name(tmp_path: Path) -> None:
    directory = write_mcore(tmp_path / "m")
    (directory / "iter_0000001" / "common.pt").write_bytes(b"1234")
    assert refusal(directory)[0] == "--mcore_model D/iter_0000001: common.pt has 4 bytes instead of 8"
    (directory / "iter_0000001" / "common.pt").write_bytes(b"12345678")
    (directory / "args.json").unlink()
    assert find_mcore(directory).model == str(directory)
    (directory / "config.json").unlink()
    assert (
        refusal(directory)[0]
        == "--mcore_model D has neither args.json nor config.json to say which model it is"
    )


def test_a_huggingface_directory_is_found_too(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert find_weights(tiny_llama_dir) == tiny_llama_dir
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-5").symlink_to(tiny_llama_dir)
    assert find_weights(run) == run / "checkpoint-5"
    assert isinstance(find_weights(write_mcore(tmp_path / "m")), McoreCheckpoint)


def test_args_fill_what_the_command_line_leaves_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_mcore(tmp_path / "m", system="Be brief.", torch_dtype="bfloat16", max_length=7)
    run = settle(sft_run(mcore_model=str(directory)))
    assert (run.model.model, run.model.torch_dtype, run.template.system) == (
        "org/Model-1B",
        "bfloat16",
        "Be brief.",
    )
    assert run.template.max_length is None  # lengths belong to the training that was
    assert run.output.output_dir == "megatron_output/Model-1B"
    assert run.megatron.mcore_model == str(directory / "iter_0000001")
    assert "from its args.json: model 'org/Model-1B', torch_dtype 'bfloat16'" in capsys.readouterr().err
    run = settle(sft_run(mcore_model=str(directory), model="other", system="Mine.", output_dir="out"))
    assert (run.model.model, run.template.system, run.output.output_dir) == ("other", "Mine.", "out")


def test_load_of_a_huggingface_directory_is_model(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settle(sft_run(mcore_model=str(tiny_llama_dir)))
    assert (run.model.model, run.megatron.mcore_model) == (str(tiny_llama_dir), None)
    assert f"{tiny_llama_dir} is a HuggingFace directory: taken as --model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is a HuggingFace directory, and --model other is another"):
        settle(sft_run(mcore_model=str(tiny_llama_dir), model="other"))


def test_sequence_parallel_alone_is_said_to_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    settle(sft_run(model="m", sequence_parallel=True))
    assert "--sequence_parallel true has no effect without" in capsys.readouterr().err
    settle(sft_run(model="m", sequence_parallel=True, tensor_model_parallel_size=2))
    assert capsys.readouterr().err == ""


def test_finetune_false_goes_on(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    write_mcore(run_directory / "checkpoint-10", 10)
    run = sft_run(mcore_model=str(run_directory), finetune=False)
    assert run.resumes == str(run_directory)
    run.check()  # what is missing comes from the checkpoint
    resumed = as_resumption(run)
    assert resumed.schedule.resume_from_checkpoint == str(run_directory)
    assert resumed.megatron.mcore_model is None
    with_adapters = sft_run(mcore_model="base", adapters=("lora",), finetune=False, train_type="lora")
    assert with_adapters.resumes == "lora" and as_resumption(with_adapters).tuner.adapters == ()
    fresh = sft_run(mcore_model=str(run_directory))
    assert fresh.resumes is None and as_resumption(fresh) == fresh
    both = sft_run(resume_from_checkpoint="there", mcore_model="m", finetune=False)
    assert both.resumes == "there" and as_resumption(both) == both


def test_a_resumed_run_has_the_flags_it_began_with(tmp_path: Path) -> None:
    began = sft_run(model="m", train_type="lora", global_batch_size=8, min_lr=1e-6, save_steps=7)
    checkpoint = tmp_path / "run" / "checkpoint-10"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / ARGS, flatten(began))
    write_json(
        checkpoint / STATE, {"state": dataclasses.asdict(TrainState(step=10)), "data": {}, "resumable": True}
    )
    write_manifest(checkpoint)
    goes_on = {"mcore_model": str(tmp_path / "run"), "finetune": False, "dataset": ()}
    resumed, resumption = load_resumption(as_resumption(sft_run(**goes_on)))
    assert resumption is not None and resumption.state.step == 10
    assert (resumed.tuner.train_type, resumed.megatron.global_batch_size, resumed.optim.min_lr) == (
        "lora", 8, 1e-6,
    )  # fmt: skip
    assert (resumed.schedule.save_steps, resumed.model.model, resumed.data.dataset) == (
        7,
        "m",
        ("data.jsonl",),
    )
    with pytest.raises(ConfigError, match="--global_batch_size 32 differs from the checkpoint's 8"):
        load_resumption(as_resumption(sft_run(**goes_on, global_batch_size=32)))


def test_finetune_false_with_nothing_to_go_on_from(tmp_path: Path) -> None:
    directory = write_mcore(tmp_path / "m")
    with pytest.raises(
        ConfigError, match="m holds weights alone: --finetune false has nothing to go on from"
    ):
        as_resumption(sft_run(mcore_model=str(directory), finetune=False))
    with pytest.raises(ConfigError, match="--finetune false goes on with a run, and none is named"):
        sft_run(model="m", finetune=False).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--model is missing"),
        (
            {"model": "m", "recompute_granularity": "full"},
            "--recompute_granularity full needs --recompute_method",
        ),
        (
            {"model": "m", "recompute_method": "uniform"},
            "--recompute_method has no effect with --recompute_granularity selective",
        ),
        ({"model": "m", "overlap_param_gather": True}, "--overlap_param_gather true needs"),
        (
            {"model": "m", "moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "allgather"},
            "--moe_shared_expert_overlap true needs --moe_token_dispatcher_type alltoall",
        ),
        ({"model": "m", "project": "p"}, "--project p has no tracker to be a project of"),
    ],
)
def test_flags_that_contradict_each_other(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sft_run(**values).check()
    assert caught.value.message.startswith(message)


def test_conversations_need_a_rank_for_each_row() -> None:
    values = {"model": "m", "dataset": ("d",), "rlhf_type": "grpo", "reward_funcs": ("format",)}
    build(MegatronRlhfRun, values).check()
    turns = {"multi_turn_scheduler": "math_tip_trick", "max_turns": 2, "pipeline_model_parallel_size": 2}
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size does not go with conversations"):
        build(MegatronRlhfRun, values | turns).check()
    build(MegatronRlhfRun, {"mcore_model": "m", "dataset": ("d",), "rlhf_type": "kto"}).check()


def test_accumulation_follows_from_the_global_batch() -> None:
    run = sft_run(model="m", per_device_train_batch_size=2, global_batch_size=32)
    assert with_accumulation(run, Layout(world=8, tensor=2)).schedule.gradient_accumulation_steps == 4
    assert run.schedule.gradient_accumulation_steps is None
