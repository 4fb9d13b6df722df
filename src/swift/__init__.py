"""swift: fine-tune, align, run and export large language models. Importing it imports nothing heavy."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What plugin files start from, and answers from Python; loaded when named.
_PUBLIC = {
    **dict.fromkeys(("InferEngine", "InferRequest", "RequestConfig"), "swift.infer.api"),
    **dict.fromkeys(
        ("DatasetMeta", "ResponsePreprocessor", "RowPreprocessor", "register_dataset"), "swift.llm"
    ),
    **dict.fromkeys(("ORM", "AsyncORM", "LossScale", "orms", "rm_plugins", "loss_scale_map"), "swift.plugin"),
    **dict.fromkeys(("MultiTurnScheduler", "multi_turns", "Env", "envs"), "swift.plugin"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module swift has no {name}")
    return getattr(import_module(_PUBLIC[name]), name)
