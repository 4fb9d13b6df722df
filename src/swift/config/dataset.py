"""What `swift dataset` looks at, and where the result goes."""

from dataclasses import dataclass
from typing import Any

from swift.config.option import option


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetOptions:
    action: str = option(
        "inspect",
        help="inspect = numbers and warnings, preview = rows as the model sees them",
        choices=("inspect", "preview"),
    )
    dataset: tuple[str, ...] = option((), help="data: FILE, FILE#N or ID:SUBSET#N; several by spaces")
    columns: dict[str, Any] = option({}, help='renames columns before anything else, as JSON: {"old": "new"}')
    dataset_num_proc: int = option(1, help="processes that encode rows", range=(1, None))
    dataset_shuffle: bool = option(True, help="shuffle the rows before #N takes its share")
    data_seed: int = option(42, help="seed of #N, and of the rows that preview picks")
    model_name: tuple[str, ...] = option((), help="name for self-cognition data: one, or zh and en")
    model_author: tuple[str, ...] = option((), help="author for self-cognition data: one, or zh and en")
    num_rows: int = option(5, help="rows that preview picks", unit="rows", range=(1, None))
    row: tuple[int, ...] = option((), help="rows that preview shows instead, counted from 1")
    near_duplicates: bool = option(True, help="look for rows that are nearly the same")
    report: str | None = option(None, help="HTML file; none = output/dataset/NAME-ACTION.html")
    json: str | None = option(None, help="inspect: write the numbers into this JSON file as well")
