"""`swift export`: from flags to what is done. Today that is merging adapters and encoding rows (encode.py).

Owns: where base model, output and dtype come from, and every check that needs no model in memory.
"""

import re
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.config.runs import ExportRun
from swift.export.compare import ROUNDING
from swift.export.encode import export_encoded
from swift.export.merge import MergePlan, merge_adapter
from swift.models.adapters import adapter_base, load_run_args
from swift.models.directory import ADAPTER_CONFIG, read_json
from swift.models.hub import resolve_adapter, resolve_model
from swift.models.load import pick_device
from swift.plugins.registry import load_object

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
PREFIXES = ("", "K", "M", "G", "T")


def run_export(run: ExportRun) -> int:
    """The whole command; the exit code says whether the result is what it should be."""
    run.check()
    if run.export.converts:
        converted: int = load_object("swift.export.megatron:run_export_megatron")(run)
        return converted
    if run.export.to_cached_dataset:
        return export_encoded(run)
    return merge_adapter(plan_merge(run))


def plan_merge(run: ExportRun) -> MergePlan:
    """Resolves and checks everything; ConfigError before anything large is read."""
    if len(run.export.adapters) != 1:
        raise ConfigError("--merge_lora takes one checkpoint", hint="give --adapters one directory")
    max_shard_bytes = parse_size(run.export.max_shard_size)
    adapter = resolve_adapter(run.export.adapters[0], **run.model.hub)
    kind = read_json(adapter / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"--adapters {adapter} are of type {kind}, only LORA can be merged")
    output = choose_output(run, adapter)
    run_args = load_run_args(adapter) if run.export.load_args else {}
    base_name, base = resolve_base(run, adapter, run_args)
    if output == base:
        raise ConfigError(f"--output_dir {output} is the base model itself")
    return MergePlan(
        adapter=adapter,
        base=base,
        base_name=base_name,
        output=output,
        dtype=choose_dtype(run, base),
        device=pick_device(run.model.device or "cpu"),
        max_shard_bytes=max_shard_bytes,
        exist_ok=run.export.exist_ok,
        run_args=run_args,
    )


def resolve_base(run: ExportRun, adapter: Path, run_args: dict[str, Any]) -> tuple[str, Path]:
    """Name and directory of the model that the adapters were trained on.

    `--model` decides; otherwise the checkpoint does, with the hub and revision that its run used.
    """
    token, revision = run.model.hub_token, run.model.model_revision
    if run.model.model:
        path = resolve_model(run.model.model, use_hf=run.model.use_hf, revision=revision, token=token)
        return run.model.model, path
    recorded = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    name = adapter_base(adapter) if run.export.load_args else recorded
    if not name:
        raise ConfigError(f"--adapters {adapter} do not name their model", hint="name it with --model")
    use_hf = run.model.use_hf or bool(run_args.get("use_hf"))
    revision = revision or run_args.get("model_revision")
    try:
        return name, resolve_model(name, use_hf=use_hf, revision=revision, token=token)
    except ConfigError as error:
        hint = f"{adapter} names this model; --model names another"
        raise ConfigError(error.message, hint=hint) from error


def choose_output(run: ExportRun, adapter: Path) -> Path:
    """`--output_dir`, or the checkpoint's name with -merged."""
    named = run.export.output_dir
    output = Path(named).expanduser().resolve() if named else adapter.with_name(f"{adapter.name}-merged")
    if output == adapter:
        raise ConfigError(f"--output_dir {output} is the checkpoint itself")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output_dir {output} is a file")
    if output.is_dir() and any(output.iterdir()) and not run.export.exist_ok:
        raise ConfigError(
            f"--output_dir {output} exists and is not empty",
            hint="name another, or --exist_ok true to write into it",
        )
    return output


def choose_dtype(run: ExportRun, base: Path) -> str:
    """`--torch_dtype`, or the one that the base model was published in."""
    config = read_json(base / "config.json")
    if "quantization_config" in config:
        raise ConfigError(f"--model {base} is quantised: adapters can only be merged into plain weights")
    dtype = run.model.torch_dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
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
