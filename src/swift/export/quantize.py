"""`swift export --quant_method METHOD`: weights in few bits, in files that transformers and vLLM read.

Owns: what is written beside the weights, and whether the result still says what its source says.
Not here: fp8 (fp8.py), what looks at rows (calibrate.py), flags (run.py).
"""

import gc
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from swift import __version__
from swift.config.option import ConfigError
from swift.config.quant import QuantConfig
from swift.config.runs import ExportRun
from swift.export.chat import carry_template
from swift.export.compare import compare_logits, compute_logits, cut_answers, render_texts
from swift.export.fp8 import write_fp8
from swift.export.merge import CONFIG, GENERATION_CONFIG, TOKENIZER_PARTS, place
from swift.models.adapters import RUN_ARGS, load_run_args
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
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise ConfigError(f"--output_dir {output} cannot be written: {error}") from error
    with work as directory:
        staging = Path(directory) / "model"
        staging.mkdir()
        write_texts(run, source, staging, output)
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
        for file in staging.iterdir():
            file.chmod(0o644)
        place(staging, output, exist_ok=run.export.exist_ok)
    before, after = (sum(file.stat().st_size for file in path.iterdir()) for path in (source, output))
    say(f"wrote {output} ({after / 1e6:,.0f} MB, {after / before:.0%} of {source.name})")
    return 0


def say_logits(path: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> list[Tensor]:
    """What the files give as anyone loads them, with transformers alone; computed in float32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else "auto"
    if not env.is_on("SWIFT_DEBUG"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for each product
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device}).eval()
    return compute_logits(model, tokenizer, render_texts(tokenizer))


def write_bnb(run: ExportRun, source: Path, staging: Path, device: torch.device) -> None:
    quant = QuantConfig(quant_method="bnb", quant_bits=run.quant.bits)
    published = str(load_config(source).dtype or torch.float32).removeprefix("torch.")
    model = load_model(
        source, dtype=run.model.torch_dtype or published, attention=None, device=device, quant=quant
    )
    model.save_pretrained(staging, max_shard_size=run.export.max_shard_size)


def write_texts(run: ExportRun, source: Path, staging: Path, output: Path) -> None:
    """Tokenizer, chat template and args.json."""
    for pattern in (*TOKENIZER_PARTS, GENERATION_CONFIG):
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, staging / file.name)
    run_args = load_run_args(source) if run.export.load_args else {}
    run_args = carry_template(staging, run_args)
    own: dict[str, Any] = {"model": str(output), "adapters": [], "command": "export", "model_revision": None}
    origin = {"base_model": run_args.get("base_model") or run.model.model or str(source)}
    write_json(
        staging / RUN_ARGS, run_args | own | origin | {"swift_version": __version__, "torch_dtype": None}
    )
