"""The words of --help, made from the command table, the config dataclasses and fates.tsv."""

import re
import sys
import textwrap
from collections import Counter
from dataclasses import MISSING
from typing import Any

from swift.cli.commands import Command, commands_of
from swift.cli.fates import fates_of
from swift.cli.flags import knobs_of
from swift.cli.values import kind_of, to_plain, to_word
from swift.config.option import Knob

WIDTH = 100
COLUMN = 34
GLUE = "\N{NO-BREAK SPACE}"  # keeps two words on one line while wrapping
KIND_NAMES = {
    "bool": "BOOL",
    "str": "TEXT",
    "int": "N",
    "float": "X",
    "dict": "JSON",
    "list": "TEXT ...",
    "list[int]": "N ...",
    "list[float]": "X ...",
}
FAMILIES = re.compile(  # names to come that are listed as one `prefix_*`
    "(bnb|chord|cosine|ddp|eval|fipo|fp4|fp8|freeze|fsdp|hub|log|lr|moe|mtp|muon|no|optim|optimizer|overlap|quant|"
    "recompute|ref|reward|rlsd|rollout|ssl|swanlab|teacher|torch_compile|trackio|trainable|vit|vllm|wandb)_"
)


def program_help(program: str) -> str:
    """What `swift --help` prints."""
    commands = commands_of(program)
    lines = [f"usage: {program} COMMAND [FILE.yaml] [--flag VALUE ...]", "", "commands:"]
    lines += [
        f"  {command.name:<12}{command.help}{'' if command.run else '  (not yet)'}" for command in commands
    ]
    lines += [
        "",
        f"  {program} COMMAND --help                flags of a command, with units and defaults",
        f"  {program} COMMAND ... --print_config    resolve everything, print it as YAML, load nothing",
        f"  {program} --version",
    ]
    return "\n".join(lines)


def command_help(command: Command) -> str:
    """What `swift sft --help` prints: the groups of its config, then what is not there yet."""
    typed = " ".join([command.title, *map(str.upper, command.leading)])
    lines = [
        f"usage: {typed} [FILE.yaml] [--flag VALUE ...]",
        "",
        f"{command.help[0].upper()}{command.help[1:]}.",
    ]
    if not command.run:
        lines.append("Not yet in this version: it resolves with --print_config, but does not run.")
    lines.append("Booleans may stand alone, lists take several words, a file's values yield to flags.")
    defaults, group = dict(command.defaults), ""
    for name, knob in knobs_of(command).items():
        if knob.group != group:
            group = knob.group
            lines += ["", f"{group}: {_summary(knob.owner)}"]
        lines += _describe(knob, defaults.get(name, knob.default))
    lines += ["", "other:", *_entry("--print_config", "print all of this as YAML and exit")]
    later = later_names(command)
    if later:
        lines += ["", "not yet in this version:"]
        lines += textwrap.wrap(
            " ".join(later), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
        )
    return "\n".join(lines)


def later_names(command: Command) -> list[str]:
    """Flags to come; families such as vllm_* as one word."""
    knobs = knobs_of(command)
    names = sorted(
        name
        for name, row in fates_of(command).items()
        if row.fate == "later" and name.split("=")[0] not in knobs
    )
    matches = {name: FAMILIES.match(name) for name in names}
    families = {name: match[1] if match else name for name, match in matches.items()}
    sizes = Counter(families.values())
    return list(
        dict.fromkeys(name if sizes[family] == 1 else f"{family}_*" for name, family in families.items())
    )


def _summary(owner: type) -> str:
    """The first line of a group's docstring, else of the module that declares it."""
    own = owner.__doc__ or ""
    generated = own.startswith(f"{owner.__name__}(")  # what dataclass writes where there is none
    text = (sys.modules[owner.__module__].__doc__ if generated else own) or owner.__name__
    return text.strip().splitlines()[0]


def _describe(knob: Knob, default: Any) -> list[str]:
    choices = ", ".join(map(str, knob.choices)) if knob.choices else ""
    kind = KIND_NAMES[kind_of(knob)]
    unit = f"{knob.unit}, " if knob.unit else ""
    text = f"{knob.help}{f'; one of {choices}' if choices else ''} [{unit}default{GLUE}{_show(default)}]"
    return _entry(f"--{knob.name} {kind}", text)


def _show(default: Any) -> str:
    if default is MISSING:
        return "required"
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None or default == {} else to_word(to_plain(default))


def _entry(left: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False, break_long_words=False)
    lines = [line.replace(GLUE, " ") for line in lines]
    first = f"  {left}".ljust(COLUMN)
    if len(left) > COLUMN - 4:
        return [first, *(" " * COLUMN + line for line in lines)]
    return [first + lines[0], *(" " * COLUMN + line for line in lines[1:])]
