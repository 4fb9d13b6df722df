"""Order is data: a function of seed and epoch, however a step is cut up."""

import numpy as np
import pytest

from swift.batch import IGNORED
from swift.data.collate import collate
from swift.data.loader import StepPlan, epoch_order
from swift.data.pack import pack_lengths
from swift.template.tokenize import Encoded


def rows_of(plan: StepPlan, step: int) -> np.ndarray:
    """All rows of a step, over all ranks."""
    return np.concatenate([b for rank in range(plan.data_world) for b in plan.micro_batches(step, rank)])


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    plan = StepPlan(num_rows=13, micro_batch_size=2, accumulation=2, seed=7)
    assert plan.steps_per_epoch == 4
    epochs = [np.concatenate([rows_of(plan, e * 4 + s) for s in range(4)]) for e in range(2)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(13))
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_a_step_holds_the_same_rows_in_any_layout(micro, accumulation, world):
    whole = StepPlan(num_rows=21, micro_batch_size=8, accumulation=1, seed=3)
    plan = StepPlan(num_rows=21, micro_batch_size=micro, accumulation=accumulation, data_world=world, seed=3)
    for step in range(7):
        assert sorted(rows_of(plan, step)) == sorted(rows_of(whole, step))


def test_rows_that_do_not_fill_a_step_are_left_out():
    plan = StepPlan(num_rows=13, micro_batch_size=2, accumulation=2, seed=7, drop_last=True)
    assert plan.steps_per_epoch == 3 and plan.total_steps(2, -1) == 6
    whole = StepPlan(num_rows=13, micro_batch_size=2, accumulation=2, seed=7)
    for step in range(6):
        expected = rows_of(whole, step + step // 3)
        assert rows_of(plan, step).tolist() == expected.tolist() and len(expected) == 4


def test_total_steps_from_epochs_and_max_steps():
    plan = StepPlan(num_rows=144, micro_batch_size=8, accumulation=1)
    assert plan.total_steps(2, -1) == 36
    assert plan.total_steps(0.5, -1) == 9
    assert plan.total_steps(2, 5) == 5


def test_order_is_pinned():
    """A change here would change every user's run: the first rows of the order of seed 42."""
    plan = StepPlan(num_rows=10, micro_batch_size=10, accumulation=1)
    assert rows_of(plan, 0).tolist() == [5, 0, 6, 4, 2, 7, 3, 1, 8, 9]


def test_without_shuffling_rows_come_as_they_are():
    plan = StepPlan(num_rows=5, micro_batch_size=2, accumulation=1, shuffle=False)
    assert [rows_of(plan, s).tolist() for s in range(3)] == [[0, 1], [2, 3], [4]]


PACKS = pack_lengths(np.asarray([3, 9, 3, 4, 10, 3, 1, 6, 3, 3, 7, 3]), 10)


def test_packs_are_ordered_as_rows_are_and_every_row_comes_once_an_epoch():
    plan = StepPlan(num_rows=12, micro_batch_size=2, accumulation=1, seed=7, packs=PACKS)
    assert len(PACKS) == 6 and plan.steps_per_epoch == 3
    for epoch in range(3):
        packs = PACKS.with_new_neighbours(7, epoch)
        order = epoch_order(6, 7, epoch, True)
        for step in range(3):
            (batch,) = plan.micro_batches(3 * epoch + step)
            first, second = order[2 * step : 2 * step + 2]
            assert batch.tolist() == [*packs[first], *packs[second]]
        steps = [rows_of(plan, 3 * epoch + s) for s in range(3)]
        assert sorted(np.concatenate(steps)) == list(range(12))


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(1, 4, 1), (2, 1, 2), (1, 1, 4)])
def test_a_step_holds_the_same_packs_in_any_layout(micro, accumulation, world):
    whole = StepPlan(num_rows=12, micro_batch_size=4, accumulation=1, seed=3, packs=PACKS)
    plan = StepPlan(12, micro, accumulation, data_world=world, seed=3, packs=PACKS)
    for step in range(6):
        batches = [b for rank in range(world) for b in plan.micro_batches(step, rank)]
        assert all(PACKS.lengths[b].sum() <= 10 * micro for b in batches)
        assert sorted(np.concatenate(batches)) == sorted(rows_of(whole, step))


def test_without_shuffling_packs_come_in_the_order_of_their_first_rows():
    plan = StepPlan(12, 1, 1, shuffle=False, packs=PACKS)
    epochs = [[plan.micro_batches(6 * e + s)[0].tolist() for s in range(6)] for e in range(2)]
    assert epochs[0] == epochs[1] == [PACKS[i].tolist() for i in range(6)]
    assert [pack[0] for pack in epochs[0]] == sorted(pack[0] for pack in epochs[0])


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
