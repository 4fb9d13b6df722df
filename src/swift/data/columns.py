"""Columns that are numbered for whole data sets: `channel`, by which --enable_channel_loss sorts losses, and
`label` as a list of several classes.

Not here: rows with one class or number (shapes.py), the losses.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from swift.config.option import ConfigError
from swift.data.cache import remember
from swift.data.encode import EncodedDataset
from swift.data.messages import parse_json
from swift.data.types import RowError, place


def find_channels(datasets: Sequence[EncodedDataset]) -> tuple[str, ...]:
    """All channels in order of their names; numbers the rows of every data set by them.

    Raises ConfigError where the rows' columns are not at hand, or none of the rows has a channel.
    """
    if any(len(dataset.samples) != len(dataset) for dataset in datasets):
        raise ConfigError(
            "--enable_channel_loss reads a column of the rows, which --cached_dataset does not keep",
            hint="give the rows with --dataset",
        )
    found = [remember(dataset, "channels", lambda d=dataset: _read(d)) for dataset in datasets]
    names = sorted({name for values in found for name in values if name is not None})
    if not names:
        raise ConfigError(
            "--enable_channel_loss: no row has a column channel", hint="leave it out, or add one"
        )
    number = {name: i for i, name in enumerate(names)} | {None: -1}
    for dataset, values in zip(datasets, found, strict=True):
        dataset.values["channel"] = np.array([number[value] for value in values], dtype=np.float32)
    return tuple(names)


def _read(dataset: EncodedDataset) -> list[str | None]:
    values = (sample.extra.get("channel") for sample in dataset.samples)
    return [None if value is None else str(value) for value in values]


def add_classes(dataset: EncodedDataset, num_labels: int) -> None:
    """values["label"] [R, C]: 1 where the row has the class, else 0. Raises ConfigError at a wrong label."""
    if len(dataset.samples) != len(dataset):
        raise ConfigError("--cached_dataset does not keep the classes of its rows", hint="give --dataset")
    table = np.zeros((len(dataset), num_labels), dtype=np.float32)
    for number, sample in enumerate(dataset.samples):
        given = sample.extra.get("label")
        classes = _parse_classes(given)
        if classes is None or not all(0 <= value < num_labels for value in classes):
            raise ConfigError(
                f"{place(*dataset.places[number])}: label {given} is not a list of classes from 0 to "
                f"{num_labels - 1} (--num_labels {num_labels})",
                hint='for example {"query": "...", "label": [0, 2]}; [] is a row without a class',
            )
        table[number, classes] = 1
    digest = hashlib.sha256(dataset.fingerprint.encode() + table.tobytes())
    dataset.__dict__["fingerprint"] = digest.hexdigest()
    dataset.values["label"] = table


def _parse_classes(value: Any) -> list[int] | None:
    """A list of numbers, also as JSON text; none where it is something else."""
    try:
        value = parse_json(value, "label")
    except RowError:
        return None
    return value if isinstance(value, list) and all(isinstance(v, int) for v in value) else None
