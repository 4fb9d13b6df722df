"""`swift export`: from flags to what is done.

Owns: where base model, output and dtype come from, what follows what, and every check that needs no model in
memory.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.config.runs import ExportRun
from swift.export.compare import ROUNDING
from swift.export.encode import export_encoded
from swift.export.merge import MergePlan, merge_adapter
from swift.export.ollama import write_modelfile
from swift.export.staging import CONFIG, TOKENIZER_PARTS, copy_texts
from swift.models.adapters import RUN_ARGS, adapter_base, load_run_args
from swift.models.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from swift.models.hub import resolve_adapter, resolve_model
from swift.models.load import pick_device
from swift.models.push import check_destination, push
from swift.plugins.registry import load_object
from swift.utils.log import say

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
PREFIXES = ("", "K", "M", "G", "T")


def run_export(run: ExportRun) -> int:
    """The whole command; the exit code says whether the result is what it should be."""
    run.check()
    options = run.export
    if options.converts:
        converted: int = load_object("swift.export.megatron:run_export_megatron")(run)
        return converted
    if options.to_cached_dataset:
        return export_encoded(run)
    destination = check_destination(run.publish, run.model) if run.publish.push_to_hub else None
    plan = plan_merge(run) if options.merge_lora else None
    source = plan.output if plan else find_source(run)
    suffix = choose_suffix(run)
    output = claim_output(run, source, suffix) if suffix else source
    if plan and merge_adapter(plan):
        return 1
    if options.to_ollama:
        write_modelfile(source, output, load_run_args(source) if options.load_args else {})
    elif options.to_peft_format:
        copy_adapter(source, output)
    elif run.quant.quant_method:
        code: int = load_object("swift.export.quantize:quantize")(run, source, output)
        if code:
            return code
    if destination:
        run_args = load_run_args(output) if options.load_args else {}
        push(output, replace(destination, message=run.publish.commit_message), run_args)
    return 0


def find_source(run: ExportRun) -> Path:
    """The directory that is exported as it is: of a whole model, or of adapters."""
    if run.export.adapters and not run.model.model:
        return resolve_adapter(only_adapter(run), revision=run.model.model_revision, **run.model.hub)
    return resolve_model(run.model.model or "", revision=run.model.model_revision, **run.model.hub)


def choose_suffix(run: ExportRun) -> str:
    """What the name of the result ends with; none = the source is the result."""
    if run.export.to_ollama:
        return "-ollama"
    if run.export.to_peft_format:
        return "-peft"
    return run.quant.suffix if run.quant.quant_method else ""


def copy_adapter(source: Path, output: Path) -> None:
    """The files that PEFT reads, with the tokenizer and args.json."""
    output.mkdir(parents=True, exist_ok=True)
    copy_texts(source, output, (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, RUN_ARGS, *TOKENIZER_PARTS))
    say(f"adapters are in the format of PEFT as they are; copied to {output}")


def plan_merge(run: ExportRun) -> MergePlan:
    """Resolves and checks everything; ConfigError before anything large is read."""
    max_shard_bytes = parse_size(run.export.max_shard_size)
    adapter = resolve_adapter(only_adapter(run), **run.model.hub)
    kind = read_json(adapter / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"--adapters {adapter} are of type {kind}, only LORA can be merged")
    output = claim_output(run, adapter, "-merged", own_name=not choose_suffix(run))
    run_args = load_run_args(adapter) if run.export.load_args else {}
    base_name, base = resolve_base(run, adapter, run_args)
    config = read_json(base / CONFIG)
    if "quantization_config" in config:
        raise ConfigError(f"--model {base} is quantised: adapters can only be merged into plain weights")
    if output == base:
        raise ConfigError(f"--output_dir {output} is the base model itself")
    return MergePlan(
        adapter=adapter,
        base=base,
        base_name=base_name,
        output=output,
        dtype=choose_dtype(run.model.torch_dtype, config),
        device=pick_device(run.model.device or "cpu"),
        max_shard_bytes=max_shard_bytes,
        exist_ok=run.export.exist_ok,
        run_args=run_args,
    )


def resolve_base(run: ExportRun, adapter: Path, run_args: dict[str, Any]) -> tuple[str, Path]:
    """Name and directory of the model that the adapters were trained on.

    `--model` decides; otherwise the checkpoint does, with the hub and revision that its run used.
    """
    if run.model.model:
        return run.model.model, find_source(run)
    recorded = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    name = adapter_base(adapter) if run.export.load_args else recorded
    if not name:
        raise ConfigError(f"--adapters {adapter} do not name their model", hint="name it with --model")
    hub = {**run.model.hub, "use_hf": run.model.use_hf or bool(run_args.get("use_hf"))}
    revision = run.model.model_revision or run_args.get("model_revision")
    try:
        return name, resolve_model(name, revision=revision, **hub)
    except ConfigError as error:
        hint = f"{adapter} names this model; --model names another"
        raise ConfigError(error.message, hint=hint) from error


def only_adapter(run: ExportRun) -> str:
    if len(run.export.adapters) != 1:
        what = "--merge_lora takes" if run.export.merge_lora else "an export of adapters takes"
        raise ConfigError(f"{what} one checkpoint", hint="give --adapters one directory")
    return run.export.adapters[0]


def claim_output(run: ExportRun, source: Path, suffix: str, *, own_name: bool = True) -> Path:
    """`--output_dir`, or the source's name with a suffix: beside it, and in this directory for a hub's model.

    `own_name`: whether --output_dir names this result, or one that is made from it.
    """
    options, named = run.export, run.export.output_dir if own_name else None
    asked = run.model.model if not options.adapters else None
    is_local = asked is None or Path(asked).expanduser().is_dir()
    beside = (
        source.with_name(f"{source.name}{suffix}") if is_local else Path(f"{Path(asked or '').name}{suffix}")
    )
    return check_output(Path(named) if named else beside, source, exist_ok=options.exist_ok)


def check_output(output: Path, source: Path, *, exist_ok: bool) -> Path:
    """The absolute path of a directory that may be written; ConfigError where something is there."""
    output = output.expanduser().resolve()
    if output == source:
        raise ConfigError(f"--output_dir {output} is the source itself")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not exist_ok:
        raise ConfigError(
            f"--output_dir {output} exists and is not empty",
            hint="name another, or --exist_ok true to write into it",
        )
    return output


def choose_dtype(asked: str | None, config: dict[str, Any]) -> str:
    """`--torch_dtype`, or the one that a model was published in, as its config.json says."""
    dtype = asked or config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in ROUNDING:
        raise ConfigError(f"--torch_dtype {dtype} cannot be written", hint=f"one of {', '.join(ROUNDING)}")
    return dtype


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` -> bytes; units are decimal without the i."""
    found = SIZE.fullmatch(text.strip())
    size = 0
    if found:
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** PREFIXES.index(prefix.upper()))
    if size <= 0:
        raise ConfigError(f"--max_shard_size {text} is not a size", hint="for example 5GB or 500MB")
    return size
