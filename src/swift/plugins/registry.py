"""Names that users can add to, and the files in which they do.

Owns: `Registry`, a dict that says what it knows when a name is missing; loading of `--external_plugins` and
of `file.py:name` or `package.module:name`. Not here: what can be added (hooks.py), the names themselves.
"""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from swift.config.option import ConfigError

T = TypeVar("T")


class Registry(dict[str, T]):
    """Objects by name. `kind` says in messages what they are. A value may be the import string of one."""

    def __init__(self, kind: str, entries: Mapping[str, T] | None = None) -> None:
        super().__init__(entries or {})
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds what it stands above."""

        def add(value: T) -> T:
            if self.get(name, value) is not value:
                raise ConfigError(f"there is a {self.kind} called {name} already")
            self[name] = value
            return value

        return add

    def find(self, name: str) -> T:
        """What is called `name`, or stands at `file.py:name` or `package.module:name`. Raises ConfigError."""
        value: Any = self.get(name, name if ":" in name else None)
        if value is None:
            raise unknown_name(self.kind, name, self)
        return load_object(value) if isinstance(value, str) else value


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that does not exist: the closest one, and all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"no {kind} is called {name}", hint=f"{hint}known: {', '.join(names) or 'none'}")


def load_plugins(files: Iterable[str]) -> None:
    """Runs the files of --external_plugins, in order. Raises ConfigError that names file and line."""
    for file in files:
        if not Path(file).expanduser().is_file():
            raise ConfigError(f"--external_plugins {file}: no such file")
        load_file(file)


def load_object(path: str) -> Any:
    """What `file.py:name` or `package.module:name` names."""
    place, _, name = path.rpartition(":")
    if place.endswith(".py"):
        module = load_file(place)
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise ConfigError(f"{path}: {error}") from error
    if name not in vars(module):
        near = difflib.get_close_matches(name, vars(module), 1)
        raise ConfigError(f"{place} has no {name}", hint=f"did you mean {near[0]}?" if near else None)
    return vars(module)[name]


def load_file(file: str) -> ModuleType:
    """The module of a Python file, run once.

    Its folder joins the end of the search path, as users expect who import one file of theirs from another;
    worker processes find the module there too.
    """
    path = Path(file).expanduser().resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"{file}: no such Python file")
    name = path.stem.replace(".", "_")
    loaded = sys.modules.get(name)
    if loaded is not None and _stands_at(loaded.__spec__, path):
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    taken = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    if loaded is not None or (taken is not None and not _stands_at(taken, path)):
        raise ConfigError(f"{file}: there is another module called {name}", hint="rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a plugin is a stranger's program
        del sys.modules[name]
        raise _explain(file, path, error) from error
    return module


def _stands_at(spec: Any, path: Path) -> bool:
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path


def _explain(file: str, path: Path, error: Exception) -> ConfigError:
    """One line with the last line of the file itself that was running."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return ConfigError(f"{file} line {error.lineno}: SyntaxError: {error.msg}")
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    place = f"{file} line {lines[-1]}" if lines else file
    if isinstance(error, ConfigError):
        return ConfigError(f"{place}: {error.message}", hint=error.hint)
    return ConfigError(f"{place}: {type(error).__name__}: {error}")
