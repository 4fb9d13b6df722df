"""Weights in few bits, chosen by what rows make of them: GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978).

Owns: the rows, and what llm-compressor is told. It writes the format of compressed-tensors, which vLLM and
transformers read. Imported by name only where it is needed: the library is an extra.
"""

from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import nn
from transformers import PreTrainedModel

from swift.config.option import ConfigError
from swift.config.runs import ExportRun
from swift.data.datasets import use_plugins
from swift.data.encode import encode_rows
from swift.data.sources import open_sets
from swift.models.adapters import load_run_args
from swift.models.load import load_model
from swift.models.prompts import open_template
from swift.models.targets import ROUTERS
from swift.utils.log import say


def write_calibrated(run: ExportRun, source: Path, staging: Path, device: torch.device) -> None:
    quant = run.quant
    is_awq = quant.quant_method == "awq"
    rows = read_rows(run, source)
    model = load_model(source, dtype=run.model.torch_dtype, attention=None, device=device)
    kept = choose_kept(model, quant.group_size)
    scheme = QuantizationArgs(
        num_bits=quant.bits,
        type="int",
        symmetric=not is_awq,
        strategy="channel" if quant.group_size == -1 else "group",
        group_size=None if quant.group_size == -1 else quant.group_size,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=scheme)}
    about = f"{len(rows)} rows, groups of {quant.group_size}, {len(kept)} layers kept as they are"
    say(f"{quant.quant_method}: {about}")
    settings = {"config_groups": groups, "ignore": kept}
    # AWQ scales channels, so that the rounding that follows costs less.
    recipe = [AWQModifier(), QuantizationModifier(**settings)] if is_awq else GPTQModifier(**settings)
    oneshot(
        model=model,
        dataset=rows,
        recipe=recipe,
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, rows["input_ids"])),
        batch_size=quant.quant_batch_size,
        tokenizer=None,
    )
    model.save_pretrained(staging, save_compressed=True, max_shard_size=run.export.max_shard_size)


def read_rows(run: ExportRun, source: Path) -> Dataset:
    """The first --quant_n_samples rows, encoded as for training."""
    use_plugins(run.plugins)
    template = open_template(source, load_run_args(source) if run.export.load_args else {})
    seed = 42 if run.data.data_seed is None else run.data.data_seed
    rows, _ = open_sets(run.data, seed=seed, **run.model.hub)
    assert rows is not None  # --dataset is checked
    longest = run.template.max_length or 2048
    wanted = [rows[i] for i in range(min(len(rows), run.quant.quant_n_samples))]
    options = {"config": run.data, "template_config": run.template, "max_length": longest}
    encoded, _ = encode_rows(wanted, template, **options, what="calibration")
    ids = [encoded[i].input_ids.tolist() for i in range(len(encoded))]
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])


def choose_kept(model: PreTrainedModel, group_size: int) -> list[str]:
    """Output layer and routers. ConfigError where groups do not fit, before any of the work."""
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = [n for n, module in linear.items() if module is head or n.rpartition(".")[2] in ROUTERS]
    for name, module in linear.items():
        if name not in kept and group_size > 0 and module.in_features % group_size:
            raise ConfigError(
                f"--group_size {group_size} does not divide the {module.in_features} inputs of {name}",
                hint="name a divisor, or -1 for one scale a row",
            )
    return kept
