"""The old import path of what plugins need to register data sets. New code may use it too."""

from swift.data.datasets import DatasetMeta, SubsetDataset, register_dataset
from swift.data.preprocessors import (
    AlpacaPreprocessor,
    AutoPreprocessor,
    MessagesPreprocessor,
    ResponsePreprocessor,
    RowPreprocessor,
)

__all__ = [
    "AlpacaPreprocessor",
    "AutoPreprocessor",
    "DatasetMeta",
    "MessagesPreprocessor",
    "ResponsePreprocessor",
    "RowPreprocessor",
    "SubsetDataset",
    "register_dataset",
]
