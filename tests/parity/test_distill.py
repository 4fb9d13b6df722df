"""Distillation and the value loss in float64, against TRL's divergence and formulas of the papers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity_batches import assert_same, make_batch
from trl.experimental.gkd import GKDTrainer

from swift.engines.stepping import NOTHING
from swift.objectives import logits as logits_module
from swift.objectives.distill import COPIES, Distill, LocalTeacher, ToldTeacher
from swift.objectives.logits import DenseLogits
from swift.objectives.types import TokenStats
from swift.objectives.value import Value

WIDTH = 11


def make_logits(batch, *, seed, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch.num_tokens, width, generator=generator, dtype=torch.float64) * 2


def stats_of(batch, student_TV, teacher_TV, *, temperature=1.0, told=None):
    positions = batch.trained.nonzero().squeeze(1)
    view = DenseLogits(student_TV[positions], positions, temperature)

    def place(values_N):
        return view.place(values_N, batch.labels)

    if told:
        logps, ids = (teacher_TV / temperature).log_softmax(-1).topk(told)
        batch = replace(batch, token={"teacher_ids": ids, "teacher_logps": logps})
        teacher = ToldTeacher.of(batch, view, own=lambda x: x, spread=place)
    else:
        teacher = LocalTeacher(view, lambda rows: teacher_TV[positions][rows], place)
    return TokenStats(logps=view.logps(batch.labels), teacher=teacher)


def mean_loss(objective, stats, batch, student):
    result, units = objective(stats, batch), objective.units(batch)
    loss = sum(term / units[unit] for unit, term in result.terms.items())
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_divergence_is_that_of_trl(beta, rows, monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", rows * WIDTH * 4 * COPIES)
    batch = make_batch([6, 9, 4])
    student, teacher = make_logits(batch, seed=1).requires_grad_(), make_logits(batch, seed=2)
    stats = stats_of(batch, student, teacher, temperature=0.7)
    loss, gradient = mean_loss(Distill(beta=beta), stats, batch, student)
    expected = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], labels=batch.labels[None], beta=beta, temperature=0.7
    )
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, student)[0])
    assert float(loss) > 0


@pytest.mark.parametrize("told", [None, 4], ids=["local", "told"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_most_likely_tokens_alone_are_a_distribution(beta, told):
    batch = make_batch([6, 9, 4])
    student, teacher = make_logits(batch, seed=1).requires_grad_(), make_logits(batch, seed=2)
    stats = stats_of(batch, student, teacher, temperature=0.7, told=told)
    loss, gradient = mean_loss(Distill(beta=beta, top_k=4), stats, batch, student)
    ids = teacher.topk(4).indices
    expected = GKDTrainer.generalized_jsd_loss(
        student.gather(1, ids)[None], teacher.gather(1, ids)[None], labels=batch.labels[None], beta=beta,
        temperature=0.7,
    )  # fmt: skip
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, student)[0])


def test_a_wider_teacher_is_cut_to_the_vocabulary_that_both_have():
    batch = make_batch([6, 9, 4])
    student, teacher = (
        make_logits(batch, seed=1).requires_grad_(),
        make_logits(batch, seed=2, width=WIDTH + 3),
    )
    ours = mean_loss(Distill(), stats_of(batch, student, teacher), batch, student)
    same = mean_loss(Distill(), stats_of(batch, student, teacher[:, :WIDTH]), batch, student)
    assert_same(ours[0], same[0], 0.0)
    assert_same(ours[1], same[1], 0.0)


def test_likelihood_is_of_answers_from_the_data():
    batch = make_batch([6, 9, 4], sampled=[0, 1, 0])
    student, teacher = make_logits(batch, seed=1).requires_grad_(), make_logits(batch, seed=2)
    objective = Distill(beta=0.0, sft_alpha=0.3)
    assert objective.needs == {"teacher", "logps"} and Distill().needs == {"teacher"}
    stats = stats_of(batch, student, teacher)
    loss, _ = mean_loss(objective, stats, batch, student)
    labels = batch.labels.masked_fill(batch.segment_ids == 1, -100)
    apart, _ = mean_loss(Distill(beta=0.0), stats_of(batch, student, teacher), batch, student)
    nll = F.cross_entropy(student, labels, ignore_index=-100)
    assert_same(loss, apart + 0.3 * nll.detach())
    assert objective.units(batch) == {"tokens": 13, "data_tokens": 6}
    total, count = objective(stats_of(batch, student, teacher), batch).metrics["nll_loss"]
    assert float(total / count) == pytest.approx(float(nll))


def test_a_teacher_gives_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 3 * WIDTH * 4 * COPIES)
    asked, logits = [], torch.randn(8, WIDTH, requires_grad=True)

    def rows(wanted):
        asked.append((wanted.start, wanted.stop))
        return torch.randn(wanted.stop - wanted.start, WIDTH)

    view = DenseLogits(logits, torch.arange(8))
    LocalTeacher(view, rows, lambda values_N: values_N).divergence(0.5, None).sum().backward()
    assert asked == [(0, 3), (3, 6), (6, 8)] * 2 and logits.grad.isfinite().all()


def test_a_filler_batch_leads_back_to_the_model():
    nothing = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    view = DenseLogits(nothing, torch.zeros(0, dtype=torch.int64))

    def place(values_N):
        return view.place(values_N, NOTHING.labels)

    for teacher in (
        LocalTeacher(view, lambda rows: nothing[rows], place),
        ToldTeacher.of(NOTHING, view, own=lambda x: x, spread=place),
    ):
        result = Distill(sft_alpha=0.1)(TokenStats(view.logps(NOTHING.labels), teacher=teacher), NOTHING)
        sum(result.terms.values()).backward()
        assert nothing.grad.shape == (0, WIDTH) and {float(x) for x in result.terms.values()} == {0.0}


def value_batch():
    batch, generator = make_batch([6, 9, 4]), torch.Generator().manual_seed(3)
    returns, old, moved = torch.randn(3, batch.num_tokens, generator=generator, dtype=torch.float64)
    batch = replace(batch, token={"returns": returns, "old_values": old})
    return batch, ((old + moved * 1.5) * batch.trained).requires_grad_()


def test_the_value_loss_is_the_larger_of_two_squares():
    batch, values = value_batch()
    result = Value(cliprange_value=0.2, vf_coef=0.5)(TokenStats(values=values), batch)
    loss = result.terms["tokens"] / Value().units(batch)["tokens"]
    (gradient,) = torch.autograd.grad(loss, values)
    expected, clipped = [], 0
    for t in batch.trained.nonzero().squeeze(1).tolist():
        value, old, wanted = (
            float(x[t].detach()) for x in (values, batch.token["old_values"], batch.token["returns"])
        )
        kept = min(max(value, old - 0.2), old + 0.2)
        clipped += (kept - wanted) ** 2 > (value - wanted) ** 2
        larger = max((value - wanted) ** 2, (kept - wanted) ** 2)
        expected.append(0.5 * 0.5 * larger)
        slope = 0.5 * (value - wanted) if (value - wanted) ** 2 == larger else 0.0
        assert float(gradient[t]) == pytest.approx(slope / 13, abs=1e-12)
    assert float(loss) == pytest.approx(sum(expected) / 13, rel=1e-12)
    total, count = result.metrics["value/clip_ratio"]
    assert (int(total), int(count)) == (clipped, 13) and 0 < clipped < 13
    nothing = torch.zeros(1, requires_grad=True)
    assert float(Value()(TokenStats(values=nothing), NOTHING).terms["tokens"]) == 0.0
