"""Folds LoRA adapters into the weights and writes a model directory that needs nothing of ours.

Owns: the files of the merged directory and the proof that it gives the adapters' logits. The merge is done in
float32, with one float32 copy of the model in memory at a time.
Not here: what is asked for (run.py), the comparison (compare.py).
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from swift.export.compare import ROUNDING, compare_logits, compute_logits, render_texts
from swift.export.staging import CONFIG, GENERATION_CONFIG, copy_texts, place, staging_beside, write_texts
from swift.models.adapters import load_adapter, merge
from swift.models.directory import read_json
from swift.models.heads import count_labels, load_scoring_model
from swift.models.load import load_model, load_tokenizer
from swift.utils.files import write_json
from swift.utils.log import say, warn

HEAD_FIELDS = ("architectures", "id2label", "label2id", "pad_token_id", "problem_type")


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What is merged, and where it goes; all paths exist except `output`."""

    adapter: Path
    base: Path
    base_name: str  # as the user or the checkpoint named it
    output: Path
    dtype: str  # of the written weights
    device: torch.device
    max_shard_bytes: int
    exist_ok: bool
    run_args: dict[str, Any]  # args.json of the training run


@dataclass(frozen=True, slots=True)
class Reference:
    """What the files of the merged model have to reproduce."""

    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    logits: list[torch.Tensor]  # of the merged weights as they are written, computed in float32


def merge_adapter(plan: MergePlan) -> int:
    """Merges, writes beside the output, checks, and only then gives the directory its name. Exit code."""
    with staging_beside(plan.output) as staging:
        say(f"merging {plan.adapter} into {plan.base_name} ({plan.device}, float32; kept as {plan.dtype})")
        reference = write_merged(plan, staging)
        if reference is None or not check_written(plan, staging, reference):
            say(
                f"error: the merged model is not equal to base and adapters; {plan.output} was not written",
                style="red",
            )
            return 1
        place(staging, plan.output, exist_ok=plan.exist_ok, about=plan.dtype)
    return 0


def write_merged(plan: MergePlan, staging: Path) -> Reference | None:
    """All files of the merged model; None when the merge itself changed the logits."""
    tokenizer_source = choose_tokenizer_source(plan)
    tokenizer = load_tokenizer(tokenizer_source)
    # The base was trained in one dtype; the merged weights have their own.
    own = {"torch_dtype": plan.dtype} if plan.run_args.get("torch_dtype") else {}
    origin = {"base_model": plan.base_name, "merged_adapters": str(plan.adapter)}
    write_texts(tokenizer_source, staging, plan.output, plan.run_args, **origin, **own)
    labels = count_labels(plan.adapter)
    loading = {"dtype": "float32", "attention": None, "device": plan.device}
    if labels is None:
        base = load_model(plan.base, **loading)
    else:
        base = load_scoring_model(plan.base, tokenizer, num_labels=labels, seed=0, **loading)
    model = load_adapter(base, plan.adapter, trainable=False)
    texts = render_texts(tokenizer)
    logits = compute_logits(model, tokenizer, texts)
    with model.disable_adapter():
        effect = compare_logits(logits, compute_logits(model, tokenizer, texts))
    say(f"adapters change logits by {effect.mean:.2e} on average, {effect.largest:.2e} at most")
    if effect.largest == 0:
        warn(f"--adapters {plan.adapter} change nothing: were they trained?")
    merged = merge(model)
    exact = compare_logits(logits, compute_logits(merged, tokenizer, texts))
    if not exact.equal:
        say(f"merged in float32: {exact.describe_difference()}: FAIL")
        return None
    save(plan, merged, staging)
    cast_parameters(merged, torch.float32)
    written = compute_logits(merged, tokenizer, texts)
    rounded = compare_logits(logits, written)
    say(f"rounded to {plan.dtype}: {rounded.describe_divergence(ROUNDING[plan.dtype])}")
    if not rounded.close(plan.dtype):
        say(
            f"error: {plan.dtype} is too coarse for these weights; --torch_dtype float32 keeps them",
            style="red",
        )
        return None
    if rounded.divergence > effect.divergence > 0:
        warn(f"rounding to {plan.dtype} changes more than the adapters do; --torch_dtype float32 keeps them")
    return Reference(tokenizer, texts, written)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts what files hold, in place. `model.to` would also round rotary frequencies, which are in none."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save(plan: MergePlan, merged: PreTrainedModel, staging: Path) -> None:
    """Weights in the written dtype, with the base model's own config files beside them.

    The base's config.json and generation_config.json stay as published, since a newer transformers writes
    fields that older readers of the merged model would not know.
    """
    cast_parameters(merged, getattr(torch, plan.dtype))
    merged.save_pretrained(staging, max_shard_size=plan.max_shard_bytes)
    config = read_json(plan.base / CONFIG)
    names = [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]
    own: dict[str, Any] = dict.fromkeys(names, plan.dtype)
    if count_labels(plan.adapter):
        written = read_json(staging / CONFIG)
        own |= {name: written.get(name) for name in HEAD_FIELDS}
    write_json(staging / CONFIG, config | own)
    copy_texts(plan.base, staging, (GENERATION_CONFIG,))


def choose_tokenizer_source(plan: MergePlan) -> Path:
    """The directory whose tokenizer files are copied: the base's, unless training changed the tokenizer.

    Checkpoints hold a tokenizer that this version of transformers saved anew; the published files are read by
    more programs and are preferred while both say the same.
    """
    if not (plan.adapter / "tokenizer_config.json").is_file():
        return plan.base
    base, trained = load_tokenizer(plan.base), load_tokenizer(plan.adapter)
    same = base.chat_template == trained.chat_template and len(base) == len(trained)
    return plan.base if same else plan.adapter


def check_written(plan: MergePlan, staging: Path, reference: Reference) -> bool:
    """Loads the files as anyone would, with transformers alone: they must give what was merged."""
    gc.collect()  # the merged model, before another one takes as much memory
    has_head = count_labels(staging) is not None
    auto_class = AutoModelForSequenceClassification if has_head else AutoModelForCausalLM
    model = auto_class.from_pretrained(staging, dtype=torch.float32).to(plan.device).eval()
    found = compare_logits(reference.logits, compute_logits(model, reference.tokenizer, reference.texts))
    say(f"reloaded from disk: {found.describe_difference()}: {'PASS' if found.equal else 'FAIL'}")
    return found.equal
