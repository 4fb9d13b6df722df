"""Optimizers go on from a checkpoint to the bit, groups have their rates, schedules follow their formulas."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from swift.config.optim import OPTIMIZERS, OptimConfig
from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig
from swift.data.collate import collate
from swift.engines.optim import build_scheduler, check_optim, parse_settings, warmup_steps
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora
from swift.models.load import load_model
from swift.objectives.sft import Sft
from swift.plugins.hooks import optimizers_map
from swift.template.tokenize import Encoded

STEPS, CUT = 6, 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, make_tiny_model_dir: Callable[..., Path]) -> Path:
    return make_tiny_model_dir(tmp_path_factory.mktemp("models"), "llama", num_hidden_layers=1)


def build_engine(path: Path, config: OptimConfig, *, lora: bool = False, **options) -> TransformersEngine:
    model = load_model(path, dtype=None, attention=None, device=torch.device("cpu"))
    if lora:
        model = add_lora(model, TunerConfig(lora_rank=4, lora_dropout=0.0), seed=1)
    return TransformersEngine(model, config, learning_rate=1e-2, total_steps=STEPS, **options)


def train(engine: TransformersEngine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        ids = np.random.RandomState(step).randint(3, 250, (2, 12)).astype(np.int32)
        batches = [collate([Encoded(row, row, None) for row in ids])]
        total, count = engine.forward_backward(batches, Sft()).pairs["loss/tokens"]
        losses.append(total / count)
        engine.optim_step()
    return losses


def trained_of(engine: TransformersEngine) -> list[torch.nn.Parameter]:
    return [p for p in engine.model.parameters() if p.requires_grad]


def weights(engine: TransformersEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained_of(engine)])


def config_of(name: str) -> OptimConfig:
    schedule = "constant_with_warmup" if name.startswith("schedule_free") else "linear"
    arguments = "momentum=0.9,nesterov=true" if name == "sgd" else None
    return OptimConfig(optim=name, lr_scheduler_type=schedule, warmup_steps=2, optim_args=arguments)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_is_the_same_to_the_bit(name: str, model_dir: Path, tmp_path: Path) -> None:
    config = config_of(name)
    pytest.importorskip(config.package)
    engine = build_engine(model_dir, config)
    start = weights(engine)
    losses = train(engine, 0, CUT)
    engine.save(tmp_path, resumable=True).write()
    losses += train(engine, CUT, STEPS)
    assert losses[-1] < losses[0] and not torch.equal(weights(engine), start)
    resumed = build_engine(model_dir, config, resume_from=tmp_path)
    assert train(resumed, CUT, STEPS) == losses[CUT:]
    assert torch.equal(weights(resumed), weights(engine))


def test_adamw_follows_its_formula(model_dir: Path) -> None:
    """First step, arXiv:1711.05101 algorithm 2: w - lr (g / (|g| + eps) + decay w); no decay on vectors."""
    engine = build_engine(model_dir, OptimConfig(lr_scheduler_type="constant", max_grad_norm=0))
    engine.forward_backward([make_batch()], Sft())
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in engine.model.named_parameters()}
    engine.optim_step()
    for name, parameter in engine.model.named_parameters():
        w, g = before[name]
        decay = 0.1 if w.ndim == 2 else 0.0
        expected = w - 1e-2 * (g / (g.abs() + 1e-8) + decay * w)
        assert torch.allclose(parameter, expected, atol=1e-6), name


def make_batch():
    ids = np.random.RandomState(0).randint(3, 250, (2, 12)).astype(np.int32)
    return collate([Encoded(row, row, None) for row in ids])


def test_lora_plus_gives_b_a_rate_of_its_own(model_dir: Path, tmp_path: Path) -> None:
    config = OptimConfig(lorap_lr_ratio=16, lr_scheduler_type="linear", warmup_steps=2)
    engine = build_engine(model_dir, config, lora=True)
    names = {id(p): n for n, p in engine.model.named_parameters()}
    groups = engine.wrapped.optimizer.param_groups
    kinds = [{names[id(p)].split(".lora_")[1][0] for p in group["params"]} for group in groups]
    assert kinds == [{"A"}, {"B"}] and [group["initial_lr"] for group in groups] == [1e-2, 0.16]
    train(engine, 0, 1)
    assert [group["lr"] for group in groups] == [5e-3, 0.08]
    assert engine.scheduler.get_last_lr()[0] == 5e-3  # the rate that is logged
    train(engine, 1, CUT)
    engine.save(tmp_path, resumable=True).write()
    losses = train(engine, CUT, STEPS)
    resumed = build_engine(model_dir, config, lora=True, resume_from=tmp_path)
    assert train(resumed, CUT, STEPS) == losses and torch.equal(weights(resumed), weights(engine))


def test_muon_takes_hidden_matrices_alone(model_dir: Path) -> None:
    engine = build_engine(
        model_dir, OptimConfig(optim="muon", weight_decay=0.0, lr_scheduler_type="constant")
    )
    muon, adamw = engine.wrapped.optimizer.parts
    names = {id(p): n for n, p in engine.model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert len(hidden) == 7 and all("_proj" in n for n in hidden)
    assert rest == {n for n in names.values() if "norm" in n or "embed" in n}
    before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    train(engine, 0, 1)
    # arXiv:2502.16982: the update is orthogonal times 0.2 sqrt(max(A, B)). Its five Newton-Schulz steps bring
    # singular values near 1, not to 1 (arXiv:2409.20325); 24 tokens give a gradient of a rank up to 24.
    for name in hidden:
        update = (before[name] - engine.model.get_parameter(name)) / 1e-2
        values = torch.linalg.svdvals(update.detach() / (0.2 * math.sqrt(max(update.shape))))
        assert values[8] > 0.6 and values[0] < 1.3, name


def test_schedule_free_answers_with_the_average(model_dir: Path, tmp_path: Path) -> None:
    """arXiv:2405.15682 eq. 3 and 4: y = x + (1 - beta) (z - x) is trained, x is measured and saved."""
    schedulefree = pytest.importorskip("schedulefree")
    engine = build_engine(model_dir, config_of("schedule_free_adamw"))
    assert isinstance(engine.wrapped.optimizer, schedulefree.AdamWScheduleFree)
    train(engine, 0, CUT)
    trained = weights(engine)
    engine.save(tmp_path, resumable=False).write()
    assert torch.allclose(weights(engine), trained, atol=1e-6)
    saved = load_model(tmp_path, dtype=None, attention=None, device=torch.device("cpu"))
    average = torch.cat([p.detach().flatten() for p in saved.parameters()])
    z = torch.cat([engine.wrapped.optimizer.state[p]["z"].flatten() for p in trained_of(engine)])
    assert (average - trained).abs().max() > 1e-4
    assert torch.allclose(trained, average + 0.1 * (z - average), atol=1e-6)
    measured = engine.measure([make_batch()], Sft()).pairs["loss/tokens"][0]
    fresh = build_engine(tmp_path, OptimConfig()).measure([make_batch()], Sft()).pairs["loss/tokens"][0]
    assert measured == pytest.approx(fresh, rel=1e-6)


def test_a_plugin_brings_its_optimizer(model_dir: Path) -> None:
    def create(settings, model, dataset):
        assert dataset is None
        return torch.optim.SGD(model.parameters(), lr=settings.learning_rate * settings.adam_beta1), None

    optimizers_map["mine"] = create
    try:
        engine = build_engine(model_dir, OptimConfig(optimizer="mine", lr_scheduler_type="constant"))
        check_optim(OptimConfig(optimizer="mine"))
    finally:
        del optimizers_map["mine"]
    assert type(engine.wrapped.optimizer) is torch.optim.SGD
    assert engine.scheduler.get_last_lr() == [pytest.approx(9e-3)]
    with pytest.raises(ConfigError, match="no optimizer is called mine"):
        check_optim(OptimConfig(optimizer="mine"))


def rates(total: int, **settings) -> list[float]:
    """Rates of each step, for a peak of 1."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = build_scheduler(optimizer, OptimConfig(**settings), total)
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def wave(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# Steps 4 to 19 of 20 after 4 of warm-up, so a sixteenth of the decay is a step.
FORMULAS: dict[str, tuple[dict, Callable[[int], float]]] = {
    "linear": ({}, lambda i: 1 - i / 16),
    "cosine": ({}, lambda i: wave(i / 16)),
    "cosine_with_restarts": ({"num_cycles": 2}, lambda i: wave((2 * i / 16) % 1)),
    "polynomial": ({"power": 2.0, "lr_end": 0.1}, lambda i: 0.9 * (1 - i / 16) ** 2 + 0.1),
    "inverse_sqrt": ({}, lambda i: math.sqrt(4 / (i + 4))),
    "constant_with_warmup": ({}, lambda i: 1.0),
    "cosine_with_min_lr": ({"min_lr": 0.1}, lambda i: 0.1 + 0.9 * wave(i / 16)),
    "cosine_warmup_with_min_lr": (
        {"min_lr_rate": 0.2, "warmup_lr_rate": 0.0}, lambda i: 0.2 + 0.8 * wave((i + 1) / 16),
    ),
    "warmup_stable_decay": (
        {"num_decay_steps": 8, "min_lr_ratio": 0.5, "decay_type": "linear"},
        lambda i: 1.0 if i < 8 else 0.5 + 0.5 * (1 - (i - 8) / 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_schedules_follow_their_formulas(name: str) -> None:
    settings, formula = FORMULAS[name]
    found = rates(20, lr_scheduler_type=name, lr_scheduler_kwargs=settings, warmup_steps=4)
    slope = 3 if name == "cosine_warmup_with_min_lr" else 4  # it reaches its peak a step earlier
    floor = settings.get("min_lr_ratio", 0.0)
    assert found[:4] == pytest.approx([floor + (1 - floor) * i / slope for i in range(4)])
    assert found[4:] == pytest.approx([formula(i) for i in range(16)])


def test_the_tail_of_warmup_stable_decay_is_a_tenth() -> None:
    found = rates(40, lr_scheduler_type="warmup_stable_decay", warmup_ratio=0.1)
    assert found[4:36] == [1.0] * 32 and found[36:] == pytest.approx([wave(i / 4) for i in range(4)])


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "warmup_stable_decay"])
def test_min_lr_is_where_a_decay_ends(name: str) -> None:
    """Warm-up and peak stay; what the decay gives is squeezed between the peak and --min_lr."""
    plain = rates(21, lr_scheduler_type=name, warmup_steps=4)
    found = rates(21, lr_scheduler_type=name, warmup_steps=4, min_lr=0.1)
    assert found[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert found[5:] == pytest.approx([0.1 + 0.9 * rate for rate in plain[5:]])
    assert min(found[4:]) > 0.1


def test_min_lr_that_means_nothing() -> None:
    for settings, message in (
        ({"min_lr": 1e-3}, "--min_lr 0.001 is above --learning_rate 1e-05"),
        (
            {"min_lr": 1e-6, "lr_scheduler_type": "constant"},
            "--min_lr has no effect with --lr_scheduler_type constant",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            OptimConfig(**settings).check(train_type="full", slicer=None)
        assert caught.value.message == message


def test_constant_is_constant() -> None:
    assert rates(5, lr_scheduler_type="constant") == [1.0] * 5


def test_warm_up_in_steps_or_as_a_share() -> None:
    assert warmup_steps(OptimConfig(warmup_steps=7), 100) == 7
    assert warmup_steps(OptimConfig(warmup_steps=0.055), 100) == 6
    assert warmup_steps(OptimConfig(warmup_ratio=0.055), 100) == 6
    assert warmup_steps(OptimConfig(warmup_ratio=0.5, warmup_steps=3), 100) == 3


def test_settings_of_an_optimizer() -> None:
    assert parse_settings("momentum=0.9, nesterov=true,mode=fast") == {
        "momentum": 0.9, "nesterov": True, "mode": "fast",
    }  # fmt: skip
    assert parse_settings(None) == {}
    with pytest.raises(ConfigError, match="--optim_args expects name=value, got 'momentum'"):
        parse_settings("momentum")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "sgd", "optim_args": "speed=3"}, "--optim sgd: .* unexpected keyword argument 'speed'"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "--optim sgd: Invalid momentum value: -1"),
        ({"lr_scheduler_kwargs": {"min": 3}}, r'--lr_scheduler_kwargs {"min": 3}: .* argument \'min\''),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_kwargs {}: One of min_lr"),
        ({"optimizer": "moun"}, "no optimizer is called moun"),
    ],
)
def test_wrong_settings_are_told_without_a_model(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optim(OptimConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "schedule_free_sgd"}, "schedule_free_sgd has no decay, so --lr_scheduler_type cosine"),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
            "--lr_scheduler_type constant has no warm-up",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}},
            "--lr_scheduler_kwargs: constant has no settings",
        ),
        ({"optimizer": "lorap"}, "--optimizer lorap needs --lorap_lr_ratio"),
        ({"lorap_lr_ratio": 4.0}, "--lorap_lr_ratio has no effect with --train_type full"),
        ({"optim": "adafactor"}, "--optim adafactor with --fsdp is not supported"),
    ],
)
def test_optimizers_that_cannot_work_are_refused(settings: dict, message: str, monkeypatch) -> None:
    monkeypatch.setattr("swift.config.optim.require_package", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**settings).check(train_type="full", slicer="--fsdp")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("adamw_8bit", "bitsandbytes"), ("schedule_free_adamw", "schedulefree")):
        with pytest.raises(ConfigError) as caught:
            OptimConfig(optim=name).check(train_type="lora", slicer=None)
        assert caught.value.message == f"--optim {name} needs the package {package}"
        assert caught.value.hint.startswith(f"pip install '{package}>=")
