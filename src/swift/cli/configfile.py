"""YAML and JSON files as a first argument, and what --print_config writes: the same file format both ways.

Imported only when one of the two is asked for, since yaml is slow to import.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from swift.cli.flags import Given, Resolved, knobs_of
from swift.cli.values import to_plain, to_word, to_words
from swift.config.option import ConfigError, is_secret

OF_A_RUN = ("swift_version", "command")  # what args.json of a run holds beside flags


def read_config(path: Path) -> tuple[list[Given], dict[str, str]]:
    """The flags of a file, and its ENV block: variables to set where they are not set already."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold `flag: value` lines, got a {type(content).__name__}")
    variables = content.pop("ENV", None) or {}
    if not isinstance(variables, dict):
        raise ConfigError(f"ENV in {path} must hold `NAME: value` lines, got {variables!r}")
    given = [
        Given(str(key), str(key).removeprefix("--").replace("-", "_"), to_words(value), str(path))
        for key, value in content.items()
        if key not in OF_A_RUN
    ]
    return given, {str(name): to_word(value) for name, value in variables.items()}


def dump_config(resolved: Resolved) -> str:
    """Every flag that applies with its value, grouped; read back by `read_config` it gives the same again."""
    command = resolved.command
    values = dict(command.defaults) | resolved.values
    lines, group = [f"# {command.title}"], ""
    for name, knob in knobs_of(command).items():
        if knob.group != group:
            group = knob.group
            lines += ["", f"# {group}"]
        lines.append(_dump_item(name, values.get(name, knob.default)))
    if resolved.later:
        lines += ["", "# not yet in this version"]
        lines += [_dump_item(name, value) for name, value in resolved.later.items()]
    return "\n".join(lines) + "\n"


def _dump_item(name: str, value: Any) -> str:
    if is_secret(name):
        return f"{name}: null  # never printed"
    value = to_plain(value)
    flow = isinstance(value, list | dict)
    text: str = yaml.safe_dump(
        {name: value}, allow_unicode=True, default_flow_style=flow, sort_keys=False, width=float("inf")
    ).strip()
    if "\n" in text:
        return f"{name}: {json.dumps(value, ensure_ascii=False)}"
    return text[1:-1] if flow else text


def read_json_object(name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--{name} expects JSON or a file, got {str(path)!r}: {error.strerror or error}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--{name}: {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--{name}: {path} must hold an object, got a {type(content).__name__}")
    return content
