"""Encoded rows on disk: written once, mapped into memory by every process and every later run.

Owns: the key of an entry, its files, who writes it, the entries of `swift export --to_cached_dataset`. Not
here: encoding itself (encode.py).

An entry is a directory: ids.bin and labels.bin ([N] int32), loss_scale.bin ([N] float32, where some row has
weights), rows.npy ([R, 4] int64: tokens, number of the source row, file, line), for rows of several sequences
parts.npy ([R, K] int64: tokens of each) and values.npy ([R, V] float32), and entry.json, written last.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from swift.config.data import DataConfig
from swift.config.option import ConfigError, default_of
from swift.config.template import TemplateConfig
from swift.data.encode import (
    Chunk,
    EncodedDataset,
    Encoder,
    EncodeReport,
    Place,
    Samples,
    encode_chunks,
    judge,
    make_report,
    name_values,
    pad_parts,
)
from swift.data.rows import Rows
from swift.data.shapes import SHAPES
from swift.template.tokenize import Encoded, fast_backend
from swift.utils import env
from swift.utils.files import write_json
from swift.utils.log import say

ENTRY, PARTS, VALUES = "entry.json", "parts.npy", "values.npy"
# What an encoded row is a function of, besides the rows and the tokenizer.
_NOT_FOR_TRAINING = ("response_prefix", "max_length")


def encode_cached(
    rows: Rows,
    encoder: Encoder,
    config: DataConfig,
    *,
    what: str = "training",
    plugins: Sequence[str] = (),
) -> tuple[EncodedDataset, EncodeReport]:
    """As `encode_rows`, from the cache where it has these rows; otherwise it will have them afterwards.

    `plugins`: files whose code takes part. Several processes may ask at once: one encodes, the others wait.
    """
    about = describe_encoder(encoder)
    known = [rows.digest, about, encoder.shape, _digest_code(plugins)]
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    root = env.cache_root() / "encoded"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{root}: {error.strerror or error}", hint="SWIFT_CACHE names another place"
        ) from error
    with FileLock(root / f"{key}.lock"):
        found = open_entry(root / key, rows, encoder.shape) if config.load_from_cache_file else None
        if found is not None and not (config.strict and found[1].num_dropped):
            say(f"{what}: encoded rows taken from {root / key}")
        else:
            write_entry(root / key, encoder, rows, config, what=what, about=about)
            found = open_entry(root / key, rows, encoder.shape)
            assert found is not None, f"{root / key} cannot be read back"
    judge(found[1], config, what)
    return found


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """Flags that change tokens or labels, and the tokenizer by its digest."""
    template = encoder.template
    flags = dataclasses.asdict(template.config)
    kept = {name: value for name, value in flags.items() if name not in _NOT_FOR_TRAINING}
    settings = {**kept, "system": template.system, "max_length": encoder.max_length}
    specials = json.dumps(template.tokenizer.special_tokens_map, sort_keys=True, default=str)
    known = (fast_backend(template).to_str(), template.source, specials)
    return {"settings": settings, "tokenizer": hashlib.sha256("\0".join(known).encode()).hexdigest()}


def _digest_code(plugins: Sequence[str]) -> str:
    """sha256 of the code that makes tokens out of rows, ours and the users': no number to forget to raise."""
    digest = hashlib.sha256()
    template = resources.files("swift.template")
    for folder in (resources.files("swift.data"), template, template / "texts"):
        files = [file for file in folder.iterdir() if file.name.endswith((".py", ".txt", ".jinja"))]
        for file in sorted(files, key=lambda file: file.name):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    for plugin in plugins:
        digest.update(hashlib.sha256(Path(plugin).expanduser().read_bytes()).digest())
    return digest.hexdigest()


def write_entry(
    entry: Path, encoder: Encoder, rows: Rows, config: DataConfig, *, what: str, about: dict[str, Any]
) -> EncodeReport:
    """Encodes all rows into `entry`, which appears whole or not at all. The caller holds its lock."""
    with contextlib.closing(_Writer(entry)) as writer:
        chunks = map(writer.add, encode_chunks(encoder, rows, config.dataset_num_proc))
        report = make_report(len(rows), chunks)
        judge(report, config, what)
        writer.finish({**about, **dataclasses.asdict(report)})
    return report


def copy_entries(entry: Path, datasets: Sequence[EncodedDataset], about: dict[str, Any]) -> None:
    """One entry with the rows of several data sets, one after another."""
    with contextlib.closing(_Writer(entry)) as writer:
        for dataset in datasets:
            for first in range(0, len(dataset), 1000):
                writer.add(_cut(dataset, first, min(first + 1000, len(dataset))))
        total = sum(map(len, datasets))
        writer.finish({**about, **dataclasses.asdict(EncodeReport(total, total))})


def _cut(dataset: EncodedDataset, first: int, end: int) -> Chunk:
    flat = dataset.flat.cut(*dataset.offsets[[first, end]].tolist())
    places = [dataset.places[i] for i in range(first, end)]
    parts = [tuple(row) for row in dataset.parts[first:end].tolist()]
    return Chunk(flat, parts, list(range(first, end)), places, [], [()] * len(parts))


class _Writer:
    """Files of an entry under a temporary name, growing chunk by chunk."""

    def __init__(self, entry: Path) -> None:
        self._entry = entry
        self._directory = entry.with_name(f".{entry.name}.tmp")
        self.close()  # left by a process that was killed: only the holder of the lock gets here
        self._directory.mkdir(parents=True)
        self._ids = (self._directory / "ids.bin").open("wb")
        self._labels = (self._directory / "labels.bin").open("wb")
        self._scale: Any = None
        self._rows: list[np.ndarray] = []
        self._parts: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._files: dict[str, int] = {}
        self._tokens = 0

    def add(self, chunk: Chunk) -> Chunk:
        """Writes the rows of a chunk, and passes it on."""
        flat, size = chunk.flat, len(chunk.flat.input_ids)
        if flat.loss_scale is not None and self._scale is None:
            self._scale = (self._directory / "loss_scale.bin").open("wb")
            np.ones(self._tokens, dtype=np.float32).tofile(self._scale)
        flat.input_ids.tofile(self._ids)
        flat.labels.tofile(self._labels)
        if self._scale is not None:
            scale = np.ones(size, dtype=np.float32) if flat.loss_scale is None else flat.loss_scale
            scale.tofile(self._scale)
        files = [self._files.setdefault(file, len(self._files)) for file, _ in chunk.places]
        lines = [line for _, line in chunk.places]
        parts = pad_parts(chunk.parts)
        self._rows.append(np.array([parts.sum(1), chunk.kept, files, lines], dtype=np.int64).T)
        self._parts.append(parts)
        if chunk.values:
            self._values.append(np.array(chunk.values, dtype=np.float32))
        self._tokens += size
        return chunk

    def finish(self, about: dict[str, Any]) -> None:
        """Makes the entry appear."""
        for handle in (self._ids, self._labels, self._scale):
            if handle is not None:
                handle.close()
        rows, width = np.concatenate(self._rows), max(parts.shape[1] for parts in self._parts)
        np.save(self._directory / "rows.npy", rows)
        parts = np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]))) for p in self._parts])
        values = np.concatenate(self._values)
        if width > 1:
            np.save(self._directory / PARTS, parts)
        if values.shape[1]:
            np.save(self._directory / VALUES, values)
        files, weighted = list(self._files), self._scale is not None
        columns = dict(enumerate(values.T))
        written = EncodedDataset(
            _map_tokens(self._directory, weighted=weighted), parts, _Places(files, rows), values=columns
        )
        known = {
            **about,
            "rows": len(rows),
            "tokens": written.num_tokens,
            "trained": written.num_trained,
            "weighted": weighted,
            "files": files,
            "fingerprint": written.fingerprint,
        }
        write_json(self._directory / ENTRY, known)
        if self._entry.exists():
            shutil.rmtree(self._entry)  # whoever has it mapped keeps what is mapped
        self._directory.rename(self._entry)

    def close(self) -> None:
        """Throws away what is not finished."""
        shutil.rmtree(self._directory, ignore_errors=True)


def _map_tokens(directory: Path, *, weighted: bool) -> Encoded:

    def mapped(name: str, kind: Any) -> np.ndarray:
        return np.memmap(directory / f"{name}.bin", kind, "r")

    scale = mapped("loss_scale", np.float32) if weighted else None
    return Encoded(mapped("ids", np.int32), mapped("labels", np.int32), scale)


class _Places(Sequence[Place]):
    def __init__(self, files: list[str], rows: np.ndarray) -> None:
        self._files, self._rows = files, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Place:  # type: ignore[override]
        return self._files[int(self._rows[index, 2])], int(self._rows[index, 3])


def open_entry(
    entry: Path, rows: Rows | None = None, shape: str = "chat"
) -> tuple[EncodedDataset, EncodeReport] | None:
    """What is in an entry; none where it is missing or damaged. `rows` are those it was made of."""
    try:
        about = json.loads((entry / ENTRY).read_text(encoding="utf-8"))
        table = np.load(entry / "rows.npy")
        flat = _map_tokens(entry, weighted=about["weighted"])
        sizes = {len(array) for array in (flat.input_ids, flat.labels, flat.loss_scale) if array is not None}
        if table.shape != (about["rows"], 4) or sizes != {about["tokens"]} or sizes != {table[:, 0].sum()}:
            return None
        parts = np.load(entry / PARTS) if (entry / PARTS).exists() else table[:, :1]
        values = name_values(shape, np.load(entry / VALUES)) if SHAPES[shape].values else {}
        now = _present_names(about["files"], table, rows) if rows is not None else {}
        report = EncodeReport(
            about["total"],
            about["kept"],
            {
                reason: [(now.get(file, file), line) for file, line in places]
                for reason, places in about["dropped"].items()
            },
            tuple(about["unsupervised"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    samples = () if rows is None else Samples(rows, table[:, 1], shape)
    places = _Places([now.get(file, file) for file in about["files"]], table)
    dataset = EncodedDataset(
        flat, parts, places, values=values, shape=shape, samples=samples, directory=entry
    )
    dataset.__dict__.update(num_trained=about["trained"], fingerprint=about["fingerprint"])
    return dataset, report


def _present_names(files: list[str], table: np.ndarray, rows: Rows) -> dict[str, str]:
    """Where each file is now: the same content may have been encoded under another name."""
    _, first = np.unique(table[:, 2], return_index=True)
    found = {}
    for entry in first.tolist():
        number = int(table[entry, 1])
        found[files[int(table[entry, 2])]] = rows.unparsed(slice(number, number + 1))[0].file
    return found


def open_exported(
    directories: Sequence[str], encoder: Encoder, *, model: str, training: bool
) -> list[EncodedDataset]:
    """The training or evaluation rows of `swift export --to_cached_dataset` in each directory.

    Raises ConfigError where they were encoded otherwise than this run would. A directory may also be one of
    training rows itself.
    """
    datasets = []
    for directory in directories:
        path = Path(directory).expanduser()
        entry = path if (path / ENTRY).exists() else path / ("train" if training else "val")
        if training or (entry != path and entry.exists()):
            datasets.append(_open_checked(directory, entry, encoder, model))
    return datasets


def _open_checked(directory: str, path: Path, encoder: Encoder, model: str) -> EncodedDataset:
    found = open_entry(path)
    if found is None:
        raise ConfigError(
            f"--cached_dataset {directory}: no encoded rows in it, or they are damaged",
            hint="swift export --to_cached_dataset true writes such a directory",
        )
    about = json.loads((path / ENTRY).read_text(encoding="utf-8"))
    ours = describe_encoder(encoder)
    if about["tokenizer"] != ours["tokenizer"]:
        raise ConfigError(
            f"--cached_dataset {directory} was encoded with the tokenizer and chat template of "
            f"{about['model']}, which differ from those of --model {model}",
            hint="encode it again with this model",
        )
    for field in dataclasses.fields(TemplateConfig):
        value, made = ours["settings"].get(field.name), about["settings"].get(field.name)
        if field.name not in _NOT_FOR_TRAINING and value not in (default_of(field), made):
            raise ConfigError(
                f"--{field.name} is {value}, but --cached_dataset {directory} was encoded with {made}",
                hint="leave the flag out, or encode the rows again",
            )
    longest = int(found[0].lengths.max())
    if longest > encoder.max_length:
        raise ConfigError(
            f"--cached_dataset {directory} has rows of {longest} tokens, more than --max_length "
            f"{encoder.max_length}",
            hint="raise --max_length, or encode the rows again",
        )
    return found[0]


def join_datasets(datasets: Iterable[EncodedDataset]) -> EncodedDataset:
    """All rows as one data set; more than one are copied into the cache."""
    several = list(datasets)
    if len(several) == 1:
        return several[0]
    prints = [dataset.fingerprint for dataset in several]
    root = env.cache_root() / "encoded"
    entry = root / hashlib.sha256("\n".join(prints).encode()).hexdigest()[:32]
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{entry.name}.lock"):
        found = open_entry(entry)
        if found is None:
            copy_entries(entry, several, {})
            found = open_entry(entry)
    assert found is not None, f"{entry} cannot be read back"
    return found[0]


def remember(dataset: EncodedDataset, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns (JSON), kept beside the rows that it is a function of."""
    if dataset.directory is None:
        return make()
    path = dataset.directory / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made = make()
    with contextlib.suppress(OSError):  # a directory of --cached_dataset may be read-only
        write_json(path, made)
    return made
