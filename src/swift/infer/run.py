"""`swift infer`: which model with which settings, then a chat or a file of answers."""

import contextlib
import importlib
import io
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from swift.config.option import Clash, ConfigError, fill_defaults
from swift.config.runs import InferRun
from swift.data.datasets import use_plugins
from swift.data.sources import open_rows
from swift.engines.ranks import Ranks, join_ranks, leave_ranks
from swift.engines.transformers.forward import refusal_of_flat
from swift.engines.transformers.scorer import TextScorer
from swift.infer.batch import (
    Stats,
    answer_rows,
    leave_out_answered,
    load_questions,
    mend_last_line,
    report,
)
from swift.infer.chat import Chat
from swift.infer.engine import TransformersInferEngine
from swift.infer.scoring import score_rows
from swift.infer.vllm_engine import VllmInferEngine, load_vllm
from swift.models.adapters import TAKEN, adapter_base, load_run_args
from swift.models.heads import count_labels
from swift.models.hub import resolve_adapter, resolve_model
from swift.models.load import load_config, pick_device
from swift.rollout.vllm import check_group, check_vllm
from swift.template.loss_scale import build_weights
from swift.utils import env
from swift.utils.log import say, warn

TIMEOUT_SECONDS = 24 * 3600  # one process may have longer answers than another; a dead one ends all at once


@dataclass(frozen=True, slots=True)
class Source:
    run: InferRun  # with what the checkpoint's args.json adds
    model: Path
    adapter: Path | None
    saved: dict[str, Any]  # args.json of the checkpoint, empty without one

    @property
    def checkpoint(self) -> Path | None:
        """The directory that training wrote: of the adapters, or of the whole model."""
        return self.adapter or (self.model if self.saved else None)


def run_infer(run: InferRun) -> int:
    """Answers as `run` says; returns the exit code."""
    run.check()
    if run.infer.infer_backend == "vllm":
        check_vllm("--infer_backend vllm")
    use_plugins(run.plugins)
    build_weights(run.template.loss_scale)  # a wrong name is told before anything is downloaded
    source = find_source(run)
    run = source.run
    check_logprobs(source)
    specs, columns = dataset_specs(source)
    labels = count_labels(source.adapter or source.model)
    if labels is not None:
        return score_texts(source, labels, specs, columns)
    result_path = Path(run.infer.result_path) if run.infer.result_path else None
    if not specs:
        check_single("a chat")
        open_result_file(result_path)
        return chat(load_engine(source), run, result_path)
    if run.generation.stream:
        warn("--stream shows the answers of a chat; those of a dataset go to the result file")
    questions, rejects = load_questions(
        specs,
        run.infer,
        seed=run.data_seed,
        columns=columns,
        model_name=source.saved.get("model_name") or (),
        model_author=source.saved.get("model_author") or (),
        **run.model.hub,
    )
    ranks, device = join_ranks(
        pick_device(run.model.device), TIMEOUT_SECONDS, sequence_size=sharing_ranks(run)
    )
    result_path = ranks.share(result_path or default_result_path(source))
    stats, left, engine = Stats(), [], None
    if ranks.is_main:
        open_result_file(result_path)
        left = leave_out_answered(questions, result_path, stats)
    left = ranks.share(left)
    if left:
        engine = load_engine(source, device, ranks)
        stats.started = time.perf_counter()
        answer_rows(
            engine, [(number, questions[number]) for number in left], rejects, stats,
            options=run.infer, sampling=run.generation, result_path=result_path, ranks=ranks,
        )  # fmt: skip
    everyone = ranks.collect((stats, rejects))
    for speaker in ranks.speakers[1:]:
        stats.merge(everyone[speaker][0])
        rejects.merge(everyone[speaker][1])
    report(stats, rejects, metric=run.infer.metric, result_path=result_path)
    if isinstance(engine, VllmInferEngine):
        engine.local.close()  # before the process group that it shares
    leave_ranks()
    return 0


def sharing_ranks(run: InferRun) -> int:
    """Neighbouring processes that answer the same rows together: those among which vLLM cuts a model."""
    world = int(env.read("WORLD_SIZE", "1") or 1)
    if world == 1 or run.infer.infer_backend != "vllm":
        return 1  # of one process vLLM starts those that it needs by itself
    check_group(run.vllm, world)
    return run.vllm.vllm_tensor_parallel_size


def check_single(what: str) -> None:
    """Raises ConfigError for what more than one process cannot do."""
    if env.read("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"{what} takes one process, not {env.read('WORLD_SIZE')}",
            hint="unset NPROC_PER_NODE, or answer a dataset with --val_dataset",
        )


def score_texts(source: Source, labels: int, specs: tuple[str, ...], columns: dict[str, Any]) -> int:
    """What a reward model or a classifier says about the conversations of a dataset."""
    run = source.run
    if not specs:
        raise ConfigError(
            f"{source.adapter or run.model.model} gives scores, not answers",
            hint="name conversations to score with --val_dataset",
        )
    check_single("scoring")
    options = {"seed": run.data_seed, "shuffle": run.infer.dataset_shuffle, "columns": columns}
    rows = open_rows(specs, **options, **run.model.hub)
    chosen = list(rows)[: run.infer.val_dataset_sample]
    path = Path(run.infer.result_path) if run.infer.result_path else default_result_path(source)
    open_result_file(path)
    problem = source.saved.get("problem_type")
    scorer = TextScorer.load(
        source.model, adapter=source.adapter, num_labels=labels, problem=problem,
        model=run.model, template=run.template,
    )  # fmt: skip
    size = run.infer.max_batch_size or 8
    count = score_rows(scorer, chosen, path, batch_size=size, strict=run.infer.strict)
    say(f"{count} scores: {path}")
    return 0


def check_logprobs(source: Source) -> None:
    """Raises ConfigError where --logprobs meets a model that transformers' generate has to run."""
    run = source.run
    if not run.infer.logprobs or run.infer.infer_backend == "vllm":
        return
    config = load_config(source.model)
    refusal = refusal_of_flat(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), config)
    if run.model.attn_impl:
        refusal = f"of --attn_impl {run.model.attn_impl}"
    if refusal:
        raise ConfigError(
            f"--logprobs: transformers' generate, which has to answer because {refusal}, does not tell them",
            hint="leave --attn_impl out" if run.model.attn_impl else "--infer_backend vllm does",
        )


def find_source(run: InferRun) -> Source:
    """Local directories of model and adapters, with the flags that args.json fills in."""
    if len(run.infer.adapters) > 1:
        raise Clash(f"--adapters names {len(run.infer.adapters)} directories, one can be used at a time")
    adapter = None
    if run.infer.adapters:
        adapter = resolve_adapter(run.infer.adapters[0], **run.model.hub)
    checkpoint = adapter or Path(run.model.model or "").expanduser()
    saved = load_run_args(checkpoint) if run.infer.load_args and checkpoint.is_dir() else {}
    run = take_saved(run, saved | ({"model": adapter_base(adapter)} if adapter else {}))
    if not run.model.model:
        raise ConfigError(f"--adapters {adapter} does not name its base model", hint="name it with --model")
    model = resolve_model(run.model.model, revision=run.model.model_revision, **run.model.hub)
    return Source(run, model, adapter, saved)


def take_saved(run: InferRun, saved: dict[str, Any]) -> InferRun:
    """Fills flags that have their default value from args.json, and says which."""
    # A model named on the command line is not the one that training started from.
    names = ("torch_dtype",) if run.model.model else TAKEN["model"]
    model, from_model = fill_defaults(run.model, saved, names)
    template, from_template = fill_defaults(run.template, saved, TAKEN["template"])
    taken = from_model | from_template
    if taken:
        say("from the checkpoint: " + ", ".join(f"{name} {value!r}" for name, value in taken.items()))
    return replace(run, model=model, template=template)


def dataset_specs(source: Source) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Datasets to answer and the columns to rename; none = a chat."""
    options = source.run.infer
    if options.val_dataset or not options.load_data_args:
        return options.val_dataset, options.columns
    held_out = source.checkpoint.resolve().parent / "val_dataset.jsonl" if source.checkpoint else None
    if held_out and held_out.is_file():
        return (str(held_out),), options.columns
    if source.saved.get("val_dataset"):
        return tuple(source.saved["val_dataset"]), options.columns or source.saved.get("columns") or {}
    raise ConfigError(
        f"--load_data_args: {held_out or 'the model'} {'does not exist' if held_out else 'is no checkpoint'}",
        hint="the training run held no rows out; name some with --val_dataset",
    )


def default_result_path(source: Source) -> Path:
    """infer_result/<time>.jsonl in the checkpoint, else under result/<model name>."""
    assert source.run.model.model is not None
    home = source.checkpoint or Path("result") / Path(source.run.model.model).name
    return home / "infer_result" / f"{time.strftime('%Y%m%d-%H%M%S')}.jsonl"


def open_result_file(path: Path | None) -> None:
    """Finds out before the model loads that answers cannot be written."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:  # nothing is left behind when the model cannot be loaded
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"--result_path {path} cannot be written: {error.strerror}", hint="name another file"
        ) from error
    mend_last_line(path)


def load_engine(
    source: Source, device: torch.device | None = None, ranks: Ranks | None = None
) -> TransformersInferEngine:
    run = source.run
    if run.infer.infer_backend == "vllm":
        engine: TransformersInferEngine = load_vllm(
            source.model, source.adapter, run.model, run.template, run.vllm, ranks or Ranks()
        )
    else:
        engine = TransformersInferEngine.load(
            source.model, adapter_path=source.adapter, model=run.model, template=run.template,
            quant=run.quant, merged=run.infer.merge_lora, device=device,
        )  # fmt: skip
    adapters = f", adapters {source.adapter}" if source.adapter else ""
    dtype = str(engine.dtype).removeprefix("torch.")
    say(f"model {run.model.model}{adapters}, {dtype}, {engine.device}, {describe_system(engine)}")
    return engine


def describe_system(engine: TransformersInferEngine) -> str:
    """The system prompt in use. Templates may insert one of their own: what a prompt starts with shows it."""
    if engine.template.system is not None:
        return f"system prompt {engine.template.system!r}"
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    head = engine.template.prompt([{"role": "user", "content": mark}]).split(mark)[0]
    return f"no system prompt given, prompts start with {head!r}"


def chat(engine: TransformersInferEngine, run: InferRun, result_path: Path | None) -> int:
    """A conversation on the terminal, or with a pipe."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a stray byte or a narrow locale must not end the session
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # not on every platform
            importlib.import_module("readline")  # gives `input` arrow keys and history
    Chat(engine, run.generation, read=input, output=sys.stdout, result_path=result_path).run()
    return 0
