"""The console entries `swift` and `megatron`: what to print, what to run, and how a mistake is told.

Order of checks: shell accidents, names of flags, values, flags that are not there yet, flags that contradict
each other. Only then is the code of the command imported, and torch with it.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swift import __version__
from swift.cli.commands import Command, find_command, load
from swift.cli.flags import Given, Resolved, knobs_of, resolve, split_arguments
from swift.cli.shell import repair_arguments
from swift.cli.values import kind_of, parse_value
from swift.config.option import ConfigError, build
from swift.utils import env

HELP = ("-h", "--help")
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
QUIET_SECONDS = 15


def swift_main() -> None:
    sys.exit(run(sys.argv[1:]))


def megatron_main() -> None:
    sys.exit(run(sys.argv[1:], program="megatron"))


def run(argv: Sequence[str], *, program: str = "swift") -> int:
    """Does what the arguments say; the exit code. 2 = a mistake of the user, told in words."""
    try:
        return dispatch(list(argv), program)
    except ConfigError as error:
        if env.is_on("SWIFT_DEBUG"):
            raise
        if env.read("RANK", "0") != "0":
            time.sleep(QUIET_SECONDS)  # the first process has mostly made the same mistake, and tells it
        for line in error.message.splitlines():
            print(f"error: {line}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def dispatch(argv: list[str], program: str) -> int:
    """As `run`, but raises."""
    argv, warnings = repair_arguments(argv)
    for warning in warnings:
        note(f"warning: {warning}")
    if not argv or argv[0] in (*HELP, "help"):
        return show(load("swift.cli.helptext:program_help")(program))
    if argv[0] == "--version":
        return show(__version__)
    command = find_command(program, argv[0])
    if env.read("SWIFT_PLAN") and command.name in ("pt", "sft", "rlhf", "launch"):
        argv = ["plan", *shlex.split(env.read("SWIFT_PLAN") or ""), program, *argv]
        command = find_command("swift", "plan")
    behind: list[str] = []
    if command.how == "wraps":
        argv, behind = load("swift.cli.launch:split_command")(argv)
    if any(word in HELP for word in argv[1:]):
        return show(load("swift.cli.helptext:command_help")(command))
    if env.read("MEGATRON_LM_PATH"):
        note(f"note: MEGATRON_LM_PATH has {env.VARIABLES['MEGATRON_LM_PATH']}")
    resolved, wants_print = read_flags(command, argv[1:], behind)
    if wants_print and parse_value("--print_config", "bool", wants_print[-1].words):
        return show(load("swift.cli.configfile:dump_config")(resolved), end="")
    return execute(command, resolved, argv)


def read_flags(command: Command, argv: list[str], behind: Sequence[str] = ()) -> tuple[Resolved, list[Given]]:
    """What a command's flags mean, notes told, and --print_config. `behind`: a command that it wraps."""
    given = read_given(name_leading(argv, command.leading))
    if behind:
        given.append(Given("the command", "command", tuple(behind)))
    resolved = resolve(command, [item for item in given if item.name != "print_config"])
    for line in resolved.notes:
        note(line if line.startswith("warning") else f"note: {line}")
    return resolved, [item for item in given if item.name == "print_config"]


def understand(program: str, argv: list[str]) -> tuple[Resolved, Any, dict[str, Any]]:
    """A command that another one wraps: its flags, its config, checked, and its values by flag."""
    argv, warnings = repair_arguments(argv)
    for warning in warnings:
        note(f"warning: {warning}")
    if not argv:
        raise ConfigError(f"{program} needs a command", hint=f"{program} --help lists them")
    resolved, _ = read_flags(find_command(program, argv[0]), argv[1:])
    return resolved, *build_config(resolved)


def name_leading(argv: list[str], names: Sequence[str]) -> list[str]:
    """The words before the first flag as flags: one for each name, the rest for the last."""
    if not names or not argv or argv[0].endswith(CONFIG_SUFFIXES):
        return argv
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    named: list[str] = []
    for i, name in enumerate(names[:count]):
        named += [f"--{name}", *(argv[i:count] if name == names[-1] else argv[i : i + 1])]
    return named + argv[count:]


def read_given(argv: list[str]) -> list[Given]:
    """Flags of the file in front, if there is one, then those of the command line, which win."""
    if not argv or not argv[0].endswith(CONFIG_SUFFIXES):
        return split_arguments(argv)
    from_file, variables = load("swift.cli.configfile:read_config")(Path(argv[0]))
    env.set_defaults(variables)
    return [*from_file, *split_arguments(argv[1:])]


def execute(command: Command, resolved: Resolved, argv: list[str]) -> int:
    """Builds the config, then imports and calls the command; or starts it again as several processes."""
    if command.run is None:
        raise ConfigError(
            f"{command.title}: not yet in this version", hint="--print_config shows what it would be given"
        )
    config, values = build_config(resolved)
    if command.how in ("ranks", "spread") and asks_for_processes():
        check_place()
        spread: int = load("swift.engines.launch:launch")(command.program, argv)
        return spread
    if command.how == "spread" and env.read("LOCAL_RANK") is None:
        check_place()
    if command.how == "spread" and may_take_all_gpus(values) and env.count_gpus() > 1:
        taken: int | None = load("swift.engines.launch:launch_on_gpus")(command.program, argv)
        if taken is not None:
            return taken
    # Before torch is loaded: its CPU threads otherwise wait by spinning, which on a machine that is busy with
    # anything else made a training step four times as long.
    env.set_defaults({"OMP_WAIT_POLICY": "PASSIVE"})
    quiet_deepspeed()
    code: int = load(command.run)(config)
    return code


def build_config(resolved: Resolved) -> tuple[Any, dict[str, Any]]:
    """The config of a command, checked, and the values by flag. ConfigError for flags that are to come."""
    command = resolved.command
    if resolved.stops:
        many = len(resolved.stops) > 1
        raise ConfigError(
            f"{', '.join(resolved.stops)} {'are' if many else 'is'} not yet supported in this version; "
            f"remove {'them' if many else 'it'}"
        )
    values: dict[str, Any] = dict(command.defaults) | resolved.values
    for name, knob in knobs_of(command).items():
        if kind_of(knob) == "dict" and isinstance(values.get(name), str):
            values[name] = load("swift.cli.configfile:read_json_object")(name, Path(values[name]))
    config = build(load(command.config), values)
    config.check()
    return config, values


def quiet_deepspeed() -> None:
    """Where it is installed, other packages import it, and it tells stdout how it looked for GPUs."""
    import logging

    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def asks_for_processes() -> bool:
    """Whether the environment asks for several processes, and this is not yet one of them."""
    counts = {name: env.read(name, "1") or "1" for name in ("NPROC_PER_NODE", "NNODES")}
    for name, text in counts.items():
        if not text.isdecimal() or text == "0":
            raise ConfigError(
                f"{name}={text} is not a number of processes", hint=f"unset {name}, or give a number"
            )
    return env.read("LOCAL_RANK") is None and any(text != "1" for text in counts.values())


def check_place() -> None:
    """Whether the variables of several nodes, where there are any, make one job of them."""
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "WORLD_SIZE", "SLURM_STEP_NUM_NODES")
    if any(env.read(name) for name in names):
        warning = load("swift.cli.launch_cluster:check_place")()
        if warning:
            note(f"warning: {warning}")


def may_take_all_gpus(values: dict[str, Any]) -> bool:
    """Whether nothing says how many processes there should be, or on which device."""
    alone = all(env.read(name) is None for name in ("NPROC_PER_NODE", "NNODES", "LOCAL_RANK", "WORLD_SIZE"))
    return alone and values.get("device") is None


def note(line: str) -> None:
    """One line on stderr. The process that started several others has said it already."""
    if env.read("LOCAL_RANK") is not None:
        return
    print(line, file=sys.stderr)


def show(text: str, end: str = "\n") -> int:
    """Prints a result. A reader that has seen enough, such as head, is no error."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
