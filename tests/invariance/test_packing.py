"""A step over packs is the step over its rows one by one, on every attention: loss and every gradient."""

import numpy as np
import pytest
import torch
from test_layouts import assert_equal, build_engine

from swift.data.collate import collate
from swift.data.loader import StepPlan
from swift.data.pack import pack_lengths
from swift.engines.transformers.engine import TransformersEngine
from swift.objectives.sft import Sft
from swift.template.tokenize import Encoded

LENGTHS = np.asarray([5, 17, 9, 30, 3, 12, 21, 8, 32, 1, 9, 17])
PACKS = pack_lengths(LENGTHS, 32)
LAYOUTS = {
    "flat, own kernel": {},
    "flat, sdpa": {"own_attention": False},
    "flat, eager": {"own_attention": False, "attention": "eager"},
    "padded, sdpa": {"flat": False},
    "padded, eager": {"flat": False, "attention": "eager"},
}


def make_rows() -> list[Encoded]:
    """Rows with weights, of unequal share of trained tokens; the row of one token trains nothing."""
    random = np.random.RandomState(0)
    rows = []
    for length in LENGTHS:
        ids = random.randint(3, 250, length).astype(np.int32)
        labels = ids.copy()
        labels[: random.randint(1, max(length - 2, 2))] = -100
        rows.append(Encoded(ids, labels, random.rand(length).astype(np.float32)))
    return rows


def step(engine: TransformersEngine, batches: list[np.ndarray]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over these rows."""
    rows = make_rows()
    sums = engine.forward_backward([collate([rows[i] for i in batch]) for batch in batches], Sft())
    total, count = sums.pairs["loss/tokens"]
    return total / count, {n: p.grad.clone() for n, p in engine.model.named_parameters()}


# transformers' eager attention takes its softmax in float32 whatever the weights are
PRECISIONS = [(layout, torch.float32, 1e-6) for layout in LAYOUTS] + [
    (layout, torch.float64, 1e-13) for layout in LAYOUTS if "eager" not in layout
]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize(("layout", "dtype", "tolerance"), PRECISIONS)
def test_packs_give_the_step_of_separate_rows(tiny_llama_dir, layout, micro_batch_size, dtype, tolerance):
    """Separate: one row a micro-batch, padded layout, sdpa. Nothing there could let a row see another."""
    plan = StepPlan(len(LENGTHS), micro_batch_size, accumulation=10, packs=PACKS)
    packed = plan.micro_batches(0)
    assert plan.steps_per_epoch == 1 and len(packed) == -(-len(PACKS) // micro_batch_size) < len(LENGTHS)
    separate = StepPlan(len(LENGTHS), 1, accumulation=12).micro_batches(0)
    ours = step(build_engine(tiny_llama_dir, dtype=dtype, **LAYOUTS[layout]), packed)
    assert_equal(ours, step(build_engine(tiny_llama_dir, dtype=dtype, flat=False), separate), tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_neighbour_leaves_a_row_alone(tiny_llama_dir, layout):
    """Log-probabilities of every other row of a pack stay as they were, bit by bit."""
    rows = make_rows()
    pack = max(PACKS, key=len).tolist()
    assert len(pack) >= 3
    changed = pack[1]
    other = Encoded((rows[changed].input_ids + 1) % 250, rows[changed].labels, rows[changed].loss_scale)
    batches = [collate([rows[i] for i in pack]), collate([other if i == changed else rows[i] for i in pack])]
    engine = build_engine(tiny_llama_dir, **LAYOUTS[layout])
    before, after = (s.logps for s in engine.forward(batches, frozenset({"logps"})))
    mine = batches[0].segment_ids == 1
    assert torch.equal(before[~mine], after[~mine]) and before[~mine].abs().sum() > 0
    assert not torch.equal(before[mine], after[mine])


@pytest.mark.slow
def test_flex_attention_keeps_rows_apart(tiny_llama_dir):
    """Log-probabilities of one pack: on a CPU torch has no gradients for it, nor shapes that change."""
    torch.compiler.reset()
    rows, needs, pack = make_rows(), frozenset({"logps"}), max(PACKS, key=len)
    flex = build_engine(tiny_llama_dir, attention="flex_attention", own_attention=False)
    (packed,) = flex.forward([collate([rows[i] for i in pack])], needs)
    separate = build_engine(tiny_llama_dir, flat=False).forward([collate([rows[i]]) for i in pack], needs)
    expected = torch.cat([stats.logps for stats in separate])
    torch.testing.assert_close(packed.logps, expected, rtol=1e-6, atol=2e-6)
