"""Which modules and weights of a model get an adapter, and which are trained whole beside it.

Owns: --target_modules, --target_regex, --target_parameters, --modules_to_save, checked against the model.
Not here: the adapters themselves (adapters.py).
"""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig

ALL_LINEAR, ALL_EMBEDDING, ALL_NORM = "all-linear", "all-embedding", "all-norm"
EXPERTS = "experts"  # the module of transformers that holds all experts of a layer as 3-d weights
ROUTERS = ("gate", "router", "shared_expert_gate")
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Targets:
    """What PEFT is told. `modules`: ends of module names, or a pattern of whole names."""

    modules: str | list[str]
    parameters: list[str]
    whole: list[str]


def choose_targets(model: PreTrainedModel, config: TunerConfig) -> Targets:
    """From flags to names; ConfigError for a name that the model does not have."""
    whole = expand_whole(model, config.modules_to_save)
    parameters = list(config.target_parameters)
    check_ends(parameters, [name for name, _ in model.named_parameters()], "--target_parameters", "weight")
    modules: str | list[str]
    if config.target_regex is not None:
        modules = config.target_regex
        if not any(re.fullmatch(modules, name) for name, _ in model.named_modules()):
            known = next((n for n, module in model.named_modules() if isinstance(module, nn.Linear)), "")
            raise ConfigError(f"--target_regex {modules} matches no module", hint=f"a whole name is {known}")
    else:
        modules = [name for name in config.target_modules if not name.startswith("all-")]
        check_names(model, modules)
        if ALL_LINEAR in config.target_modules:
            found, stacks = linear_layers(model)
            modules += found
            parameters = parameters or stacks
        if ALL_EMBEDDING in config.target_modules:
            modules += embeddings(model)
        unknown = [
            n for n in config.target_modules if n.startswith("all-") and n not in (ALL_LINEAR, ALL_EMBEDDING)
        ]
        if unknown or not (modules or parameters):
            raise ConfigError(
                f"--target_modules {' '.join(unknown) or 'is empty'}",
                hint=f"{ALL_LINEAR}, {ALL_EMBEDDING}, or names of modules",
            )
        modules = [name for name in modules if name not in whole]
    targets = Targets(modules, parameters, whole)
    check_tied(model, targets)
    flag = "--use_dora" if config.use_dora else f"--init_weights {config.init_weights}"
    if targets.parameters and (config.use_dora or config.init_weights not in ("true", "false", "gaussian")):
        raise ConfigError(
            f"{flag} has no form for {targets.parameters[0]}",
            hint=f"name the linear layers with --target_modules, or leave {flag.split()[0]} out",
        )
    return targets


def linear_layers(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """All linear layers but the output layer and routers; and weights that hold the experts of a layer.

    A router is left out because moving it changes which experts see a token, which sets off far more than a
    low-rank update. PEFT takes projections of other layers of such a model for names of experts: they go by
    the names of their weights.
    """
    stacks = {
        short(name) for name, p in model.named_parameters() if p.ndim == 3 and name.split(".")[-2] == EXPERTS
    }
    output = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and name.rpartition(".")[2] not in ROUTERS
    ]
    mistaken = [
        name for name in linear if stacks and re.search(r"\.(gate_proj|up_proj|down_proj|w[123])$", name)
    ]
    stacks |= {f"{short(name)}.weight" for name in mistaken}
    return sorted({name.rpartition(".")[2] for name in linear if name not in mistaken}), sorted(stacks)


def short(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def embeddings(model: nn.Module) -> list[str]:
    return [
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    ]


def expand_whole(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    plain = [name for name in names if name not in (ALL_EMBEDDING, ALL_NORM)]
    check_names(model, plain, flag="--modules_to_save")
    if ALL_EMBEDDING in names:
        plain += embeddings(model)
    if ALL_NORM in names:
        norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()]
        plain += [n.rpartition(".")[2] for n in norms]
    return sorted(set(plain))


def check_names(model: nn.Module, names: list[str], *, flag: str = "--target_modules") -> None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    shown = sorted({name.rpartition(".")[2] for name in linear})[:NAMES_SHOWN]
    hint = f"linear layers of this model: {', '.join(shown)}"
    check_ends(names, [name for name, _ in model.named_modules()], flag, "module", hint)


def check_ends(names: list[str], known: list[str], flag: str, what: str, hint: str | None = None) -> None:
    unknown = [name for name in names if not any(k == name or k.endswith(f".{name}") for k in known)]
    if unknown:
        hint = hint or f"a whole name is {known[len(known) // 2]}"
        raise ConfigError(f"{flag}: the model has no {what} called {', '.join(unknown)}", hint=hint)


def check_tied(model: PreTrainedModel, targets: Targets) -> None:
    """ConfigError for adapters on a matrix that is both embedding and output layer: they cannot be merged."""
    if not model.config.get_text_config().tie_word_embeddings:
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if isinstance(targets.modules, str):
            is_target = re.fullmatch(targets.modules, name) is not None
        else:
            is_target = any(name == end or name.endswith(f".{end}") for end in targets.modules)
        if module in ends and is_target:
            raise ConfigError(
                f"--target_modules: {name} of this model is both embedding and output layer",
                hint=f"train it whole instead: --modules_to_save {name.rpartition('.')[2]}",
            )
