"""One knob, declared once.

Owns: `option()` (a dataclass field with help, unit, choices, bounds), `ConfigError` (a user's mistake), and
the walk over nested config dataclasses. `check` of a group or a run raises ConfigError where flags contradict
each other or one is missing. Not here: parsing of the command line (cli/flags.py).
"""

import dataclasses
import importlib.util
import types
import typing
from collections.abc import Container, Iterator
from dataclasses import MISSING, Field
from typing import Any, TypeVar

Group = TypeVar("Group")


class ConfigError(ValueError):
    """A mistake of the user: one line that names the flag, file or row, and a hint that says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Clash(ConfigError):
    """Two things that are asked for and cannot both be."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="leave one of them out")


def option(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    choices: tuple[Any, ...] | None = None,
    min: float | None = None,
    range: tuple[float | None, float | None] | None = None,
) -> Any:
    """A config field. `min` and both ends of `range` are allowed values; None leaves an end open."""
    bounds = range if min is None else (min, None)
    metadata = {"help": help, "unit": unit, "choices": choices, "range": bounds}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Knob:
    """One leaf of a run config: where it lives and what may be put in it."""

    name: str
    group: str
    owner: type
    type: Any
    default: Any
    help: str
    unit: str | None
    choices: tuple[Any, ...] | None
    range: tuple[float | None, float | None] | None

    @property
    def optional(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @property
    def base_type(self) -> Any:
        """The type without None: `int | None` -> int."""
        args = [a for a in typing.get_args(self.type) if a is not type(None)]
        is_union = typing.get_origin(self.type) in (typing.Union, types.UnionType)
        return args[0] if is_union and len(args) == 1 else self.type


def default_of(field: "Field[Any]") -> Any:
    """The default of a dataclass field, MISSING when there is none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def iterate_knobs(config_class: type) -> Iterator[Knob]:
    """Every knob of a run config, in order of declaration; nested dataclasses are groups."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from (dataclasses.replace(k, group=field.name) for k in iterate_knobs(kind))
            continue
        if field.metadata:  # others are no knobs
            yield Knob(field.name, "", config_class, kind, default_of(field), **field.metadata)


def build(config_class: type, values: dict[str, Any]) -> Any:
    """A nested config from flat values; absent names keep their defaults. Values are checked as they are.

    A field `given` gets the names that are there.
    """
    hints = typing.get_type_hints(config_class)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            arguments[field.name] = build(kind, values)
        elif field.name in values:
            check_value(field, values[field.name])
            arguments[field.name] = values[field.name]
        elif field.name == "given":
            arguments["given"] = frozenset(values)
    return config_class(**arguments)


def check_value(field: "Field[Any]", value: Any) -> None:
    """Raises ConfigError when `value` is outside the field's choices or bounds."""
    choices, bounds = field.metadata["choices"], field.metadata["range"]
    if value is None:
        return
    if choices:
        wrong = [v for v in (value if isinstance(value, tuple) else (value,)) if v not in choices]
        if wrong:
            raise ConfigError(f"--{field.name} must be one of {', '.join(map(str, choices))}, got {wrong[0]}")
    if bounds and isinstance(value, int | float):
        low, high = bounds
        if (low is not None and value < low) or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"--{field.name} must be {wanted}, got {value}")


def require_package(name: str, *, flag: str, install: str) -> None:
    """Raises ConfigError when an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ConfigError(f"{flag} needs the package {name}", hint=f"pip install '{install}'")


def is_secret(name: str) -> bool:
    """Whether a flag holds a secret, which is never printed and never written to a file."""
    return name.endswith(("_token", "_secret", "_password", "api_key"))


def changed(group: Any) -> list[str]:
    """Flags of a config group that are not at their defaults."""
    return [f.name for f in dataclasses.fields(group) if getattr(group, f.name) != default_of(f)]


def refuse(group: Any, names: Container[str], why: str, *, hint: str | None = None) -> None:
    """Raises ConfigError where one of the flags `names` is not at its default: it has no effect `why`."""
    for name in changed(group):
        if name in names:
            raise ConfigError(f"--{name} has no effect {why}", hint=hint)


def refuse_method(group: Any, names: Container[str], rlhf_type: str, methods: tuple[str, ...]) -> None:
    """As `refuse`, of flags that only `methods` have, where --rlhf_type is another one."""
    if rlhf_type not in methods:
        hint = f"it belongs to {', '.join(methods)}; leave it out"
        refuse(group, names, f"with --rlhf_type {rlhf_type}", hint=hint)


def flatten(config: Any) -> dict[str, Any]:
    """Flat {flag: value} of a nested config; the inverse of `build`."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value))
        elif field.metadata:
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def fill_defaults(
    group: Group, saved: dict[str, Any], names: tuple[str, ...]
) -> tuple[Group, dict[str, Any]]:
    """The config group with saved values where it has its defaults, and those values by flag."""
    free = [name for name in names if name not in changed(group)]
    taken = {name: saved[name] for name in free if saved.get(name) not in (None, getattr(group, name))}
    return dataclasses.replace(group, **taken), taken  # type: ignore[type-var]
