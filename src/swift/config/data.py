"""Which rows, how many, and what becomes of those that cannot be used."""

from dataclasses import dataclass
from typing import Any

from swift.config.option import Clash, ConfigError, option


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    dataset: tuple[str, ...] = option((), "training data: FILE, FILE#N or ID:SUBSET#N; several by spaces")
    val_dataset: tuple[str, ...] = option((), "evaluation data, same syntax; none = split from --dataset")
    cached_dataset: tuple[str, ...] = option((), "directories of swift export --to_cached_dataset true")
    load_from_cache_file: bool = option(True, "take encoded rows from the cache; no = encode them again")
    streaming: bool = option(False, "read and encode rows while training, which needs --max_steps")
    shuffle_buffer_size: int = option(1000, "with --streaming: rows to draw one from", unit="rows", min=1)
    interleave_prob: tuple[float, ...] = option(
        (), "draw rows from the datasets by these weights, one each; none = one dataset after another"
    )
    stopping_strategy: str = option(
        "first_exhausted",
        "with --interleave_prob: end when the first dataset is used up, or when all have been",
        choices=("first_exhausted", "all_exhausted"),
    )
    split_dataset_ratio: float = option(0.0, "share of the rows held out for evaluation", range=(0, 1))
    data_seed: int | None = option(None, "seed of sampling, split and order; none = --seed")
    dataset_num_proc: int = option(1, "processes that encode rows", min=1)
    dataset_shuffle: bool = option(True, "shuffle the rows before #N takes its share")
    val_dataset_shuffle: bool = option(False, "shuffle the evaluation rows as well")
    train_dataloader_shuffle: bool = option(True, "new order of the rows in every epoch")
    dataloader_num_workers: int | None = option(
        None,
        "with --streaming true: processes that encode ahead, 0 = none (none = --dataset_num_proc); "
        "other rows are encoded before training, so there is nothing to prefetch",
        min=0,
    )
    packing: bool = option(False, "put rows together into long sequences; batches and steps count those")
    packing_length: int | None = option(None, "room in a pack; none = --max_length", unit="tokens", min=1)
    columns: dict[str, Any] = option({}, 'renames columns before anything else, as JSON: {"old": "new"}')
    strict: bool = option(False, "stop at the first row that cannot be used")
    max_drop_ratio: float = option(0.2, "stop when a larger share of the rows is dropped", range=(0, 1))
    allow_unsupervised: bool = option(False, "drop rows without a trained token instead of stopping")
    model_name: tuple[str, ...] = option((), "name that the model learns (self-cognition): one, or zh and en")
    model_author: tuple[str, ...] = option((), "author that the model learns: one, or zh and en")

    def check(self) -> None:
        if self.interleave_prob and len(self.interleave_prob) != len(self.dataset):
            raise ConfigError(
                f"--interleave_prob has {len(self.interleave_prob)} values for {len(self.dataset)} datasets",
                hint="give one weight for each --dataset",
            )
        if any(weight <= 0 for weight in self.interleave_prob):
            raise ConfigError("--interleave_prob takes weights above 0")
        if self.streaming:
            self._check_stream()
        if self.cached_dataset and not self.dataset and (self.val_dataset or self.split_dataset_ratio):
            raise ConfigError(
                "--val_dataset and --split_dataset_ratio have no effect on --cached_dataset alone",
                hint="give them to swift export --to_cached_dataset",
            )

    def _check_stream(self) -> None:
        if self.cached_dataset:
            raise Clash(
                "--cached_dataset holds rows that are encoded already, --streaming true encodes them later"
            )
        if self.split_dataset_ratio:
            raise ConfigError(
                "--split_dataset_ratio needs all rows at hand, --streaming true does not have them",
                hint="name evaluation rows with --val_dataset",
            )
