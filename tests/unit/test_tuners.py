"""Every way to train a part of a model: what moves, what is saved, and that a merge answers alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.config.tuner import TunerConfig
from swift.data.collate import collate
from swift.engines.transformers.engine import TransformersEngine
from swift.models.adapters import add_lora, describe_adapters, load_adapter, merge, set_up
from swift.models.freezing import freeze
from swift.models.load import load_model
from swift.objectives.sft import Sft
from swift.template.tokenize import Encoded

IDS = torch.arange(3, 40)[None]
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def load(path: Path) -> PreTrainedModel:
    return load_model(path, dtype=None, attention=None, device=torch.device("cpu"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def train(model: torch.nn.Module, steps: int = 3, **options: object) -> tuple[TransformersEngine, set[str]]:
    """Trains in place on random rows; the engine, and the names of the parameters that changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = OptimConfig(weight_decay=0.0, lr_scheduler_type="constant", **options)
    # Attention of transformers' own, so that scores can be asked of the model by themselves afterwards.
    engine = TransformersEngine(model, config, learning_rate=1e-2, total_steps=steps, own_attention=False)
    random = np.random.RandomState(0)
    for _ in range(steps):
        ids = random.randint(3, 250, (2, 12)).astype(np.int32)
        engine.forward_backward([collate([Encoded(row, row, None) for row in ids])], Sft())
        engine.optim_step()
    return engine, {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_tiny_model_dir) -> dict[str, Path]:
    """A Llama with biases and another output layer than the embedding; a tied one; a mixture of experts."""
    root = tmp_path_factory.mktemp("models")
    biased = make_tiny_model_dir(root / "1", "llama", tie_word_embeddings=False, attention_bias=True)
    config = Qwen3MoeConfig(
        vocab_size=448, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        mlp_only_layers=[1], eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    Qwen3MoeForCausalLM(config).to(torch.float32).save_pretrained(root / "moe")
    return {"biased": biased, "tied": make_tiny_model_dir(root / "2", "llama"), "moe": root / "moe"}


# model, flags -> ends of modules that have an adapter, and what else is trained
CASES = {
    "rslora": ("tied", {"use_rslora": True}, LINEAR, set()),
    "dora": ("tied", {"use_dora": True}, LINEAR, set()),
    "gaussian": ("tied", {"init_weights": "gaussian"}, LINEAR, set()),
    "orthogonal": ("tied", {"init_weights": "orthogonal"}, LINEAR, set()),
    "random": ("tied", {"init_weights": "false"}, LINEAR, set()),
    "pissa": ("tied", {"init_weights": "pissa"}, LINEAR, set()),
    "pissa_niter": ("tied", {"init_weights": "pissa_niter_4", "use_rslora": True}, LINEAR, set()),
    "olora": ("biased", {"init_weights": "olora", "modules_to_save": ("lm_head",)}, LINEAR, {"lm_head"}),
    "regex": ("tied", {"target_regex": r".*layers\.1\..*(q|v)_proj"}, {"q_proj", "v_proj"}, set()),
    "biases": ("biased", {"lora_bias": "all", "target_modules": ("q_proj",)}, {"q_proj"}, {"bias"}),
    "embedding": ("biased", {"target_modules": ("all-embedding",)}, {"embed_tokens"}, set()),
    "head": ("biased", {"modules_to_save": ("lm_head",)}, LINEAR, {"lm_head"}),
    "tied": ("tied", {"modules_to_save": ("all-embedding", "all-norm")}, LINEAR, {"embed_tokens", "norm"}),
    "experts": ("moe", {"lora_dropout": 0.05}, LINEAR | {"experts"}, set()),
    "some experts": ("moe", {"target_modules": ("q_proj",), "target_parameters": ("experts.down_proj",)},
                     {"q_proj", "experts"}, set()),
}  # fmt: skip


FROM_WEIGHTS = ("pissa", "pissa_niter", "olora")


@pytest.mark.parametrize("case", CASES)
def test_trains_what_it_says_and_comes_back(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    name, flags, adapted, whole = CASES[case]
    model = add_lora(load(models[name]), TunerConfig(lora_rank=4, **({"lora_dropout": 0.0} | flags)), seed=1)
    start = {n for n, p in model.named_parameters() if p.requires_grad}
    engine, moved = train(model)
    assert moved == start
    adapters = {n for n in moved if "lora_" in n}
    ends = {n.split(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2] for n in adapters}
    assert ends == adapted
    for n in moved - adapters:
        assert any(part in n for part in whole), n
    assert all(any(part in n for n in moved - adapters) for part in whole)
    expected = logits(model)
    assert (logits(load(models[name])) - expected).abs().max() > 0.02
    engine.save(tmp_path, resumable=False).write()
    loaded = load_adapter(load(models[name]), tmp_path, trainable=False)
    assert (logits(loaded) - expected).abs().max() <= (1e-5 if case in FROM_WEIGHTS else 0.0)
    merged = merge(loaded)
    assert (logits(merged) - expected).abs().max() < 2e-5
    merged.save_pretrained(tmp_path / "merged")
    assert (logits(load(tmp_path / "merged")) - expected).abs().max() < 2e-5
    # What another engine is handed while this one trains on: the same files, and nothing here has changed.
    handed = {name: tensor.clone() for name, tensor in engine.weights()}
    files = load_file(tmp_path / "merged" / "model.safetensors")
    assert handed.keys() == files.keys()
    for n, tensor in files.items():
        assert (handed[n] - tensor).abs().max() <= (1e-5 if case in FROM_WEIGHTS else 0.0), n
    assert torch.equal(logits(model), expected)


def test_handed_weights_are_rounded_once(models: dict[str, Path]) -> None:
    """Adapters in float32 beside bfloat16: their sum is rounded, not each product before it is added."""
    model = add_lora(load(models["tied"]).bfloat16(), TunerConfig(lora_rank=4, init_weights="false"), seed=1)
    engine = TransformersEngine(model, OptimConfig(), learning_rate=0.0, total_steps=1)
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    product = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    expected = (layer.base_layer.weight.float() + product).bfloat16()
    handed = dict(engine.weights())[f"{name}.weight"]
    assert handed.dtype == torch.bfloat16 and torch.equal(handed, expected)
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="the adapters cannot be merged: NaNs detected"):
        list(engine.weights())


def test_the_scale_of_rank_stabilised_adapters(models: dict[str, Path]) -> None:
    """arXiv:2312.03732: alpha / sqrt(rank)."""
    for flags, scale in (({}, 32 / 16), ({"use_rslora": True}, 32 / 4)):
        model = add_lora(load(models["tied"]), TunerConfig(lora_rank=16, **flags), seed=1)
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert layer.scaling["default"] == scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_out_of_the_weights(
    start: str, dtype: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model answers as before at first, B0 A0 is its best part, and a resumed run goes on to the bit."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")

    def base() -> PreTrainedModel:
        return load_model(models["tied"], dtype=dtype, attention=None, device=torch.device("cpu"))

    config = TunerConfig(lora_rank=4, lora_alpha=8, lora_dropout=0.0, init_weights=start)
    model = add_lora(base(), config, seed=1)
    difference = (logits(model) - logits(base())).abs().max()
    assert 0 < difference < (1e-5 if dtype == "float32" else 0.1)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    values = torch.linalg.svdvals(base().get_submodule("model.layers.1.mlp.down_proj").weight.float())
    product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if start == "pissa":
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        assert torch.allclose(torch.linalg.svdvals(product)[:4], values[:4], rtol=tolerance)
    engine, _ = train(model, steps=2)
    engine.save(tmp_path, resumable=True).write()
    again = TransformersEngine(
        add_lora(base(), config, seed=2, resumed=True), OptimConfig(lr_scheduler_type="constant"),
        learning_rate=1e-2, total_steps=3, own_attention=False, resume_from=tmp_path,
    )  # fmt: skip
    for (name, ours), theirs in zip(model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_of_a_mixture_of_experts_is_covered(models: dict[str, Path]) -> None:
    model = add_lora(load(models["moe"]), TunerConfig(lora_rank=4), seed=1)
    assert describe_adapters(model) == (
        "8 modules (k_proj, o_proj, q_proj, v_proj), "
        "5 bare weights, such as stacks of experts (down_proj, gate_proj, gate_up_proj, up_proj)"
    )
    assert not any(".gate." in n for n, p in model.named_parameters() if p.requires_grad)  # routers stay
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.05] * 8
    with pytest.raises(ConfigError, match=r"--use_dora has no form for experts\.down_proj"):
        add_lora(load(models["moe"]), TunerConfig(use_dora=True), seed=1)


def test_autocast_alone_casts(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT casts each input to float32 and autocast back: leaving that out changes no bit."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    ends = []
    for casts in (False, True):
        base = load_model(models["tied"], dtype="bfloat16", attention=None, device=torch.device("cpu"))
        model = add_lora(base, TunerConfig(lora_rank=4, lora_dropout=0.0), seed=1)
        with monkeypatch.context() as patch:
            if casts:
                patch.setattr("swift.engines.transformers.engine.leave_casting_to_autocast", lambda _: None)
            train(model)
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        assert {layer.cast_input_dtype_enabled for layer in layers} == {casts}
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert ends[0].dtype == torch.float32 and torch.equal(ends[0], ends[1])


def test_names_are_checked_against_the_model(models: dict[str, Path]) -> None:
    def fails(name: str = "tied", **flags: object) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            add_lora(load(models[name]), TunerConfig(**flags), seed=1)
        return caught.value

    assert fails(target_regex="q_proj").message == "--target_regex q_proj matches no module"
    error = fails(target_parameters=("experts.down",))
    assert error.message == "--target_parameters: the model has no weight called experts.down"
    assert error.hint.startswith("a whole name is model.")
    assert (
        fails(modules_to_save=("head",)).message == "--modules_to_save: the model has no module called head"
    )
    assert fails(target_modules=("all-router",)).message == "--target_modules all-router"
    error = fails(target_modules=("all-embedding",))
    assert "model.embed_tokens of this model is both embedding and output layer" in error.message
    assert error.hint == "train it whole instead: --modules_to_save embed_tokens"


def test_adapters_are_trained_on(models: dict[str, Path], tmp_path: Path) -> None:
    config = TunerConfig(lora_rank=4, lora_dropout=0.0, use_rslora=True, modules_to_save=("lm_head",))
    engine, _ = train(add_lora(load(models["biased"]), config, seed=1))
    expected = logits(engine.model)
    engine.save(tmp_path / "first", resumable=False).write()
    again = TunerConfig(lora_dropout=0.1, lora_dtype="bfloat16")
    model = set_up(load_adapter(load(models["biased"]), tmp_path / "first", trainable=True), again)
    kinds = {n.split(".")[-1]: p.dtype for n, p in model.named_parameters() if "lora_" in n}
    assert kinds == {"weight": torch.bfloat16}
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    model = set_up(load_adapter(load(models["biased"]), tmp_path / "first", trainable=True), TunerConfig())
    assert torch.equal(logits(model), expected)
    _, moved = train(model)
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in moved) and any("lora_B" in n for n in moved)


def test_frozen_and_trainable_parameters(models: dict[str, Path]) -> None:
    def trained(**flags: object) -> set[str]:
        model = load(models["tied"])
        freeze(model, TunerConfig(train_type="full", **flags))
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert train(model)[1] == names
        return names

    everything = trained()
    first = {n for n in everything if n.startswith("model.layers.0.")}
    rest = {n for n in everything if not n.startswith(("model.layers.0.", "model.embed_tokens"))}
    # the embedding has 448 x 64 weights; what the ratio ends within is trained
    total = sum(p.numel() for p in load(models["tied"]).parameters())
    assert trained(freeze_parameters_ratio=(448 * 64 + 1) / total) == first | rest
    assert trained(freeze_parameters=("model.embed_tokens", "model.layers.0")) == rest
    flags = {"freeze_parameters_regex": ".", "trainable_parameters_regex": r"layers\.0\..*(proj|norm)"}
    assert trained(**flags) == first
    assert trained(freeze_parameters_ratio=1.0, trainable_parameters=("model.layers.0.",)) == first
    with pytest.raises(ConfigError, match=r"--freeze_parameters layers\.0: the model has no such parameter"):
        trained(freeze_parameters=("layers.0",))
    with pytest.raises(ConfigError, match="leave nothing to train"):
        trained(freeze_parameters_ratio=1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"freeze_parameters_ratio": 0.5}, "--freeze_parameters_ratio has no effect with --train_type lora"),
        ({"train_type": "full", "use_dora": True}, "--use_dora has no effect with --train_type full"),
        ({"train_type": "full", "adapters": ("a",)}, "--adapters has no effect with --train_type full"),
        ({"adapters": ("a", "b")}, "--adapters names 2 checkpoints; training goes on from one"),
        (
            {"target_regex": "("},
            "--target_regex is no regular expression: missing ), unterminated subpattern",
        ),
        ({"init_weights": "loftq"}, "--init_weights loftq is not known"),
    ],
)
def test_flags_without_effect_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TunerConfig(**flags).check()
    assert caught.value.message.startswith(message)
