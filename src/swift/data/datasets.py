"""Data sets that have a name here: the ones inside the package.

Owns: `swift/self-cognition` with its placeholders and subsets, `swift/general`. Not here: files (reading.py),
hubs (hub_hf.py, hub_ms.py).
"""

from collections.abc import Sequence
from importlib import resources

from swift.config.option import ConfigError
from swift.data.types import Row
from swift.utils.files import read_jsonl

_SELF_COGNITION = "self_cognition.jsonl"
_EMPTY_THINK = "<think>\n\n</think>\n\n"

# Subsets of self-cognition: what follows the question, what precedes the answer.
_STYLES = {"default": ("", ""), "qwen3": (" /no_think", _EMPTY_THINK), "empty_think": ("", _EMPTY_THINK)}

_PACKAGED = {
    "swift/self-cognition": (_SELF_COGNITION, tuple(_STYLES)),
    "modelscope/self-cognition": (_SELF_COGNITION, tuple(_STYLES)),
    "swift/general": ("general.jsonl", ("default",)),
}


def is_packaged(dataset_id: str) -> bool:
    return dataset_id in _PACKAGED


def load_packaged(
    dataset_id: str, subsets: Sequence[str], *, model_name: Sequence[str], model_author: Sequence[str]
) -> list[Row]:
    """Rows of the named subsets, one after another; no subset means "default"."""
    asset, known = _PACKAGED[dataset_id]
    names = known if tuple(subsets) == ("all",) else tuple(subsets) or known[:1]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"dataset {dataset_id} has no subset {name}", hint=f"known: {', '.join(known)}, all"
            )
    with resources.as_file(resources.files("swift.data") / "assets" / asset) as path:
        rows = [Row(columns, dataset_id, number) for number, columns in enumerate(read_jsonl(path), start=1)]
    if asset != _SELF_COGNITION:
        return rows
    _check_names("--model_name", model_name, dataset_id)
    _check_names("--model_author", model_author, dataset_id)
    return [_fill(row, style, model_name, model_author) for style in names for row in rows]


def _check_names(flag: str, values: Sequence[str], dataset_id: str) -> None:
    if not values or not all(values):
        raise ConfigError(
            f"{flag} is missing: dataset {dataset_id} teaches the model its name and its author",
            hint=f"give one value, or two for Chinese and English: {flag} ZH EN",
        )
    if len(values) > 2:
        raise ConfigError(f"{flag} takes one value, or two for Chinese and English, got {len(values)}")


def _fill(row: Row, style: str, model_name: Sequence[str], model_author: Sequence[str]) -> Row:
    columns, (suffix, prefix) = row.columns, _STYLES[style]
    which = 0 if columns["tag"] == "zh" else -1
    response = columns["response"].replace("{{NAME}}", model_name[which])
    response = response.replace("{{AUTHOR}}", model_author[which])
    filled = {**columns, "query": columns["query"] + suffix, "response": prefix + response}
    return Row(filled, row.file, row.line)
