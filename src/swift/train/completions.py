"""completions.jsonl: every sampled answer with its rewards, one line a rollout, columns as lists."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift.utils.files import append_jsonl

COMPLETIONS = "completions.jsonl"


def keep_completions(directory: Path, step: int, answers: Sequence[dict[str, Any]]) -> None:
    """Adds the answers of the rollout that `step` begins with."""
    names = dict.fromkeys(name for answer in answers for name in answer)
    columns = {name: [answer.get(name) for answer in answers] for name in names}
    append_jsonl(directory / COMPLETIONS, [{"step": step, **columns}])
