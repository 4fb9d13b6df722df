"""Rows with several classes each: the column `label`, a list of class numbers, for whole data sets.

Not here: rows with one class or number (shapes.py), the loss.
"""

import hashlib
from typing import Any

import numpy as np

from swift.config.option import ConfigError
from swift.data.encode import EncodedDataset
from swift.data.messages import parse_json
from swift.data.types import RowError, place


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
