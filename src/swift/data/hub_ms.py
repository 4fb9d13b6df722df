"""Data sets from ModelScope. Loaded only when one is named: its library and `datasets` are an extra."""

from typing import Any

import datasets
from modelscope_hub import HubApi, HubConfig

NAME = "ModelScope"


def load(dataset_id: str, subset: str | None, token: str | None) -> Any:
    """The files as they are in the repository, read as HuggingFace reads a folder of them."""
    folder = HubApi(HubConfig(), token=token).download_repo(dataset_id, "dataset")
    return datasets.load_dataset(str(folder), None if subset == "default" else subset, split="train")
