"""Which rows a run uses.

Owns: the syntax of --dataset, taking N rows, renaming columns, the split into training and evaluation rows.
Not here: reading files (reading.py), named data sets (datasets.py), what a row means (formats.py).
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swift.config.option import ConfigError
from swift.data.datasets import is_packaged, load_packaged
from swift.data.reading import import_extra, read_path
from swift.data.types import Row
from swift.utils import env


@dataclass(frozen=True, slots=True)
class Spec:
    """One value of --dataset: `[hf::|ms::]ID-OR-PATH[:SUBSET[/SUBSET]][#N]`, taken apart."""

    path: Path | None  # a file or folder that exists
    hub: str | None  # "hf" or "ms" where it was written
    dataset_id: str
    subsets: tuple[str, ...]
    count: int | None


def parse_spec(spec: str) -> Spec:
    """An existing path comes first, with and without #N, so that paths may contain ":" and "#"."""
    whole = Path(spec).expanduser()
    if whole.exists():
        return Spec(whole, None, spec, (), None)
    name, mark, digits = spec.rpartition("#")
    if not (mark and digits.isdecimal()):
        name, digits = spec, ""
    count = int(digits) if digits else None
    if count == 0:
        raise ConfigError(f"dataset {spec}: #0 takes no rows")
    path = Path(name).expanduser()
    if path.exists():
        return Spec(path, None, name, (), count)
    hub = name[:2] if name.startswith(("hf::", "ms::")) else None
    dataset_id, _, subsets = (name[4:] if hub else name).partition(":")
    return Spec(None, hub, dataset_id, tuple(part for part in subsets.split("/") if part), count)


def load_rows(
    specs: Sequence[str],
    *,
    seed: int,
    shuffle: bool,
    columns: dict[str, Any],
    model_name: Sequence[str] = (),
    model_author: Sequence[str] = (),
    use_hf: bool = False,
    token: str | None = None,
) -> list[Row]:
    """The rows of all specs, one after another. Raises ConfigError that names the file and line.

    `shuffle` says whether #N takes a random share or the first rows. Every spec draws with the same seed, so
    that naming another one beside it changes nothing about its rows.
    """
    rows: list[Row] = []
    for text in specs:
        spec = parse_spec(text)
        if spec.path is not None:
            found = read_path(spec.path)
        elif spec.hub is None and is_packaged(spec.dataset_id):
            found = load_packaged(
                spec.dataset_id, spec.subsets, model_name=model_name, model_author=model_author
            )
        else:
            found = _load_from_hub(text, spec, use_hf=use_hf, token=token)
        if spec.count is not None:
            found = [found[i] for i in sample_indices(len(found), spec.count, seed=seed, shuffle=shuffle)]
        rows += found
    return _rename(rows, columns) if columns else rows


def sample_indices(length: int, count: int, *, seed: int, shuffle: bool) -> list[int]:
    """Which rows #count takes: the whole set as often as it fits, in order, then a share of it.

    RandomState is frozen by NumPy's compatibility policy: its numbers never change between versions.
    """
    order = np.random.RandomState(seed).permutation(length).tolist() if shuffle else list(range(length))
    if count <= length:
        return order[:count]
    rounds, rest = divmod(count, length)
    return list(range(length)) * rounds + order[:rest]


def split_rows(rows: Sequence[Row], ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, evaluation) rows, both in their old order; about `ratio` of the rows are for evaluation.

    Depends on the rows' content and the seed, not on their order. Equal rows stay together, so that none is
    both trained and evaluated.
    """
    if ratio <= 0:
        return list(rows), []
    keys = [_content_key(row, seed) for row in rows]
    counts: dict[bytes, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    if len(counts) < 2:
        raise ConfigError(f"--split_dataset_ratio {ratio}: the rows are all the same, none can be held out")
    wanted = max(1, round(len(rows) * ratio))
    held_out: set[bytes] = set()
    taken = 0
    for key in sorted(counts)[: len(counts) - 1]:
        if taken >= wanted:
            break
        held_out.add(key)
        taken += counts[key]
    training = [row for row, key in zip(rows, keys, strict=True) if key not in held_out]
    return training, [row for row, key in zip(rows, keys, strict=True) if key in held_out]


def _content_key(row: Row, seed: int) -> bytes:
    content = json.dumps(row.columns, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(f"{seed}\n{content}".encode()).digest()


def _rename(rows: list[Row], columns: dict[str, Any]) -> list[Row]:
    known = {name for row in rows for name in row.columns}
    for old, new in columns.items():
        if old not in known and new not in known:  # evaluation rows may have the new name already
            near = difflib.get_close_matches(old, known, 1)
            raise ConfigError(
                f"--columns renames {old}, which no row has",
                hint=f"did you mean {near[0]}?" if near else f"columns are {', '.join(sorted(known))}",
            )
    renamed = []
    for row in rows:
        # A renamed column wins over one that already has the new name.
        kept = {name: value for name, value in row.columns.items() if name not in columns}
        moved = {columns[name]: value for name, value in row.columns.items() if name in columns}
        renamed.append(Row({**kept, **moved}, row.file, row.line))
    return renamed


def _load_from_hub(text: str, spec: Spec, *, use_hf: bool, token: str | None) -> list[Row]:
    if spec.hub is None and not _looks_like_hub_id(spec.dataset_id):
        raise ConfigError(f"dataset {text}: no such file or folder", hint=_nearest_file(spec.dataset_id))
    on_hf = spec.hub == "hf" or (spec.hub is None and (use_hf or env.is_on("USE_HF")))
    if env.is_on("SWIFT_OFFLINE") or (on_hf and env.is_on("HF_HUB_OFFLINE")):
        raise ConfigError(f"dataset {text}: no such file or folder, and downloads are switched off")
    module, needs = ("swift.data.hub_hf", "datasets") if on_hf else ("swift.data.hub_ms", "modelscope")
    purpose = f"dataset {text}: no such file, and taking it from {'HuggingFace' if on_hf else 'ModelScope'}"
    hub = import_extra(module, needs=needs, extra="hub", purpose=purpose)
    subsets = spec.subsets or (None,)
    rows = [row for subset in subsets for row in hub.load_hub_rows(spec.dataset_id, subset, token)]
    if not rows:
        raise ConfigError(f"dataset {text}: no rows in it")
    return rows


def _looks_like_hub_id(name: str) -> bool:
    """OWNER/NAME, where OWNER is no folder here and NAME has no suffix of a data file."""
    owner, slash, rest = name.partition("/")
    is_file = Path(name).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet", ".txt")
    is_id = bool(slash and owner and rest) and "/" not in rest
    return is_id and not is_file and not Path(owner).expanduser().is_dir()


def _nearest_file(name: str) -> str | None:
    folder = Path(name).expanduser().parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    near = difflib.get_close_matches(Path(name).name, [entry.name for entry in folder.iterdir()], 1)
    return f"did you mean {folder / near[0]}?" if near else None
