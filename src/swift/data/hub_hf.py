"""Data sets from HuggingFace. Loaded only when one is named: `datasets` is an extra."""

import datasets

from swift.config.option import ConfigError
from swift.data.types import Row


def load_hub_rows(dataset_id: str, subset: str | None, token: str | None) -> list[Row]:
    """Rows of the split `train`."""
    name = dataset_id if subset is None else f"{dataset_id}:{subset}"
    try:
        table = datasets.load_dataset(dataset_id, subset, split="train", token=token)
    except Exception as error:  # whatever the network and the hub raise
        raise ConfigError(
            f"dataset {name}: not found as a file or on HuggingFace ({type(error).__name__}: {error})"
        ) from error
    return [Row(dict(columns), name, number) for number, columns in enumerate(table, start=1)]
