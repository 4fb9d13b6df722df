"""Data sets from ModelScope. Loaded only when one is named: `modelscope` is an extra."""

from typing import Any

from modelscope.msdatasets import MsDataset

NAME = "ModelScope"


def load(dataset_id: str, subset: str | None, token: str | None) -> Any:
    return MsDataset.load(dataset_id, subset_name=subset or "default", split="train", token=token)
