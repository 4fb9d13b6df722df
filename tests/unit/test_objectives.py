"""The objective against torch's own cross entropy, in float64."""

import torch
import torch.nn.functional as F

from swift.batch import IGNORED, Batch
from swift.objectives.logits import DenseLogits
from swift.objectives.sft import Sft
from swift.objectives.types import TokenStats


def make_batch(lengths: list[int], trained_from: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    labels = torch.randint(0, 11, (total,), generator=generator)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    batch = Batch(torch.zeros(total, dtype=torch.int64), labels, segments, len(lengths))
    labels[batch.positions() < trained_from] = IGNORED
    return batch


def stats_of(batch: Batch, logits_TV: torch.Tensor) -> TokenStats:
    index = batch.trained.nonzero().squeeze(1)
    view = DenseLogits(logits_TV[index], index)
    return TokenStats(logps=view.logps(batch.labels), correct=view.correct(batch.labels))


def test_loss_and_gradient_equal_cross_entropy_in_float64():
    batch = make_batch([5, 3, 7], trained_from=2)
    logits = torch.randn(15, 11, dtype=torch.float64, requires_grad=True)
    result = Sft()(stats_of(batch, logits), batch)
    ours = result.terms["tokens"] / Sft().units(batch)["tokens"]
    (gradient,) = torch.autograd.grad(ours, logits)
    reference = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED)
    (expected,) = torch.autograd.grad(reference, logits)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_loss_scale_weighs_tokens_but_not_the_denominator():
    batch = make_batch([6], trained_from=0)
    logits = torch.randn(6, 11, dtype=torch.float64)
    stats = stats_of(batch, logits)
    weights = torch.tensor([0.0, 2.0, 1.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    batch.token["loss_scale"] = weights
    expected = -(torch.log_softmax(logits, -1)[torch.arange(6), batch.labels] * weights).sum()
    torch.testing.assert_close(Sft()(stats, batch).terms["tokens"], expected)
    assert Sft().units(batch) == {"tokens": 6}


def test_token_accuracy_counts_trained_tokens_only():
    batch = make_batch([4, 4], trained_from=2)
    logits = torch.full((8, 11), -1.0)
    logits[torch.arange(8), batch.labels.clamp(min=0)] = 1.0  # every label is the most likely token
    logits[3] = -logits[3]  # but this one
    total, count = Sft()(stats_of(batch, logits), batch).metrics["token_acc"]
    assert (int(total), int(count)) == (3, 4)


def test_a_batch_without_a_trained_token_still_has_a_gradient():
    batch = make_batch([3], trained_from=9)
    logits = torch.randn(3, 11, requires_grad=True)
    term = Sft()(stats_of(batch, logits), batch).terms["tokens"]
    term.backward()
    assert term.item() == 0.0 and logits.grad.abs().sum() == 0.0


def test_mean_logits_are_over_the_vocabulary_at_trained_positions():
    logits = torch.randn(2, 11, dtype=torch.bfloat16, requires_grad=True)
    mean = DenseLogits(logits, torch.tensor([1, 3])).mean(5)
    assert mean.dtype == torch.float32 and not mean.requires_grad
    torch.testing.assert_close(mean[[1, 3]], logits.detach().float().mean(-1))
    assert mean[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]


def test_positions_start_again_in_every_segment():
    batch = make_batch([3, 1, 2], trained_from=0)
    assert batch.positions().tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.segment_lengths().tolist() == [3, 1, 2]
