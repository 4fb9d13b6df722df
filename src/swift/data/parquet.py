"""Reads Parquet. Loaded only when such a file is named: pyarrow is an extra."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from swift.config.option import ConfigError
from swift.data.types import Row


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows in order; nested columns become dicts and lists."""
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            rows = (columns for batch in table.iter_batches() for columns in batch.to_pylist())
            for number, columns in enumerate(rows, start=1):
                yield Row(columns, str(path), number)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error
