"""Packing: nothing lost, nothing too long, as full as best-fit decreasing makes it, the same every time."""

import numpy as np
import pytest

from swift.data.pack import Packs, pack_lengths


def lognormal_lengths(count: int) -> np.ndarray:
    lengths = np.random.RandomState(1).lognormal(6.3, 0.9, count)
    return np.clip(lengths, 16, 8192).astype(np.int64)


def simple_best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """The lengths in each pack: every row looks at every pack."""
    packs: list[list[int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [pack for pack in packs if sum(pack) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            packs.append([length])
    return packs


def assert_whole(packs: Packs) -> None:
    """Every row once, no pack too long or empty."""
    assert sorted(packs.rows) == list(range(len(packs.lengths)))
    tokens = np.add.reduceat(packs.lengths[packs.rows], packs.offsets[:-1])
    assert tokens.max() <= packs.capacity and (np.diff(packs.offsets) > 0).all()


def test_fill_on_log_normal_lengths():
    """`binpacking.to_constant_volume` on groups of 1,000 rows reaches 99.76 %."""
    lengths = lognormal_lengths(100_000)
    packs = pack_lengths(lengths, 8192)
    assert_whole(packs)
    assert packs.fill == pytest.approx(0.9998, abs=1e-4)
    assert len(packs) <= -(-lengths.sum() // 8192) + 2  # two more than if rows could be cut


@pytest.mark.parametrize("seed", range(20))
def test_packs_are_those_of_best_fit_decreasing(seed):
    random = np.random.RandomState(seed)
    capacity = int(random.randint(5, 60))
    lengths = random.randint(1, capacity + 1, 200)
    if seed % 2:  # many equal lengths and many short ones
        lengths = lengths // 5 + 1
    packs = pack_lengths(lengths, capacity)
    assert_whole(packs)
    ours = sorted(sorted(lengths[packs[i]].tolist(), reverse=True) for i in range(len(packs)))
    theirs = simple_best_fit(lengths, capacity)
    assert sorted(map(sum, ours)) == sorted(map(sum, theirs))


def test_packs_are_pinned():
    """A change here would change every packed run."""
    packs = pack_lengths(np.asarray([3, 9, 3, 4, 10, 3, 1, 6, 3, 3, 7, 3]), 10)
    rows = [packs[i].tolist() for i in range(len(packs))]
    assert rows == [[0, 10], [1], [2, 5, 6, 8], [3, 7], [4], [9, 11]]
    assert packs.fill == 55 / 60


def test_packs_do_not_depend_on_the_integer_type_and_one_row_is_enough():
    lengths = lognormal_lengths(500)
    assert pack_lengths(lengths.astype(np.int32), 8192).fingerprint == pack_lengths(lengths, 8192).fingerprint
    assert pack_lengths(lengths[:1], 8192)[0].tolist() == [0]


def test_epochs_bring_other_rows_of_the_same_lengths_together():
    lengths = lognormal_lengths(5_000)
    packs = pack_lengths(lengths, 8192)
    epochs = [packs.with_new_neighbours(7, epoch) for epoch in (0, 1)]
    for other in epochs:
        assert_whole(other)
        assert (lengths[other.rows] == lengths[packs.rows]).all() and (other.offsets == packs.offsets).all()
        assert (other.rows != packs.rows).mean() > 0.5
    assert (epochs[0].rows != epochs[1].rows).mean() > 0.5
    assert packs.with_new_neighbours(7, 1).fingerprint == epochs[1].fingerprint
    assert packs.with_new_neighbours(8, 1).fingerprint != epochs[1].fingerprint


@pytest.mark.parametrize("lengths", [[5, 11], [0, 5]])
def test_rows_that_cannot_be_packed_are_a_mistake_of_ours(lengths):
    with pytest.raises(AssertionError):
        pack_lengths(np.asarray(lengths), 10)
