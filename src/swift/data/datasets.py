"""Data sets that have a name here: the ones inside the package, and those that users register.

Owns: `swift/self-cognition` with its placeholders and subsets, `swift/general`; `register_dataset` and the
files of --custom_dataset_info. Not here: files (reading.py), hubs (hub_hf.py, hub_ms.py), what the rows of a
registered data set mean (preprocessors.py).
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.config.plugins import PluginConfig
from swift.data.preprocessors import AutoPreprocessor, RowPreprocessor
from swift.data.types import Row
from swift.plugins.registry import load_plugins
from swift.utils.files import read_jsonl
from swift.utils.log import say

_SELF_COGNITION = "self_cognition.jsonl"
_EMPTY_THINK = "<think>\n\n</think>\n\n"

# Subsets of self-cognition: what follows the question, what precedes the answer.
_STYLES = {"default": ("", ""), "qwen3": (" /no_think", _EMPTY_THINK), "empty_think": ("", _EMPTY_THINK)}

PACKAGED = {
    "swift/self-cognition": (_SELF_COGNITION, tuple(_STYLES)),
    "modelscope/self-cognition": (_SELF_COGNITION, tuple(_STYLES)),
    "swift/general": ("general.jsonl", ("default",)),
}


def load_packaged(
    dataset_id: str, subsets: Sequence[str], *, model_name: Sequence[str], model_author: Sequence[str]
) -> list[Row]:
    """Rows of the named subsets, one after another; no subset means "default"."""
    asset, known = PACKAGED[dataset_id]
    names = _choose_subsets(dataset_id, known, subsets)
    with resources.as_file(resources.files("swift.data") / "assets" / asset) as path:
        rows = [Row(columns, dataset_id, number) for number, columns in enumerate(read_jsonl(path), start=1)]
    if asset != _SELF_COGNITION:
        return rows
    _check_names("--model_name", model_name, dataset_id)
    _check_names("--model_author", model_author, dataset_id)
    return [_fill(row, style, model_name, model_author) for style in names for row in rows]


def _choose_subsets(dataset: str, known: Sequence[str], asked: Sequence[str]) -> Sequence[str]:
    """Those that were asked for, or the first. Raises ConfigError."""
    names = known if tuple(asked) == ("all",) else asked or known[:1]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"dataset {dataset} has no subset {name}", hint=f"known: {', '.join(known)}, all"
            )
    return names


def _check_names(flag: str, values: Sequence[str], dataset_id: str) -> None:
    if not values or not all(values):
        raise ConfigError(
            f"{flag} is missing: dataset {dataset_id} teaches the model its name and its author",
            hint=f"give one value, or two for Chinese and English: {flag} ZH EN",
        )
    if len(values) > 2:
        raise ConfigError(f"{flag} takes one value, or two for Chinese and English, got {len(values)}")


def _fill(row: Row, style: str, model_name: Sequence[str], model_author: Sequence[str]) -> Row:
    columns, (suffix, prefix) = row.columns, _STYLES[style]
    which = 0 if columns["tag"] == "zh" else -1
    response = columns["response"].replace("{{NAME}}", model_name[which])
    response = response.replace("{{AUTHOR}}", model_author[which])
    filled = {**columns, "query": columns["query"] + suffix, "response": prefix + response}
    return Row(filled, row.file, row.line)


@dataclass(frozen=True)
class SubsetDataset:
    """A part of a data set: `name` in --dataset ID:NAME, `subset` at the hub."""

    name: str | None = None
    subset: str = "default"


@dataclass(frozen=True)
class DatasetMeta:
    """Where a data set is, and what its rows mean. Any of the first four names it in --dataset."""

    ms_dataset_id: str | None = None
    hf_dataset_id: str | None = None
    dataset_path: str | None = None
    dataset_name: str | None = None
    subsets: Sequence[str | SubsetDataset] = ("default",)
    split: Sequence[str] = ("train",)
    preprocess_func: RowPreprocessor | Callable[..., Any] = field(default_factory=AutoPreprocessor)
    tags: Sequence[str] = ()
    help: str | None = None

    @property
    def names(self) -> list[str]:
        named = (self.dataset_name, self.ms_dataset_id, self.hf_dataset_id, self.dataset_path)
        return [name for name in named if name]

    def source(self, subsets: Sequence[str], *, use_hf: bool) -> dict[str, Any]:
        """Where to read: a `path`, or `dataset_id` and `subsets` of the `hub`."""
        if self.dataset_path is not None:
            return {"path": Path(self.dataset_path).expanduser()}
        parts = [SubsetDataset(p, p) if isinstance(p, str) else p for p in self.subsets]
        known = {part.name or part.subset: part.subset for part in parts}
        wanted = _choose_subsets(self.names[0], tuple(known), subsets)
        # "default" is what hubs call the only part of a data set without parts.
        subsets = tuple(known[name] for name in wanted if known[name] != "default")
        on_hf = self.hf_dataset_id is not None and (use_hf or self.ms_dataset_id is None)
        dataset_id = self.hf_dataset_id if on_hf else self.ms_dataset_id
        return {"dataset_id": dataset_id, "subsets": subsets, "hub": "hf" if on_hf else "ms"}

    def preprocess(self, rows: Iterable[Row]) -> list[Row]:
        """The rows as the preprocessor makes them; says how many it left out."""
        given = list(rows)
        preprocessor = self.preprocess_func
        if not isinstance(preprocessor, RowPreprocessor):  # a function of one row
            preprocessor = AutoPreprocessor()
            preprocessor.preprocess = self.preprocess_func  # type: ignore[method-assign]
        kept = [row for row in map(preprocessor.apply, given) if row is not None]
        if len(kept) < len(given):
            say(f"{self.names[0]}: its preprocessor left out {len(given) - len(kept)} of {len(given)} rows")
        return kept


_REGISTERED: dict[str, DatasetMeta] = {}


def register_dataset(meta: DatasetMeta, *, exist_ok: bool = False) -> None:
    """Makes the data set known under its names. Raises ConfigError where it could not be loaded."""
    if not meta.names:
        raise ConfigError(
            "a registered dataset needs ms_dataset_id, hf_dataset_id, dataset_path or dataset_name"
        )
    if meta.names == [meta.dataset_name]:
        raise ConfigError(f"dataset {meta.dataset_name} does not say where its rows are")
    if list(meta.split) != ["train"]:
        raise ConfigError(f"dataset {meta.names[0]}: only the split train can be read, not {meta.split}")
    for name in meta.names:
        if name in _REGISTERED and not exist_ok:
            raise ConfigError(f"dataset {name} is registered already", hint="exist_ok=True replaces it")
        _REGISTERED[name] = meta


def find_registered(name: str) -> DatasetMeta | None:
    return _REGISTERED.get(name)


def use_plugins(config: PluginConfig) -> None:
    """Runs the users' files and registers their data sets; comes before anything is looked up by name.

    Paths in the files of --custom_dataset_info start at the file.
    """
    load_plugins(config.external_plugins)
    for file in config.custom_dataset_info:
        path = Path(file).expanduser()
        try:
            entries = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"--custom_dataset_info {file}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"--custom_dataset_info {file}: not valid JSON ({error})") from error
        if not isinstance(entries, list):
            raise ConfigError(f"--custom_dataset_info {file}: not a list of datasets")
        for number, entry in enumerate(entries, start=1):
            try:
                register_dataset(_read_entry(entry, path.parent), exist_ok=True)
            except ConfigError as error:
                message = f"--custom_dataset_info {file}, entry {number}: {error.message}"
                raise ConfigError(message, hint=error.hint) from error


def _read_entry(entry: Any, folder: Path) -> DatasetMeta:
    if not isinstance(entry, dict):
        raise ConfigError("not an object")
    entry = dict(entry)
    columns = entry.pop("columns", {})
    entry.pop("messages", None)  # spellings of roles and contents, which are all known anyway
    known = [field.name for field in dataclasses.fields(DatasetMeta) if field.name != "preprocess_func"]
    unknown = [name for name in entry if name not in known]
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]}", hint=f"known: {', '.join([*known, 'columns'])}")
    if "dataset_path" in entry:
        entry["dataset_path"] = str(folder / Path(entry["dataset_path"]).expanduser())
    entry["subsets"] = [_read_subset(part) for part in entry.get("subsets", ["default"])]
    return DatasetMeta(**entry, preprocess_func=AutoPreprocessor(columns=columns))


def _read_subset(part: Any) -> str | SubsetDataset:
    if isinstance(part, dict) and set(part) <= {"name", "subset"}:
        return SubsetDataset(**part)
    if not isinstance(part, str):
        raise ConfigError("a subset is a name, or an object with name and subset")
    return part
