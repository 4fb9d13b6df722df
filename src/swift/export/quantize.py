"""`swift export --quant_method METHOD`: weights in few bits, in files that transformers and vLLM read.

Owns: what is written beside the weights, and whether the result still says what its source says.
Not here: fp8 (fp8.py), what looks at rows (calibrate.py), flags (run.py).
"""

import gc
import logging
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.config.quant import BnbOptions, QuantConfig
from swift.config.runs import ExportRun
from swift.export.compare import compare_logits, compute_logits, cut_answers, render_texts
from swift.export.fp8 import write_fp8
from swift.export.staging import CONFIG, place, staging_beside, total_bytes, write_texts
from swift.models.adapters import load_run_args
from swift.models.directory import read_json
from swift.models.load import load_config, load_model, load_tokenizer, pick_device
from swift.plugins.registry import load_object
from swift.utils import env
from swift.utils.files import write_json
from swift.utils.log import say

# How far the next-token distributions of answers may move: mean divergence in nats, by bits. Two to three
# times what was seen (0.03, 0.4) with the built-in model, whose 135M parameters suffer more than larger ones.
ALLOWED = {8: 0.1, 4: 1.0}


def quantize(run: ExportRun, source: Path, output: Path) -> int:
    """Writes beside the output, compares with the source, and only then gives the directory its name."""
    method, bits = run.quant.quant_method, run.quant.bits
    if "quantization_config" in read_json(source / CONFIG):
        raise ConfigError(f"--model {source} is quantised already", hint="start from the plain weights")
    device = pick_device(run.model.device)
    if method == "awq" and device.type == "cpu":
        raise ConfigError("--quant_method awq needs a GPU: its library does", hint="gptq does not")
    with staging_beside(output) as staging:
        run_args = load_run_args(source) if run.export.load_args else {}
        origin = run_args.get("base_model") or run.model.model or str(source)
        write_texts(source, staging, output, run_args, base_model=origin, torch_dtype=None)
        tokenizer = load_tokenizer(source)
        expected = say_logits(source, tokenizer, device)
        if method == "fp8":
            config = read_json(source / CONFIG)
            write_json(staging / CONFIG, config | {"quantization_config": write_fp8(source, staging)})
        elif method == "bnb":
            write_bnb(run, source, staging, device)
        else:
            load_object("swift.export.calibrate:write_calibrated")(run, source, staging, device)
        gc.collect()
        written = say_logits(staging, tokenizer, device)
        found = compare_logits(cut_answers(tokenizer, expected), cut_answers(tokenizer, written))
        good = found.divergence <= ALLOWED[bits]  # False for NaN too
        say(
            f"{method}, {bits} bits: {found.describe_divergence(ALLOWED[bits])}: {'PASS' if good else 'FAIL'}"
        )
        if not good:
            say(f"error: {output} was not written: it is too far from {source}", style="red")
            return 1
        about = f"{total_bytes(staging) / total_bytes(source):.0%} of {source.name}"
        place(staging, output, exist_ok=run.export.exist_ok, about=about)
    return 0


def say_logits(path: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> list[Tensor]:
    """What the files give as anyone loads them, with transformers alone; computed in float32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else "auto"
    if not env.is_on("SWIFT_DEBUG"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each product
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device}).eval()
    return compute_logits(model, tokenizer, render_texts(tokenizer))


def write_bnb(run: ExportRun, source: Path, staging: Path, device: torch.device) -> None:
    chosen = {field.name: getattr(run.quant, field.name) for field in fields(BnbOptions)}
    quant = QuantConfig(quant_method="bnb", quant_bits=run.quant.bits, **chosen)
    published = str(load_config(source).dtype or torch.float32).removeprefix("torch.")
    model = load_model(
        source, dtype=run.model.torch_dtype or published, attention=None, device=device, quant=quant
    )
    model.save_pretrained(staging, max_shard_size=run.export.max_shard_size)
