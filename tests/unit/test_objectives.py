"""The objective against torch's own cross entropy and other independent computations, in float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
from transformers.trainer_pt_utils import LabelSmoother

from swift.batch import IGNORED, Batch
from swift.config.option import ConfigError
from swift.config.sft import SftConfig
from swift.objectives.logits import DenseLogits
from swift.objectives.router import segment_balance
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
    return TokenStats(
        logps=view.logps(batch.labels),
        correct=view.correct(batch.labels),
        mean_logps=view.mean_logps(batch.labels),
    )


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
    mean = DenseLogits(logits, torch.tensor([1, 3])).logits_mean(torch.zeros(5))
    assert mean.dtype == torch.float32 and not mean.requires_grad
    torch.testing.assert_close(mean[[1, 3]], logits.detach().float().mean(-1))
    assert mean[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]


def test_positions_start_again_in_every_segment():
    batch = make_batch([3, 1, 2], trained_from=0)
    assert batch.positions().tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.segment_lengths().tolist() == [3, 1, 2]


def loss_of(objective: Sft, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    return objective(stats_of(batch, logits), batch).terms["tokens"] / objective.units(batch)["tokens"]


def test_label_smoothing_is_the_one_of_transformers():
    batch = make_batch([5, 3, 7], trained_from=2)
    logits = torch.randn(15, 11, dtype=torch.float64, requires_grad=True)
    ours = loss_of(Sft(SftConfig(label_smoothing_factor=0.1)), batch, logits)
    # transformers adds the vocabulary's terms up in float32, whatever the logits are
    reference = LabelSmoother(0.1)({"logits": logits[None]}, batch.labels[None])
    torch.testing.assert_close(ours, reference.double(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(ours, logits)
    expected = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, label_smoothing=0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-10, atol=1e-14)


def test_dft_weighs_every_token_by_its_probability_and_not_through_it():
    """The gradient of -p log p with p held fixed is p (softmax - onehot): arXiv:2508.05629 eq. 7."""
    batch = make_batch([6, 4], trained_from=1)
    logits = torch.randn(10, 11, dtype=torch.float64, requires_grad=True)
    ours = loss_of(Sft(SftConfig(enable_dft_loss=True)), batch, logits)
    (gradient,) = torch.autograd.grad(ours, logits)
    p = torch.softmax(logits.detach(), -1)
    labels, trained = batch.labels.clamp(min=0), batch.trained
    p_label = p[torch.arange(10), labels] * trained
    entropy_like = torch.where(trained, p_label * p_label.log(), 0.0)
    torch.testing.assert_close(ours.detach(), -entropy_like.sum() / 8)
    expected = p_label[:, None] * (p - F.one_hot(labels, 11)) / 8
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_two_targets_for_one_token_are_refused():
    with pytest.raises(ConfigError, match="--enable_dft_loss and --label_smoothing_factor are two targets"):
        SftConfig(enable_dft_loss=True, label_smoothing_factor=0.1).check()


def test_losses_of_channels_make_up_the_loss():
    batch = make_batch([4, 6, 3, 5], trained_from=1)
    batch.segment["channel"] = torch.tensor([1, 0, -1, 1])
    logits = torch.randn(18, 11, dtype=torch.float64)
    result = Sft(channels=("code", "math", "never"))(stats_of(batch, logits), batch)
    nll = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="none")
    for name, rows, count in (("loss_code", slice(4, 10), 5), ("loss_math", [*range(4), *range(13, 18)], 7)):
        total, tokens = result.metrics[name]
        assert (float(total), int(tokens)) == (pytest.approx(float(nll[rows].sum())), count)
    assert [float(x) for x in result.metrics["loss_never"]] == [0, 0]
    plain = make_batch([4], trained_from=1)
    alone = Sft(channels=("code",))(stats_of(plain, torch.randn(4, 11)), plain)
    assert [float(x) for x in alone.metrics["loss_code"]] == [0, 0]


def test_accuracy_of_rows_counts_rows_without_a_mistake():
    batch = make_batch([4, 4, 2], trained_from=2)  # the last row trains nothing
    logits = torch.full((10, 11), -1.0)
    logits[torch.arange(10), batch.labels.clamp(min=0)] = 1.0
    logits[3] = -logits[3]
    metrics = Sft(SftConfig(acc_strategy="seq"))(stats_of(batch, logits), batch).metrics
    assert {k: (int(a), int(b)) for k, (a, b) in metrics.items()} == {"seq_acc": (1, 2)}


def test_balance_of_a_segment_is_the_loss_of_transformers_on_it_alone():
    lengths, layers = [5, 9, 2], 3
    batch = make_batch(lengths, trained_from=0)
    logits = [torch.randn(16, 8, requires_grad=True) for _ in range(layers)]
    ours = segment_balance(logits, batch, 2)
    parts = [layer.split(lengths) for layer in logits]
    expected = torch.stack(
        [load_balancing_loss_func(tuple(layer[i] for layer in parts), 8, 2) for i in range(3)]
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    weights = torch.tensor([1.0, -2.0, 3.0])
    gradients = torch.autograd.grad((ours * weights).sum(), logits, retain_graph=True)
    references = torch.autograd.grad((expected * weights).sum(), logits)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_balance_counts_every_token_of_trained_segments_alone():
    batch = make_batch([5, 3, 2], trained_from=2)  # the last segment trains nothing
    objective = Sft(SftConfig(router_aux_loss_coef=0.5), experts_per_token=2)
    routers = (torch.randn(10, 4, dtype=torch.float64),)
    stats = stats_of(batch, torch.randn(10, 11, dtype=torch.float64))
    result = objective(TokenStats(stats.logps, stats.correct, stats.mean_logps, router_logits=routers), batch)
    assert objective.needs == {"logps", "correct", "router_logits"}
    assert objective.units(batch) == {"tokens": 4, "routed": 8}
    balance = segment_balance(routers, batch, 2)
    expected = float(5 * balance[0] + 3 * balance[1])
    assert float(result.metrics["aux_loss"][0]) == pytest.approx(expected)
    assert float(result.terms["routed"]) == pytest.approx(0.5 * expected)
    assert int(result.metrics["aux_loss"][1]) == 8


def test_temperature_divides_all_logits():
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    positions, labels = torch.tensor([1, 3, 4, 6]), torch.arange(8)
    hot = DenseLogits(logits, positions, temperature=0.6)
    plain = DenseLogits(logits / 0.6, positions)
    for name in ("logps", "mean_logps", "logits_mean", "entropy", "correct"):
        torch.testing.assert_close(
            getattr(hot, name)(labels), getattr(plain, name)(labels), rtol=1e-14, atol=0
        )
    gradients = [
        torch.autograd.grad(view.logps(labels).sum(), logits, retain_graph=True)[0] for view in (hot, plain)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_entropy_is_that_of_the_distribution():
    logits = torch.randn(3, 11, dtype=torch.bfloat16, requires_grad=True)
    found = DenseLogits(logits, torch.tensor([0, 2, 3])).entropy(torch.zeros(5, dtype=torch.int64))
    expected = torch.distributions.Categorical(logits=logits.detach().float()).entropy()
    torch.testing.assert_close(found[[0, 2, 3]], expected, rtol=1e-5, atol=1e-6)
    assert found[[1, 4]].tolist() == [0.0, 0.0] and not found.requires_grad
    certain = DenseLogits(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0])).entropy(torch.zeros(1).long())
    assert certain.tolist() == [0.0]
