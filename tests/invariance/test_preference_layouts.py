"""Objectives of pairs and single answers through the engine: gradients do not depend on the layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_layouts import assert_equal, build_engine, make_rows

from swift.batch import Batch
from swift.data.collate import collate
from swift.engines.protocol import Sums
from swift.engines.transformers.engine import TransformersEngine
from swift.objectives.kto import Kto
from swift.objectives.preference import Preference
from swift.objectives.types import Objective
from swift.train.scoring import Step, score_nothing, score_ranked

LIKED = (1, 0, 0, 1, 1, 0, 1, 0)
MPO = Preference(("sigmoid", "ipo", "sft"), (0.8, 0.2, 1.0), ld_alpha=0.5)
RANKED = Preference(("aot_pair", "aot"), (0.5, 0.5))
SCORES = frozenset({"logps"})


def make_batches(engine: TransformersEngine, rows_each: int, objective: Objective) -> list[Batch]:
    """Eight answers, four pairs, with the columns that the objectives read; one answer trains nothing."""
    rows = make_rows()
    batches = []
    for i in range(0, len(rows), rows_each):
        batch = collate(rows[i : i + rows_each])
        liked = torch.tensor(LIKED[i : i + rows_each])
        batches.append(replace(batch, segment={"label": liked, "kl": torch.full((len(liked),), 0.3)}))
    with engine.reference():
        for batch, stats in zip(batches, engine.forward(batches, SCORES), strict=True):
            batch.token["ref_logps"] = stats.logps
    if objective is RANKED:
        return score_ranked(score_nothing, RANKED, engine, Step(batches, [], Sums()))
    return batches


def step(engine: TransformersEngine, rows_each: int, objective: Objective):
    sums = engine.forward_backward(make_batches(engine, rows_each, objective), objective)
    means = sums.means()
    gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    return sum(v for name, v in means.items() if name.startswith("loss/")), gradients, means


@pytest.mark.parametrize("objective", [MPO, RANKED, Kto()], ids=["mpo", "aot_pair", "kto"])
def test_every_layout_gives_the_padded_single_batch(objective, tiny_llama_dir):
    reference = step(build_engine(tiny_llama_dir, lora=True, dtype=torch.float64, flat=False), 8, objective)
    for rows_each, options in ((8, {}), (2, {}), (6, {}), (4, {"flat": False})):
        ours = step(
            build_engine(tiny_llama_dir, lora=True, dtype=torch.float64, **options), rows_each, objective
        )
        assert_equal(ours[:2], reference[:2], 1e-11)
        assert ours[2] == pytest.approx(reference[2], rel=1e-9)


def test_the_first_step_of_a_new_adapter_is_ln_2(tiny_llama_dir):
    engine = build_engine(tiny_llama_dir, lora=True)
    for name, weight in engine.model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    _, gradients, means = step(engine, 4, Preference())
    assert means["loss/pairs"] == pytest.approx(np.log(2), abs=1e-6)
    assert means["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert sum(float(g.norm()) for g in gradients.values()) > 0


def test_mean_logits_are_those_of_the_model(tiny_llama_dir):
    engine = build_engine(tiny_llama_dir, lora=True, flat=False)
    batch = make_batches(engine, 8, MPO)[0]
    (stats,) = engine.forward([batch], frozenset({"logps", "logits_mean"}))
    row = make_rows()[1]
    with torch.no_grad():
        logits = engine.model(input_ids=torch.from_numpy(row.input_ids.astype(np.int64))[None]).logits[0]
    mine = batch.segment_ids == 1
    expected = logits.mean(-1) * batch.trained[mine]
    torch.testing.assert_close(stats.logits_mean[mine], expected, rtol=1e-4, atol=1e-6)
