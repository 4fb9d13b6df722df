"""Data sets from HuggingFace. Loaded only when one is named: `datasets` is an extra."""

from typing import Any

import datasets

NAME = "HuggingFace"


def load(dataset_id: str, subset: str | None, token: str | None) -> Any:
    return datasets.load_dataset(dataset_id, subset, split="train", token=token)
