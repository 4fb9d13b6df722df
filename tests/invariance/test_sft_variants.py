"""Every variant of the SFT loss gives the same step however the step is laid out, on a mixture of experts."""

from dataclasses import replace

import pytest
import torch
from test_layouts import assert_equal, make_rows
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from swift.config.optim import OptimConfig
from swift.config.sft import SftConfig
from swift.data.collate import collate
from swift.engines.transformers.engine import TransformersEngine
from swift.objectives.sft import Sft

LAYOUTS = [(8, {}), (3, {}), (1, {}), (4, {"flat": False}), (4, {"gradient_checkpointing": True})]
VARIANTS = {
    "smoothing": SftConfig(label_smoothing_factor=0.2),
    "dft": SftConfig(enable_dft_loss=True),
    "balance": SftConfig(router_aux_loss_coef=0.3),
    "noise": SftConfig(neftune_noise_alpha=5.0),
}


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        attn_implementation="sdpa", experts_implementation="eager",
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(torch.float64)


def step(variant: SftConfig, size: int, options: dict) -> tuple[float, dict[str, torch.Tensor], dict]:
    engine = TransformersEngine(
        make_model(), OptimConfig(), learning_rate=1e-3, total_steps=10,
        noise_alpha=variant.neftune_noise_alpha, **options,
    )  # fmt: skip
    rows = make_rows()
    torch.manual_seed(3)
    batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    channels = torch.tensor([i % 3 - 1 for i in range(len(rows))]).split(size)
    batches = [replace(b, segment={"channel": c}) for b, c in zip(batches, channels, strict=True)]
    sums = engine.forward_backward(batches, Sft(variant, ("a", "b"), 2))
    means = sums.means()
    loss = sum(v for k, v in means.items() if k.startswith("loss/"))
    return loss, {n: p.grad.clone() for n, p in engine.model.named_parameters()}, means


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_does_not_depend_on_the_layout(variant):
    config = VARIANTS[variant]
    loss, gradients, means = step(config, 8, {"flat": False})
    plain = step(SftConfig(), 8, {"flat": False})
    assert abs(loss - plain[0]) > 1e-3  # the variant does something
    assert means["loss_a"] != means["loss_b"]
    if variant == "balance":
        assert loss == pytest.approx(plain[0] + 0.3 * means["aux_loss"], rel=1e-12)
        assert 2 <= means["aux_loss"] < 4  # experts per token ... experts
    for size, options in LAYOUTS:
        ours = step(config, size, options)
        assert ours[2] == pytest.approx(means, rel=1e-10)
        assert_equal(ours, (loss, gradients), 1e-10)


def test_noise_has_the_bounds_of_the_paper_and_none_in_evaluation():
    model = make_model()
    engine = TransformersEngine(
        model, OptimConfig(), learning_rate=1e-3, total_steps=10, noise_alpha=5.0, flat=True
    )
    batch = collate(make_rows())
    embedding = model.get_input_embeddings()
    clean = torch.nn.functional.embedding(batch.input_ids, embedding.weight)
    engine.noise.batch = batch
    noise = (embedding(batch.input_ids[None])[0] - clean).abs()
    bounds = 5 / (batch.segment_lengths() * 64.0).sqrt()
    largest = torch.stack([noise[batch.segment_ids == s].max() for s in range(8)])
    assert (largest <= bounds).all() and (largest > 0.9 * bounds).all()
    means = torch.stack([noise[batch.segment_ids == s].mean() for s in range(8)])
    torch.testing.assert_close(means, (bounds / 2).to(means.dtype), rtol=0.15, atol=0)  # of uniform draws
    model.eval()
    assert torch.equal(embedding(batch.input_ids), clean)
