"""What `swift dataset` looks at, and where the result goes."""

from dataclasses import dataclass
from typing import Any

from swift.config.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetOptions:
    action: str = option(
        "inspect",
        "inspect = numbers and warnings, preview = rows as the model sees them",
        choices=("inspect", "preview"),
    )
    dataset: tuple[str, ...] = option((), "data: FILE, FILE#N or ID:SUBSET#N; several by spaces")
    columns: dict[str, Any] = option({}, 'renames columns before anything else, as JSON: {"old": "new"}')
    dataset_num_proc: int = option(1, "processes that encode rows", min=1)
    dataset_shuffle: bool = option(True, "shuffle the rows before #N takes its share")
    data_seed: int = option(42, "seed of #N, and of the rows that preview picks")
    model_name: tuple[str, ...] = option((), "name for self-cognition data: one, or zh and en")
    model_author: tuple[str, ...] = option((), "author for self-cognition data: one, or zh and en")
    num_rows: int = option(5, "rows that preview picks", unit="rows", min=1)
    row: tuple[int, ...] = option((), "rows that preview shows instead, counted from 1")
    near_duplicates: bool = option(True, "look for rows that are nearly the same")
    report: str | None = option(None, "HTML file; none = output/dataset/NAME-ACTION.html")
    json: str | None = option(None, "inspect: write the numbers into this JSON file as well")
