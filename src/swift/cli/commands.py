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
    # alone = in one process, ranks = in several; spread = over all GPUs, where nothing says how many; wraps =
    # in one, and another command follows its own flags
    how: str = "alone"
    defaults: tuple[tuple[str, Any], ...] = ()
    leading: tuple[str, ...] = ()  # flags that words before the first flag stand for; the last takes the rest

    @property
    def title(self) -> str:
        return f"{self.program} {self.name}"

    @property
    def scopes(self) -> frozenset[str]:
        """Every scope of fates.tsv that it is in, such as both, swift, sft, train, swift:sft, swift:train."""
        own = "export" if self.name == "merge-lora" else self.name
        words = {own} | {group for group, names in GROUPS.items() if own in names}
        # No earlier tool has these commands: its scripts' flags mean nothing there, but for a few.
        common = set() if self.how == "wraps" or self.name == "dataset" else {"both", self.program}
        return frozenset(common | words | {f"{self.program}:{word}" for word in words})


SFT, RLHF, INFER, DEPLOY, ROLLOUT, EXPORT, DATASET, WEB_UI = (
    f"swift.config.runs:{name}Run"
    for name in ("Sft", "Rlhf", "Infer", "Deploy", "Rollout", "Export", "Dataset", "WebUi")
)
MEGATRON_SFT, MEGATRON_RLHF, MEGATRON_EXPORT = (
    f"swift.config.megatron_runs:Megatron{name}Run" for name in ("Sft", "Rlhf", "Export")
)
TRAIN, PARALLEL, SERVER = "swift.train.run:run_", "swift.train.run_megatron:run_", "swift.infer.server_run"
CLI, RUN_INFER, RUN_ROLLOUT = "swift.cli", "swift.infer.run:run_infer", "swift.rollout.run:run_rollout"
ALL_TOKENS, LAST_ROUND = ("loss_scale", "all"), ("loss_scale", "last_round")
PLAIN_TEXT = (ALL_TOKENS, ("use_chat_template", False))
RUN_EXPORT = "swift.export.run:run_export"
LAUNCH, PLAN = "swift.config.launch:LaunchRun", "swift.config.plan:PlanRun"

ROWS: tuple[tuple[Any, ...], ...] = (
    ("swift", "pt", SFT, f"{TRAIN}pt", "continue pre-training on plain text", "spread", PLAIN_TEXT),
    ("swift", "sft", SFT, f"{TRAIN}sft", "fine-tune on conversations", "spread"),
    (
        "swift", "rlhf", RLHF, f"{TRAIN}rlhf",
        "learn from preferences and rewards: DPO, KTO, reward models", "spread", (LAST_ROUND,),
    ),
    ("swift", "infer", INFER, RUN_INFER, "chat with a model, or answer a dataset", "ranks"),
    ("swift", "deploy", DEPLOY, f"{SERVER}:run_deploy", "serve a model over an OpenAI-compatible API"),
    ("swift", "rollout", ROLLOUT, RUN_ROLLOUT, "serve answers to a training, through vLLM"),
    ("swift", "sample", INFER, None, "sample many answers and keep the best"),
    ("swift", "export", EXPORT, RUN_EXPORT, "merge adapters, convert, quantise, upload"),
    (
        "swift", "dataset", DATASET, "swift.dataset.run:run_dataset", "inspect and preview training data",
        "alone", (), ("action", "dataset"),
    ),
    ("swift", "launch", LAUNCH, f"{CLI}.launch:run_launch", "run a command on several machines", "wraps"),
    ("swift", "plan", PLAN, f"{CLI}.plan:run_plan", "memory, time and GPUs that a training takes", "wraps"),
    ("swift", "eval", INFER, None, "measure a model on benchmarks"),
    ("swift", "app", INFER, None, "chat in the browser"),
    ("swift", "web-ui", WEB_UI, None, "train from the browser"),
    ("swift", "merge-lora", EXPORT, RUN_EXPORT, "export --merge_lora true", "alone", (("merge_lora", True),)),
    (
        "megatron", "pt", MEGATRON_SFT, f"{PARALLEL}pt", "continue pre-training in parallel", "spread",
        PLAIN_TEXT,
    ),
    ("megatron", "sft", MEGATRON_SFT, f"{PARALLEL}sft", "fine-tune in parallel", "spread"),
    (
        "megatron", "rlhf", MEGATRON_RLHF, f"{PARALLEL}rlhf", "preferences in parallel: DPO, KTO",
        "spread", (LAST_ROUND,),
    ),
    (
        "megatron", "export", MEGATRON_EXPORT, "swift.export.megatron:run_export_megatron",
        "convert weights in parallel", "spread",
    ),
)  # fmt: skip
COMMANDS = tuple(Command(*row) for row in ROWS)


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
