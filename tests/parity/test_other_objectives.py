"""KTO, rewards, classes, embeddings and rerankers, in float64, against TRL or the formula; filler batches."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity_batches import (
    FakeModel,
    assert_same,
    completion_mask,
    loss_and_gradient,
    make_batch,
    make_logps,
    make_stats,
    metric,
    padded,
    select,
    total_loss,
    trl_trainer,
)
from trl import KTOTrainer, RewardTrainer

from swift.batch import IGNORED, Batch
from swift.objectives.classification import Classification
from swift.objectives.embedding import EmbeddingPairs, InfoNce, ListwiseReranker, PointwiseReranker
from swift.objectives.kto import Kto
from swift.objectives.preference import RULES, Preference
from swift.objectives.reward import Reward
from swift.objectives.types import TokenStats

LENGTHS = [6, 9, 12, 4, 7]
LIKED = [1, 0, 0, 1, 1]
FILLER = Batch(
    torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORED), torch.zeros(1, dtype=torch.int64), 1
)


def kto_batch(kl, *, seed=0, liked=LIKED):
    column = torch.full((len(LENGTHS),), kl, dtype=torch.float64)
    return make_batch(LENGTHS, seed=seed, label=liked, kl=column)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [-0.7, 0.0, 2.5])
def test_kto_equals_trl(loss_type, kl):
    objective = Kto(loss_type=loss_type, beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    for seed in range(3):
        batch = kto_batch(kl, seed=seed)
        logps = make_logps(batch, seed=seed + 10)
        order = torch.arange(batch.num_segments)
        model = FakeModel(padded(logps * batch.trained, batch, order))
        ref_logps = padded(batch.token["ref_logps"], batch, order)
        trainer = trl_trainer(
            KTOTrainer, model, None, precompute_ref_logps=True, calculate_KL=loss_type == "kto",
            loss_type=loss_type, beta=0.3, desirable_weight=1.3, undesirable_weight=0.6,
            _compute_kl_logps=lambda *_: torch.full((len(LENGTHS),), kl, dtype=torch.float64),
        )  # fmt: skip
        mask = completion_mask(batch, order)
        inputs = {
            "input_ids": torch.zeros_like(mask), "completion_mask": mask, "attention_mask": mask,
            "label": batch.segment["label"].bool(), "ref_logps": ref_logps.sum(1),
            "ref_KL_logps": torch.zeros(len(LENGTHS), dtype=torch.float64),
        }  # fmt: skip
        expected = trainer._compute_loss(model, inputs, return_outputs=False)
        (expected_gradient,) = torch.autograd.grad(expected, logps)
        loss, gradient = loss_and_gradient(objective, batch, logps)
        assert_same(loss, expected.detach())
        assert_same(gradient, expected_gradient)
        result, theirs = objective(make_stats(logps), batch), trainer._metrics["train"]
        names = ["rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"]
        assert {n: metric(result, n) for n in names} == pytest.approx({n: theirs[n][0] for n in names})
        if loss_type == "kto":
            assert metric(result, "kl") == pytest.approx(theirs["kl"][0]) == max(kl, 0)


def test_kto_starts_at_one_half_and_means_logits_over_tokens():
    batch = kto_batch(0.0)
    logps = batch.token["ref_logps"].clone().requires_grad_()
    loss, gradient = loss_and_gradient(Kto(), batch, logps)
    assert float(loss) == 0.5 and gradient.abs().sum() > 0
    stats = make_stats(logps)
    liked_T = batch.trained & torch.tensor(LIKED).bool()[batch.segment_ids]
    expected = float(stats.logits_mean[liked_T].mean())
    assert metric(Kto()(stats, batch), "logits/chosen") == pytest.approx(expected)


def test_kto_of_one_kind_only_has_no_mean_of_the_other():
    batch = kto_batch(0.0, liked=[1] * len(LENGTHS))
    result = Kto()(make_stats(make_logps(batch)), batch)
    assert [float(x) for x in result.metrics["rewards/rejected"]] == [0.0, 0.0]
    assert float(result.metrics["rewards/chosen"][1]) == len(LENGTHS)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_packed_kto_batch_is_the_sum_of_its_rows(loss_type):
    objective, batch = Kto(loss_type=loss_type, undesirable_weight=0.4), kto_batch(0.2)
    logps = make_logps(batch)
    loss, gradient = loss_and_gradient(objective, batch, logps)
    parts = [select(batch, logps, rows) for rows in ([0], [1, 2, 3], [4])]
    split = total_loss(objective, [objective(stats, part) for part, stats in parts], [p for p, _ in parts])
    assert_same(loss, split.detach(), 1e-12)
    assert_same(gradient, torch.autograd.grad(split, logps)[0], 1e-12)


def make_values(*shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def rows(count, **segment):
    """A batch of `count` segments of two tokens; heads read no labels of tokens."""
    ids = torch.repeat_interleave(torch.arange(count), 2)
    columns = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in segment.items()}
    return Batch(torch.zeros_like(ids), torch.full_like(ids, IGNORED), ids, count, {}, columns)


def apply(objective, batch, leaf, field):
    """Loss and gradient of an objective that reads the one field of the stats."""
    loss = total_loss(objective, [objective(TokenStats(**{field: leaf}), batch)], [batch])
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("has_margin", [False, True])
def test_reward_equals_trl(center, has_margin):
    scores = make_values(8)
    margins = [0.5, 9.0, 0.0, 9.0, 1.5, 9.0, 0.1, 9.0]  # those at rejected answers are not read
    batch = rows(8, margin=margins) if has_margin else rows(8)
    loss, gradient = apply(Reward(center=center or 0.0), batch, scores, "scores")
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    class Scorer(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=scores[order][:, None])

    model = Scorer()
    trainer = trl_trainer(RewardTrainer, model, None, args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(8, 2)}
    if has_margin:
        inputs["margin"] = torch.tensor(margins[0::2], dtype=torch.float64)
    expected = trainer.compute_loss(model, inputs)
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, scores)[0])
    result = Reward()(TokenStats(scores=scores), batch)
    theirs = trainer._metrics["train"]
    assert metric(result, "rewards/accuracies") == pytest.approx(theirs["accuracy"][0])
    assert metric(result, "rewards/margins") == pytest.approx(theirs["margin"][0])
    assert metric(result, "rewards/chosen") == pytest.approx(float(scores[0::2].detach().mean()))


def test_reward_of_equal_scores_is_ln_2():
    loss, _ = apply(Reward(), rows(2), torch.zeros(2, dtype=torch.float64, requires_grad=True), "scores")
    assert float(loss) == pytest.approx(math.log(2))


LABELS = {
    "single_label_classification": [2, 0, 1, 2],
    "multi_label_classification": [[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]],
    "regression": [[0.5, 1.0, -1.0], [0, 0, 2], [1, 1, 1], [3, 1, 0]],
}
TORCH_LOSSES = {
    "single_label_classification": F.cross_entropy,
    "multi_label_classification": F.binary_cross_entropy_with_logits,
    "regression": F.mse_loss,
}


@pytest.mark.parametrize("problem", LABELS)
def test_classification_equals_torchs_means(problem):
    logits, objective = make_values(4, 3), Classification(problem_type=problem)
    label = torch.tensor(LABELS[problem])
    loss, gradient = apply(objective, rows(4, label=label), logits, "class_logits")
    expected = TORCH_LOSSES[problem](logits, label if label.ndim == 1 else label.double())
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, logits)[0])


def test_classification_counts_rows_that_are_right():
    logits = torch.tensor([[2.0, -1], [0, 3], [1, 5]], dtype=torch.float64)
    stats = TokenStats(class_logits=logits)
    single = Classification()(stats, rows(3, label=[0, 1, 0]))
    assert metric(single, "acc") == pytest.approx(2 / 3)
    several = Classification(problem_type="multi_label_classification")
    assert metric(several(stats, rows(3, label=[[1, 0], [1, 1], [1, 1]])), "acc") == pytest.approx(2 / 3)
    assert Classification(problem_type="regression")(stats, rows(3, label=[[1, 0]] * 3)).metrics == {}


def test_regression_takes_one_number_a_row():
    loss, _ = apply(
        Classification(problem_type="regression"),
        rows(3, label=[1.0, 2.0, 3.0]),
        make_values(3, 1),
        "class_logits",
    )
    assert_same(loss, ((make_values(3, 1)[:, 0] - torch.tensor([1.0, 2.0, 3.0])) ** 2).mean().detach())


def cosines(embeddings):
    return F.cosine_similarity(embeddings[0::2], embeddings[1::2])


def test_cosine_similarity_is_a_squared_error():
    embeddings, label = make_values(6, 5), torch.tensor([0.9, 0.0, 0.2, 0.0, 0.5, 0.0], dtype=torch.float64)
    loss, gradient = apply(EmbeddingPairs(), rows(6, label=label), embeddings, "embeddings")
    expected = F.mse_loss(cosines(embeddings), label[0::2])
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, embeddings)[0])


def test_contrastive_pulls_alike_texts_and_pushes_close_ones():
    embeddings, label = make_values(8, 5), torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])
    loss, gradient = apply(
        EmbeddingPairs(loss_type="contrastive"), rows(8, label=label), embeddings, "embeddings"
    )
    distance = 1 - cosines(embeddings)
    each = [d**2 if alike else F.relu(0.5 - d) ** 2 for d, alike in zip(distance, label[0::2], strict=True)]
    expected = 0.5 * torch.stack(each).mean()
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, embeddings)[0])


@pytest.mark.parametrize(
    "label", [[1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0], [1] * 6, [0] * 6]
)
def test_online_contrastive_keeps_the_hard_pairs(label):
    embeddings = make_values(12, 3, seed=4).detach().abs().requires_grad_()
    objective = EmbeddingPairs(loss_type="online_contrastive")
    column = torch.repeat_interleave(torch.tensor(label), 2)
    loss, gradient = apply(objective, rows(12, label=column), embeddings, "embeddings")
    distance, alike = 1 - cosines(embeddings), torch.tensor(label) == 1
    positives, negatives = distance[alike], distance[~alike]
    near = positives.max() if len(positives) > 1 else negatives.mean()
    far = negatives.min() if len(negatives) > 1 else positives.mean()
    expected = positives[positives > far].square().sum()
    expected = (expected + F.relu(0.5 - negatives[negatives < near]).square().sum()) / 6
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, embeddings)[0])
    assert objective.couples_rows and not EmbeddingPairs().couples_rows


ROLES = [0, 1, 2, 0, 1, 2, 2, 0, 1]
GROUPS = [(0, [1, 2]), (3, [4, 5, 6]), (7, [8])]


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_infonce_is_a_cross_entropy_over_candidates(in_batch, mask):
    embeddings = make_values(9, 4)
    objective = InfoNce(temperature=0.2, in_batch=in_batch, mask_fake_negatives=mask)
    loss, gradient = apply(objective, rows(9, role=ROLES), embeddings, "embeddings")
    vectors = embeddings / embeddings.norm(dim=1, keepdim=True)
    every, total, dropped = [c for _, group in GROUPS for c in group], 0.0, 0
    for anchor, group in GROUPS:
        cosine = {c: vectors[anchor] @ vectors[c] for c in (every if in_batch else group)}
        kept = [c for c in cosine if not mask or cosine[c] <= cosine[group[0]] + 0.1]
        dropped += len(cosine) - len(kept)
        scores = torch.stack([cosine[c] / 0.2 for c in kept])
        total = total + F.cross_entropy(scores, torch.tensor(kept.index(group[0])))
    assert bool(dropped) == mask
    assert_same(loss, (total / 3).detach())
    assert_same(gradient, torch.autograd.grad(total / 3, embeddings)[0])
    assert objective.couples_rows == in_batch


def test_pointwise_reranker_is_a_binary_cross_entropy():
    scores, label = make_values(5), torch.tensor([1, 0, 0, 1, 0])
    loss, gradient = apply(PointwiseReranker(), rows(5, label=label), scores, "scores")
    expected = F.binary_cross_entropy_with_logits(scores, label.double())
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, scores)[0])


def test_listwise_reranker_is_a_cross_entropy_within_each_query():
    """Documents before the first query and a query of one document are not counted."""
    scores, label = make_values(9), [0, 1, 0, 0, 1, 1, 0, 1, 0]
    objective, batch = ListwiseReranker(temperature=0.5), rows(9, label=label)
    assert objective.units(batch) == {"queries": 3}
    loss, gradient = apply(objective, batch, scores, "scores")
    groups = [scores[1:4], scores[5:7], scores[7:9]]
    expected = torch.stack([F.cross_entropy(g / 0.5, torch.tensor(0)) for g in groups]).mean()
    assert_same(loss, expected.detach())
    assert_same(gradient, torch.autograd.grad(expected, scores)[0])
    right = sum(int(g.argmax() == 0) for g in groups)
    assert metric(objective(TokenStats(scores=scores), batch), "acc") == pytest.approx(right / 3)


ALL = [
    *[Preference(loss_type=(name,), rpo_alpha=0.5) for name in RULES],
    Kto(), Kto(loss_type="apo_zero_unpaired"), Reward(center=0.1),
    *[Classification(problem_type=name) for name in LABELS],
    *[EmbeddingPairs(loss_type=name) for name in ("cosine_similarity", "contrastive", "online_contrastive")],
    InfoNce(), PointwiseReranker(), ListwiseReranker(),
]  # fmt: skip


@pytest.mark.parametrize("objective", ALL, ids=lambda o: f"{type(o).__name__}-{getattr(o, 'loss_type', '')}")
def test_the_engines_filler_batch_is_zero_with_a_gradient(objective):
    """No units, no metrics that count, and a gradient of zeros: a rank without rows runs backward too."""
    logps = torch.zeros(1, requires_grad=True)
    leaf = torch.randn(1, 3, requires_grad=True)
    stats = TokenStats(
        logps=logps, logits_mean=torch.zeros(1), scores=leaf[:, 0], class_logits=leaf, embeddings=leaf
    )
    result = objective(stats, FILLER)
    assert set(objective.units(FILLER).values()) == {0}
    assert result.terms.keys() == objective.units(FILLER).keys()
    for term in result.terms.values():
        gradients = torch.autograd.grad(term, [logps, leaf], allow_unused=True, retain_graph=True)
        reached = [g for g in gradients if g is not None]
        assert float(term.detach()) == 0.0 and len(reached) == 1 and reached[0].abs().sum() == 0.0
    assert all(float(x) == 0.0 for pair in result.metrics.values() for x in pair)


def test_filler_metrics_have_the_names_of_real_ones():
    """Ranks exchange metrics by sorted name, so a rank without rows must not lack one."""
    batch = make_batch([5, 6, 7, 8], label=[1, 0, 1, 1], kl=[0.0] * 4, bco_delta=[0.0] * 4)
    filler = TokenStats(logps=torch.zeros(1), logits_mean=torch.zeros(1))
    for objective in (Preference(rpo_alpha=1.0), Preference(loss_type=("orpo",)), Kto()):
        real = objective(make_stats(make_logps(batch)), batch)
        assert objective(filler, FILLER).metrics.keys() == real.metrics.keys()
