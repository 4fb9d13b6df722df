"""Order is data: a function of seed and epoch, however a step is cut up."""

import numpy as np
import pytest

from swift.batch import IGNORED
from swift.data.collate import collate
from swift.data.loader import StepPlan
from swift.template.tokenize import Encoded


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    plan = StepPlan(num_rows=13, micro_batch_size=2, accumulation=2, seed=7)
    assert plan.steps_per_epoch == 4
    epochs = [np.concatenate([plan.step_rows(e * 4 + s) for s in range(4)]) for e in range(2)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(13))
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_a_step_holds_the_same_rows_in_any_layout(micro, accumulation, world):
    whole = StepPlan(num_rows=21, micro_batch_size=8, accumulation=1, seed=3)
    plan = StepPlan(num_rows=21, micro_batch_size=micro, accumulation=accumulation, data_world=world, seed=3)
    for step in range(7):
        rows = np.concatenate([b for r in range(world) for b in plan.micro_batches(step, r)] or [[]])
        assert sorted(rows.tolist()) == sorted(whole.step_rows(step).tolist())


def test_total_steps_from_epochs_and_max_steps():
    plan = StepPlan(num_rows=144, micro_batch_size=8, accumulation=1)
    assert plan.total_steps(2, -1) == 36
    assert plan.total_steps(0.5, -1) == 9
    assert plan.total_steps(2, 5) == 5


def test_order_is_pinned():
    """A change here would change every user's run: the first rows of the order of seed 42."""
    plan = StepPlan(num_rows=10, micro_batch_size=10, accumulation=1)
    assert plan.step_rows(0).tolist() == [5, 0, 6, 4, 2, 7, 3, 1, 8, 9]


def test_without_shuffling_rows_come_as_they_are():
    plan = StepPlan(num_rows=5, micro_batch_size=2, accumulation=1, shuffle=False)
    assert [plan.step_rows(s).tolist() for s in range(3)] == [[0, 1], [2, 3], [4]]


def encoded(ids: list[int], labels: list[int], weights: list[float] | None = None) -> Encoded:
    scale = None if weights is None else np.asarray(weights, np.float32)
    return Encoded(np.asarray(ids, np.int32), np.asarray(labels, np.int32), scale)


def test_labels_are_shifted_once_and_never_across_rows():
    batch = collate([encoded([5, 6, 7], [-100, 6, 7]), encoded([8, 9], [8, 9])])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert batch.labels.tolist() == [6, 7, IGNORED, 9, IGNORED]
    assert batch.segment_ids.tolist() == [0, 0, 0, 1, 1]
    assert not batch.token


def test_weights_are_shifted_with_their_labels():
    batch = collate([encoded([5, 6, 7], [-100, 6, 7], [0, 2, 1]), encoded([8, 9], [-100, 9])])
    assert batch.token["loss_scale"].tolist() == [2.0, 1.0, 0.0, 1.0, 0.0]
