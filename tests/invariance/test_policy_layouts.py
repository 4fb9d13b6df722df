"""Objectives of online training through the engine: gradients and metrics do not depend on the layout."""

from dataclasses import replace

import pytest
import torch
from test_layouts import assert_equal, build_engine, make_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from swift.batch import IGNORED, Batch
from swift.config.optim import OptimConfig
from swift.data.collate import collate
from swift.engines.transformers.engine import TransformersEngine
from swift.objectives.distill import Distill, divergence
from swift.objectives.policy import Policy, PolicyRule, drop_idle
from swift.objectives.types import Objective
from swift.objectives.value import Value

POLICY = Policy(
    PolicyRule(
        importance_sampling_level="sequence_token", epsilon=0.03, beta=0.1, log_entropy=True,
        has_rollout_logps=True, rollout_importance_sampling_mode="token_truncate",
        rollout_importance_sampling_threshold=1.3, off_policy_sequence_mask_delta=0.05,
    )
)  # fmt: skip
CISPO = Policy(PolicyRule(loss_type="cispo", epsilon_high=1.2, beta=0.0))
COLUMNS = ("old_logps", "rollout_logps", "ref_logps", "returns", "old_values")
LAYOUTS = ((8, {}), (2, {}), (3, {"flat": False}))


def make_batches(rows_each: int, logps: dict[int, torch.Tensor] | None = None) -> list[Batch]:
    """Eight answers; the columns of each are near `logps`, its own, or near 0."""
    rows = make_rows()
    columns = []
    for i, row in enumerate(rows):
        generator = torch.Generator().manual_seed(i)
        length, near = len(row.input_ids), 0 if logps is None else logps[i]
        noise = torch.randn(len(COLUMNS), length, generator=generator, dtype=torch.float64) * 0.3
        columns.append(torch.cat((noise + near, torch.full((1, length), i % 3 - 1.0, dtype=torch.float64))))
    batches = []
    for i in range(0, len(rows), rows_each):
        batch = collate(rows[i : i + rows_each])
        table = torch.cat(columns[i : i + rows_each], 1) * batch.trained
        token = dict(zip((*COLUMNS, "advantages"), table, strict=True))
        batches.append(replace(batch, token=token))
    return batches


def step(engine: TransformersEngine, rows_each: int, objective: Objective):
    logps = None
    if isinstance(objective, Policy):
        (stats,) = engine.forward(make_batches(8), frozenset({"logps"}))
        lengths = [len(row.input_ids) for row in make_rows()]
        logps = dict(enumerate(stats.logps.split(lengths)))
    means = engine.forward_backward(make_batches(rows_each, logps), objective).means()
    gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    return sum(v for name, v in means.items() if name.startswith("loss/")), gradients, means


@pytest.mark.parametrize("objective", [POLICY, CISPO], ids=["policy", "cispo"])
def test_policies_do_not_depend_on_the_layout(objective, tiny_llama_dir):
    reference, *others = (
        step(
            build_engine(tiny_llama_dir, dtype=torch.float64, temperature=0.8, **options),
            rows_each,
            objective,
        )
        for rows_each, options in ((8, {"flat": False}), *LAYOUTS)
    )
    assert reference[0] != 0 and len(reference[2]) == (14 if objective is POLICY else 2)
    assert all(0 < share < 1 for name, share in reference[2].items() if "region" in name or "cispo" in name)
    for ours in others:
        assert_equal(ours[:2], reference[:2], 1e-11)
        assert ours[2] == pytest.approx(reference[2], rel=1e-9)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_rows_without_an_advantage_need_not_be_run(loss_type, tiny_llama_dir):
    """Three of eight have none, and one nothing to learn: loss and gradient are the same without them."""
    rule = PolicyRule(loss_type=loss_type, epsilon_high=1.2, beta=0.0, max_completion_length=9)
    engine, batches = build_engine(tiny_llama_dir, dtype=torch.float64), make_batches(3)
    batches[0].labels[batches[0].segment_ids == 2] = IGNORED
    kept = drop_idle(batches, rows_each=3, is_pulled=False)
    assert [batch.num_segments for batch in batches] == [3, 3, 2]
    assert [batch.num_segments for batch in kept] == [3, 1]
    found = []
    for given in (batches, kept):
        engine.model.zero_grad()
        sums = engine.forward_backward(given, Policy(rule))
        ((loss, count),) = (pair for name, pair in sums.pairs.items() if name.startswith("loss/"))
        gradients = [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]
        found.append((loss, count, gradients))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12) and found[0][0] != 0
    assert found[0][1] == found[1][1]
    for ours, theirs in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    pulled = drop_idle(batches, rows_each=8, is_pulled=True)  # every row with a token is drawn back
    assert [batch.num_segments for batch in pulled] == [6]  # of the others one never had a token to learn


def test_one_row_stays_where_none_teaches():
    batches = make_batches(8)
    token = {name: values * 0 for name, values in batches[0].token.items()}
    (kept,) = drop_idle([replace(batches[0], token=token)], rows_each=4, is_pulled=False)
    assert kept.num_segments == 1 and drop_idle([], rows_each=4, is_pulled=False) == []
    for loss_type, count in (("grpo", 8), ("dapo", int(batches[0].trained.sum())), ("dr_grpo", 72)):
        rule = PolicyRule(loss_type=loss_type, max_completion_length=9)
        assert list(Policy(rule).units(kept).values()) == [count]


def build_value_engine(directory, **options) -> TransformersEngine:
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, dtype=torch.float64)
    model.config.pad_token_id = 0
    return TransformersEngine(model, OptimConfig(), learning_rate=1e-3, total_steps=10, **options)


def test_values_do_not_depend_on_the_layout(tiny_llama_dir):
    engine = build_value_engine(tiny_llama_dir, flat=False)
    reference = step(engine, 8, Value())
    for rows_each, options in LAYOUTS:
        ours = step(build_value_engine(tiny_llama_dir, **options), rows_each, Value())
        assert_equal(ours[:2], reference[:2], 1e-11)
    row, batch = make_rows()[1], collate(make_rows()[:2])
    (stats,) = engine.forward([batch], frozenset({"values"}))
    with torch.no_grad():
        ids = torch.from_numpy(row.input_ids).long()[None]
        hidden = engine.model.model(input_ids=ids).last_hidden_state
        expected = engine.model.score(hidden)[0, :, 0]
    mine = batch.segment_ids == 1
    torch.testing.assert_close(stats.values[mine], expected * batch.trained[mine], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "objective", [Distill(sft_alpha=0.2), Distill(beta=1.0, top_k=7)], ids=["jsd", "top"]
)
def test_distillation_does_not_depend_on_the_layout(objective, tiny_llama_dir, tiny_qwen3_dir):
    def build(**options):
        teacher = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float64)
        return build_engine(tiny_llama_dir, dtype=torch.float64, frozen=teacher, temperature=0.9, **options)

    reference, *others = (
        step(build(**options), rows_each, objective)
        for rows_each, options in ((8, {"flat": False}), *LAYOUTS)
    )
    for ours in others:
        assert_equal(ours[:2], reference[:2], 1e-11)
    if objective.top_k is None:
        return
    # The same with what a far teacher would tell of its seven most likely tokens.
    engine = build()
    batches = make_batches(8)
    told = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float64)
    for batch in batches:
        logits = rows_of(told, batch) / 0.9
        logps, ids = logits.log_softmax(-1).topk(7)
        batch.token.update(teacher_ids=ids, teacher_logps=logps)
    engine.frozen = None
    means = engine.forward_backward(batches, objective).means()
    gradients = {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}
    assert_equal((means["loss/tokens"], gradients), reference[:2], 1e-11)


def rows_of(model, batch: Batch) -> torch.Tensor:
    """[T, V] logits, segment by segment."""
    with torch.no_grad():
        parts = batch.input_ids.split(batch.segment_lengths().tolist())
        return torch.cat([model(input_ids=ids[None]).logits[0] for ids in parts])


def test_a_teacher_that_bends_its_logits_is_run_whole(tiny_llama_dir, tiny_qwen3_dir):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir, dtype=torch.float64)
    engine = build_engine(tiny_llama_dir, dtype=torch.float64, frozen=teacher)
    (batch,) = make_batches(8)
    found = engine.measure([batch], Distill(beta=0.0)).means()["loss/tokens"]
    models = (engine.model, teacher)
    for model in models:
        model.set_attn_implementation("sdpa")
    student_TV, teacher_TV = (rows_of(model, batch).log_softmax(-1) for model in models)
    expected = divergence(student_TV, teacher_TV, 0.0)[batch.trained].mean()
    assert found == pytest.approx(float(expected), rel=1e-10)
    whole = build_engine(tiny_llama_dir, dtype=torch.float64, frozen=teacher)
    teacher.config.final_logit_softcapping = 30.0  # which says that the output layer alone is not enough
    assert whole.measure([batch], Distill(beta=0.0)).means()["loss/tokens"] == pytest.approx(found, rel=1e-12)
