"""`swift dataset`; and, loaded when it is named, what plugins made for ms-swift 4 import from here."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """What `swift.llm` has."""
    if name.startswith("__") or name not in import_module("swift.llm").__all__:
        raise AttributeError(f"module {__name__} has no {name}")
    return getattr(import_module("swift.llm"), name)
