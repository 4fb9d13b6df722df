"""The channel of every row: the value of its column `channel`, by which --enable_channel_loss sorts."""

from collections.abc import Sequence

import numpy as np

from swift.config.option import ConfigError
from swift.data.cache import remember
from swift.data.encode import EncodedDataset


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
