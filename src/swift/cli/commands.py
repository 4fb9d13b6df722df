"""The one table of sub-commands. It holds import strings; what is behind them is imported when needed."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from swift.config.option import ConfigError

GROUPS = {"train": ("pt", "sft", "rlhf"), "serve": ("infer", "deploy", "rollout", "eval", "app")}


@dataclass(frozen=True, slots=True)
class Command:
    """A sub-command as typed, the import strings behind it, and defaults that differ from its config's."""

    program: str
    name: str
    config: str
    run: str | None
    help: str
    distributed: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()
    leading: tuple[str, ...] = ()  # flags that words before the first flag stand for; the last takes the rest
    can_spread: bool = False  # over all GPUs by itself, where nothing says how many processes
    wraps: bool = False  # another command, which follows its own flags

    @property
    def title(self) -> str:
        return f"{self.program} {self.name}"

    @property
    def scopes(self) -> frozenset[str]:
        """Every scope of fates.tsv that it is in, such as both, swift, sft, train, swift:sft, swift:train."""
        own = "export" if self.name == "merge-lora" else self.name
        words = {own} | {group for group, names in GROUPS.items() if own in names}
        # No earlier tool has these commands: its scripts' flags mean nothing there, but for a few.
        common = set() if self.name in ("dataset", "launch") else {"both", self.program}
        return frozenset(common | words | {f"{self.program}:{word}" for word in words})


SFT, RLHF, INFER, DEPLOY, ROLLOUT, EXPORT, DATASET, WEB_UI = (
    f"swift.config.runs:{name}Run"
    for name in ("Sft", "Rlhf", "Infer", "Deploy", "Rollout", "Export", "Dataset", "WebUi")
)
MEGATRON_SFT, MEGATRON_RLHF, MEGATRON_EXPORT = (
    f"swift.config.megatron_runs:Megatron{name}Run" for name in ("Sft", "Rlhf", "Export")
)
RUN_PT, RUN_SFT, RUN_RLHF = (f"swift.train.run:run_{name}" for name in ("pt", "sft", "rlhf"))
PARALLEL = "swift.train.run_megatron"
RUN_INFER = "swift.infer.run:run_infer"
RUN_ROLLOUT = "swift.rollout.run:run_rollout"
RUN_DEPLOY = "swift.infer.server_run:run_deploy"
RUN_EXPORT = "swift.export.run:run_export"
RUN_CONVERT = "swift.export.megatron:run_export_megatron"
ALL_TOKENS, LAST_ROUND = ("loss_scale", "all"), ("loss_scale", "last_round")
PLAIN_TEXT = (ALL_TOKENS, ("use_chat_template", False))

COMMANDS = (
    Command(
        "swift", "pt", SFT, RUN_PT, "continue pre-training on plain text", True, PLAIN_TEXT, can_spread=True
    ),
    Command("swift", "sft", SFT, RUN_SFT, "fine-tune on conversations", True, can_spread=True),
    Command(
        "swift",
        "rlhf",
        RLHF,
        RUN_RLHF,
        "learn from preferences and rewards: DPO, KTO, reward models",
        True,
        (LAST_ROUND,),
        can_spread=True,
    ),
    Command("swift", "infer", INFER, RUN_INFER, "chat with a model, or answer a dataset", True),
    Command("swift", "deploy", DEPLOY, RUN_DEPLOY, "serve a model over an OpenAI-compatible API"),
    Command("swift", "rollout", ROLLOUT, RUN_ROLLOUT, "serve answers to a training, through vLLM"),
    Command("swift", "sample", INFER, None, "sample many answers and keep the best"),
    Command("swift", "export", EXPORT, RUN_EXPORT, "merge adapters, convert, quantise, upload"),
    Command(
        "swift",
        "dataset",
        DATASET,
        "swift.dataset.run:run_dataset",
        "inspect and preview training data",
        leading=("action", "dataset"),
    ),
    Command(
        "swift",
        "launch",
        "swift.config.launch:LaunchRun",
        "swift.cli.launch:run_launch",
        "run a command on several machines",
        wraps=True,
    ),
    Command("swift", "eval", INFER, None, "measure a model on benchmarks"),
    Command("swift", "app", INFER, None, "chat in the browser"),
    Command("swift", "web-ui", WEB_UI, None, "train from the browser"),
    Command(
        "swift", "merge-lora", EXPORT, RUN_EXPORT, "export --merge_lora true", False, (("merge_lora", True),)
    ),
    Command(
        "megatron",
        "pt",
        MEGATRON_SFT,
        f"{PARALLEL}:run_pt",
        "continue pre-training in parallel",
        True,
        PLAIN_TEXT,
        can_spread=True,
    ),
    Command(
        "megatron", "sft", MEGATRON_SFT, f"{PARALLEL}:run_sft", "fine-tune in parallel", True, can_spread=True
    ),
    Command(
        "megatron",
        "rlhf",
        MEGATRON_RLHF,
        f"{PARALLEL}:run_rlhf",
        "preferences in parallel: DPO, KTO",
        True,
        (LAST_ROUND,),
        can_spread=True,
    ),
    Command(
        "megatron",
        "export",
        MEGATRON_EXPORT,
        RUN_CONVERT,
        "convert weights in parallel",
        True,
        can_spread=True,
    ),
)


def commands_of(program: str) -> tuple[Command, ...]:
    return tuple(command for command in COMMANDS if command.program == program)


def find_command(program: str, name: str) -> Command:
    """The sub-command called `name`; `_` and `-` are the same."""
    table = {command.name: command for command in commands_of(program)}
    wanted = name.replace("_", "-")
    if wanted in table:
        return table[wanted]
    near = closest(wanted, table)
    hint = f"did you mean `{program} {near}`?" if near else f"`{program} --help` lists the commands"
    raise ConfigError(f"{program} has no command {name!r}", hint=hint)


def closest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, None when nothing is near. Only mistakes pay for importing difflib."""
    matches = import_module("difflib").get_close_matches(name, list(names), n=1)
    return matches[0] if matches else None


def load(path: str) -> Any:
    """The object behind an import string `package.module:name`."""
    module, name = path.split(":")
    return getattr(import_module(module), name)
