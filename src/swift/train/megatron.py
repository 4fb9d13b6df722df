"""What a Megatron run settles before anything is loaded: what it goes on from, its weights, its directory.

Owns: the meaning of --mcore_model (--load) and --finetune. Not here: the layout of processes
(config/layout.py), reading the weights (engines/megatron).
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from swift.config.layout import Layout, micro_batches
from swift.config.megatron_runs import MegatronRlhfRun, MegatronSftRun
from swift.config.option import ConfigError, fill_defaults
from swift.models.adapters import TAKEN
from swift.models.directory import last_checkpoint, read_json
from swift.models.mcore import TRACKER, McoreCheckpoint, find_weights
from swift.train.saving import STATE
from swift.utils.log import say

Run = TypeVar("Run", MegatronSftRun, MegatronRlhfRun)
OUTPUT = Path("megatron_output")


def as_resumption(run: Run) -> Run:
    """The run with --finetune false spelled as --resume_from_checkpoint: there is one way to go on."""
    if run.schedule.resume_from_checkpoint or run.resumes is None:
        return run
    path = Path(run.resumes).expanduser()
    if (path / TRACKER).is_file() and not (path / STATE).is_file() and not last_checkpoint(path):
        raise ConfigError(
            f"{path} holds weights alone: --finetune false has nothing to go on from",
            hint="leave --finetune false out, which starts a new run from these weights",
        )
    schedule = replace(run.schedule, resume_from_checkpoint=str(path))
    # What the run once started from is in its args.json.
    megatron = replace(run.megatron, mcore_model=None)
    return replace(run, schedule=schedule, megatron=megatron, tuner=replace(run.tuner, adapters=()))


def settle(run: Run) -> Run:
    """Takes from the args.json of --mcore_model what the command line leaves open. After resuming.

    --mcore_model is then the directory of an iteration, or None where --model has the weights.
    """
    if run.megatron.sequence_parallel and run.megatron.tensor_model_parallel_size == 1:
        say("--sequence_parallel true has no effect without --tensor_model_parallel_size above 1")
    if run.megatron.mcore_model:
        weights = find_weights(Path(run.megatron.mcore_model))
        run = _from_directory(run, weights) if isinstance(weights, Path) else _from_mcore(run, weights)
    assert run.model.model is not None, "check_complete has run"
    output = run.output.output_dir or str(OUTPUT / Path(run.model.model).name)
    return replace(run, output=replace(run.output, output_dir=output))


def _from_directory(run: Run, path: Path) -> Run:
    if run.model.model and Path(run.model.model).expanduser().absolute() != path:
        raise ConfigError(
            f"--mcore_model {path} is a HuggingFace directory, and --model {run.model.model} is another",
            hint="leave one of them out",
        )
    say(f"{path} is a HuggingFace directory: taken as --model")
    model, megatron = replace(run.model, model=str(path)), replace(run.megatron, mcore_model=None)
    return replace(run, model=model, megatron=megatron)


def _check_same_model(given: str, weights: McoreCheckpoint) -> None:
    """Raises ConfigError where --model is a directory with another model than the weights are of."""
    theirs = Path(given).expanduser() / "config.json"
    if weights.config_directory is None or not theirs.is_file():
        return
    ours, other = read_json(weights.config_directory / "config.json"), read_json(theirs)
    for name in ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        if ours.get(name) != other.get(name):
            raise ConfigError(
                f"--mcore_model {weights.directory} is of another model than --model {given}: its {name} is "
                f"{ours.get(name)}, not {other.get(name)}",
                hint="leave --model out",
            )


def _from_mcore(run: Run, weights: McoreCheckpoint) -> Run:
    if run.model.model:
        _check_same_model(run.model.model, weights)
    saved = weights.args | {"model": weights.model}
    names = ("torch_dtype",) if run.model.model else TAKEN["model"]
    model, from_model = fill_defaults(run.model, saved, names)
    template, from_template = fill_defaults(run.template, saved, TAKEN["template"])
    taken = ", ".join(f"{name} {value!r}" for name, value in (from_model | from_template).items())
    say(f"weights of {weights.weights}" + (f"; from its args.json: {taken}" if taken else ""))
    megatron = replace(run.megatron, mcore_model=str(weights.weights))
    return replace(run, model=model, template=template, megatron=megatron)


def with_accumulation(run: Run, layout: Layout) -> Run:
    """The run with the micro-batches of a step that --global_batch_size means on `layout`."""
    count = micro_batches(
        layout,
        global_batch_size=run.megatron.global_batch_size,
        micro_batch_size=run.schedule.per_device_train_batch_size,
    )
    return replace(run, schedule=replace(run.schedule, gradient_accumulation_steps=count))
