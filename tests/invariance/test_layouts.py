"""The loss and the gradients do not depend on how a step is laid out: accumulation, padding, flat batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from swift.config.optim import OptimConfig
from swift.config.option import ConfigError
from swift.data.collate import collate
from swift.engines.attention import Heads, segmented_sdpa
from swift.engines.transformers.engine import TransformersEngine
from swift.objectives.sft import Sft
from swift.template.tokenize import Encoded

LENGTHS = (5, 17, 9, 30, 3, 12, 21, 8)


def make_rows(seed: int = 0) -> list[Encoded]:
    """Eight rows of unequal length and unequal share of trained tokens; one row trains nothing."""
    random = np.random.RandomState(seed)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = random.randint(3, 250, length).astype(np.int32)
        labels = ids.copy()
        labels[: length if i == 4 else random.randint(1, length - 1)] = -100
        rows.append(Encoded(ids, labels, None))
    return rows


def build_engine(
    directory: Path, *, lora: bool = False, attention: str = "sdpa", dtype=torch.float32, **options
) -> TransformersEngine:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    return TransformersEngine(model, OptimConfig(), learning_rate=1e-3, total_steps=10, **options)


def step(engine: TransformersEngine, micro_batch: int) -> tuple[float, dict[str, torch.Tensor]]:
    rows = make_rows()
    batches = [collate(rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)]
    total, count = engine.forward_backward(batches, Sft()).pairs["loss/tokens"]
    gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    return total / count, gradients


def assert_equal(ours, reference, tolerance: float) -> None:
    """Equal loss, and for every parameter |gradient - expected| <= tolerance |expected| in the 2-norm."""
    assert ours[0] == pytest.approx(reference[0], rel=tolerance)
    assert ours[1].keys() == reference[1].keys() and ours[1]
    for name, gradient in ours[1].items():
        expected = reference[1][name]
        assert (gradient - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("micro_batch", "options"),
    [
        (8, {}),
        (4, {}),
        (1, {}),
        (4, {"flat": False}),
        (3, {"flat": False}),
        (8, {"own_attention": False}),
        (4, {"gradient_checkpointing": True}),
    ],
    ids=["flat 8", "flat 2x4", "flat 8x1", "padded 2x4", "padded 3", "flat sdpa", "recompute"],
)
def test_every_layout_gives_the_padded_single_batch(
    family, lora, micro_batch, options, dtype, tolerance, request
):
    directory = request.getfixturevalue(f"tiny_{family}_dir")
    reference = step(build_engine(directory, lora=lora, dtype=dtype, flat=False), 8)
    ours = step(build_engine(directory, lora=lora, dtype=dtype, **options), micro_batch)
    assert_equal(ours, reference, tolerance)


def test_flat_batches_through_the_eager_kernel(tiny_qwen3_dir):
    """Looser: transformers' eager attention takes its softmax in float32 over the whole masked row."""
    reference = step(build_engine(tiny_qwen3_dir, dtype=torch.float64, flat=False), 8)
    options = {"own_attention": False, "attention": "eager", "dtype": torch.float64}
    assert_equal(step(build_engine(tiny_qwen3_dir, **options), 8), reference, 3e-6)


def test_the_reference_itself_is_the_model_s_own_loss(tiny_llama_dir):
    """Row by row through transformers' own loss, summed and divided by the trained tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    total, count = 0.0, 0
    for row in make_rows():
        labels = torch.from_numpy(row.labels.astype(np.int64))[None]
        trained = int((labels[:, 1:] != -100).sum())
        if trained:
            ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
            total += float(model(input_ids=ids, labels=labels).loss) * trained
            count += trained
    assert step(build_engine(tiny_llama_dir), 8)[0] == pytest.approx(total / count, rel=1e-6)


def test_a_changed_row_leaves_the_others_alone(tiny_llama_dir):
    """No attention across segments: logps of the second row do not move when the first one changes."""
    engine = build_engine(tiny_llama_dir)
    first, other, second = make_rows()[1], make_rows(1)[1], make_rows()[2]
    stats = engine.forward([collate([first, second]), collate([other, second])], frozenset({"logps"}))
    tails = [s.logps[len(first.input_ids) :] for s in stats]
    assert torch.equal(tails[0], tails[1]) and tails[0].abs().sum() > 0


def test_sliding_windows_are_respected():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 12, 8, dtype=torch.float64) for h in (4, 2, 2))
    heads = Heads(q, k, v, scaling=None, window=3, dropout=0.0)
    ours = segmented_sdpa(heads, [7, 5], [7, 5])
    bias = torch.full((12, 12), float("-inf"), dtype=torch.float64)
    for i in range(12):
        low = 0 if i < 7 else 7
        bias[i, max(low, i - 2) : i + 1] = 0
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + bias, -1) @ v
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_model_that_needs_padding_gets_it_and_refuses_flat(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    model.config.layer_types = ["linear_attention", "full_attention"]
    engine = TransformersEngine(model, OptimConfig(), learning_rate=1e-3, total_steps=1)
    assert engine.layout.flat is False
    with pytest.raises(ConfigError, match=r"--padding_free true: .* layers of type linear_attention"):
        TransformersEngine(model, OptimConfig(), learning_rate=1e-3, total_steps=1, flat=True)


def test_compiled_layers_give_the_same(tiny_qwen3_dir):
    """Two lengths of batches, so that the second one is compiled for any; recomputed in the backward pass."""
    plain = step(build_engine(tiny_qwen3_dir), 3)
    options = {"gradient_checkpointing": True, "compiler": "aot_eager"}
    compiled = step(build_engine(tiny_qwen3_dir, **options), 3)
    assert_equal(compiled, plain, 1e-6)
