"""Which rows a run uses.

Owns: the syntax of --dataset, taking N rows, renaming columns, the split into training and evaluation rows.
Not here: reading files (reading.py), named data sets (datasets.py), what a row means (formats.py).
"""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from swift.config.data import DataConfig
from swift.config.option import ConfigError
from swift.data.datasets import PACKAGED, find_registered, load_packaged
from swift.data.reading import import_extra
from swift.data.rows import InMemory, Rows, join_rows, open_path, read_path
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


def open_rows(
    specs: Sequence[str],
    *,
    seed: int,
    shuffle: bool,
    columns: dict[str, Any],
    model_name: Sequence[str] = (),
    model_author: Sequence[str] = (),
    use_hf: bool = False,
    token: str | None = None,
    keep_broken: bool = False,
    mix: Sequence[float] = (),
    stop_mixing: str = "first_exhausted",
) -> Rows:
    """The rows of all specs, one after another, or drawn from them by the weights `mix`.

    Reading them raises ConfigError that names the file and line. `keep_broken`: a line that is no row becomes
    a row with a problem, so that it can be counted.

    `shuffle` says whether #N takes a random share or the first rows. Every spec draws with the same seed, so
    that naming another one beside it changes nothing about its rows.
    """
    opened: list[Rows] = []
    for text in specs:
        rows, count = open_spec(
            text, names=(model_name, model_author), use_hf=use_hf, token=token, keep_broken=keep_broken
        )
        if count is not None:
            choice = partial(sample_indices, count=count, seed=seed, shuffle=shuffle)
            rows = rows.take(choice, ["take", count, seed, shuffle])
        opened.append(rows)
    if mix:
        order = partial(mix_tables, weights=mix, seed=seed, stop=stop_mixing)
        joined = join_rows(opened, mix=order, recipe=["mixed", list(mix), seed, stop_mixing])
    else:
        joined = join_rows(opened)
    return joined.rename(columns) if columns else joined


def open_sets(
    data: DataConfig, *, seed: int, use_hf: bool, token: str | None
) -> tuple[Rows | None, Rows | None]:
    """Training rows and evaluation rows, as a run names them; none where it names none, or streams them."""
    if not data.dataset:
        return None, None
    open_these = partial(
        open_rows, seed=seed, columns=data.columns, model_name=data.model_name,
        model_author=data.model_author, use_hf=use_hf, token=token,
    )  # fmt: skip
    held_out = open_these(data.val_dataset, shuffle=data.val_dataset_shuffle) if data.val_dataset else None
    if data.streaming:
        return None, held_out
    mixing = {"mix": data.interleave_prob, "stop_mixing": data.stopping_strategy}
    rows = open_these(data.dataset, shuffle=data.dataset_shuffle, **mixing)
    return split_rows(rows, data.split_dataset_ratio, seed) if held_out is None else (rows, held_out)


def open_spec(
    text: str,
    *,
    names: tuple[Sequence[str], Sequence[str]],
    use_hf: bool,
    token: str | None,
    keep_broken: bool = False,
) -> tuple[Rows, int | None]:
    """All rows of one value of --dataset, and its #N. `names`: --model_name and --model_author."""
    spec = parse_spec(text)
    registered = find_registered(spec.dataset_id)
    if registered is not None:
        on_hf = spec.hub == "hf" or use_hf or env.is_on("USE_HF")
        spec = replace(spec, **registered.source(spec.subsets, use_hf=on_hf))
    if spec.path is not None and registered is None and not keep_broken:
        return open_path(spec.path), spec.count
    if spec.path is not None:
        found = read_path(spec.path, keep_broken=keep_broken)
    elif spec.hub is None and spec.dataset_id in PACKAGED:
        found = load_packaged(spec.dataset_id, spec.subsets, model_name=names[0], model_author=names[1])
    else:
        found = _load_from_hub(text, spec, use_hf=use_hf, token=token)
    return Rows([InMemory(found if registered is None else registered.preprocess(found))]), spec.count


def mix_tables(lengths: Sequence[int], *, weights: Sequence[float], seed: int, stop: str) -> np.ndarray:
    """Numbers of the rows of tables, counted through, in the order of `mix_streams`."""
    ends = np.cumsum(lengths).tolist()
    openers = [partial(iter, range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    return np.fromiter(mix_streams(openers, weights=weights, seed=seed, stop=stop), dtype=np.int64)


def mix_streams(
    openers: Sequence[Callable[[], Iterator[Any]]], *, weights: Sequence[float], seed: int, stop: str
) -> Iterator[Any]:
    """Each row from a table drawn by the weights.

    Ends with the last row of the first table that is used up ("first_exhausted"), or once every table has
    been ("all_exhausted"); until then a table that is used up begins again.
    """
    draw, shares = np.random.RandomState(seed), np.cumsum(weights)[:-1] / np.sum(weights)
    tables = [opener() for opener in openers]
    following = [next(table, None) for table in tables]
    used_up: set[int] = set()
    while all(row is not None for row in following):
        for i in np.searchsorted(shares, draw.random_sample(1000), side="right").tolist():
            yield following[i]
            following[i] = next(tables[i], None)
            if following[i] is None:
                used_up.add(i)
                if stop == "first_exhausted" or len(used_up) == len(openers):
                    return
                tables[i] = openers[i]()
                following[i] = next(tables[i], None)


def sample_indices(rows: Sized, *, count: int, seed: int, shuffle: bool) -> list[int]:
    """Which rows #count takes: the whole set as often as it fits, in order, then a share of it.

    RandomState is frozen by NumPy's compatibility policy: its numbers never change between versions.
    """
    length = len(rows)
    order = np.random.RandomState(seed).permutation(length).tolist() if shuffle else list(range(length))
    if count <= length:
        return order[:count]
    rounds, rest = divmod(count, length)
    return list(range(length)) * rounds + order[:rest]


def split_rows(rows: Rows, ratio: float, seed: int) -> tuple[Rows, Rows | None]:
    """(training, evaluation) rows, both in their old order; about `ratio` of the rows are for evaluation.

    Depends on the rows' content and the seed, not on their order. Equal rows stay together, so that none is
    both trained and evaluated. Nothing is read before one of them is.
    """
    if ratio <= 0:
        return rows, None
    split = lru_cache(partial(_hold_out, rows, ratio, seed))
    training = rows.take(lambda _: np.flatnonzero(~split()), ["train", ratio, seed])
    return training, rows.take(lambda _: np.flatnonzero(split()), ["held out", ratio, seed])


def _hold_out(rows: Rows, ratio: float, seed: int) -> np.ndarray:
    """[R] bool: the row is for evaluation."""
    texts = (json.dumps(row.columns, sort_keys=True, ensure_ascii=True, default=str) for row in rows)
    keys = [hashlib.sha256(f"{seed}\n{text}".encode()).digest() for text in texts]
    counts = Counter(keys)
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
    return np.array([key in held_out for key in keys])


def _load_from_hub(text: str, spec: Spec, *, use_hf: bool, token: str | None) -> list[Row]:
    if spec.hub is None and not _looks_like_hub_id(spec.dataset_id):
        raise ConfigError(f"dataset {text}: no such file or folder", hint=_nearest_file(spec.dataset_id))
    on_hf = spec.hub == "hf" or (spec.hub is None and (use_hf or env.is_on("USE_HF")))
    if env.is_on("SWIFT_OFFLINE") or (on_hf and env.is_on("HF_HUB_OFFLINE")):
        raise ConfigError(f"dataset {text}: no such file or folder, and downloads are switched off")
    module, needs = ("hub_hf", ("datasets",)) if on_hf else ("hub_ms", ("modelscope_hub", "datasets"))
    purpose = f"dataset {text}: no such file, and taking it from {'HuggingFace' if on_hf else 'ModelScope'}"
    hub = import_extra(f"swift.data.{module}", needs=needs, extra="hub", purpose=purpose)
    subsets = spec.subsets or (None,)
    rows = [row for subset in subsets for row in _load_subset(hub, spec.dataset_id, subset, token)]
    if not rows:
        raise ConfigError(f"dataset {text}: no rows in it")
    return rows


def _load_subset(hub: Any, dataset_id: str, subset: str | None, token: str | None) -> list[Row]:
    """Rows of the split `train`. `hub` is one of our hub_*.py."""
    name = dataset_id if subset is None else f"{dataset_id}:{subset}"
    try:
        table = hub.load(dataset_id, subset, token)
    except Exception as error:  # whatever the network and the hub raise
        raise ConfigError(
            f"dataset {name}: not found as a file or on {hub.NAME} ({type(error).__name__}: {error})"
        ) from error
    return [Row(dict(columns), name, number) for number, columns in enumerate(table, start=1)]


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
