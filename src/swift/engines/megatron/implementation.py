"""Whose layers megatron-core is built of: PyTorch's kernels, or transformer-engine's where it imports.

Attention is ours (layers.py) with both: flat batches, context parallelism and rotary angles then follow the
same rules. Not run yet: transformer-engine's modules, of which no build could be installed where tests run.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from swift.config.option import ConfigError
from swift.engines.megatron import wgrad

ENGINE = "transformer_engine"


@cache
def trouble() -> str | None:
    """Why transformer-engine cannot be used, None when it can.

    Has to be asked before megatron-core is imported. One that is installed but broken raises whatever its
    libraries raise, which would end that import; it is hidden then.
    """
    if sys.modules.get(ENGINE, ENGINE) is None or not find_spec(ENGINE):
        return "it is not installed"
    try:
        import_module(f"{ENGINE}.pytorch")
    except Exception as error:
        for name in [name for name in sys.modules if name.split(".")[0] == ENGINE]:
            del sys.modules[name]
        sys.modules[ENGINE] = None  # type: ignore[assignment]
        return f"it does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


def choose_implementation(transformer_impl: str) -> str:
    """megatron-core's name for --transformer_impl: `local` or `transformer_engine`.

    Raises ConfigError where transformer-engine is asked for by name and cannot be used.
    """
    if transformer_impl == "torch" or (transformer_impl == "auto" and trouble()):
        return "local"
    if trouble():
        raise ConfigError(
            f"--transformer_impl transformer_engine: {trouble()}",
            hint="leave the flag out: layers are then of PyTorch's kernels",
        )
    return ENGINE


def describe_implementation(implementation: str) -> str:
    """One line for the start of a run: which, and what it costs."""
    if implementation == ENGINE:
        return f"layers: transformer-engine {version(ENGINE)}, attention by PyTorch"
    added = "in the matrix product" if wgrad.MODULE in sys.modules else "in a second pass"
    return (
        f"layers: PyTorch's kernels, weight gradients added up {added}; without transformer-engine there is "
        f"no float8, no fused sorting of tokens by expert and no offloading of activations"
    )
