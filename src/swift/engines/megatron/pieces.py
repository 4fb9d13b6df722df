"""How a parameter of megatron-core is put together of tensors in files: rectangles, and where they lie in it.

The same list is what loading reads, what export sends and what files are checked against. Pure arithmetic.
Not here: names (tables.py), reading and sending (bridge.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Box = tuple[tuple[int, int], ...]  # (start, end) in every dimension


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor in files, and where it lies in a parameter of this rank."""

    file: int  # which of the tensors that the parameter is made of
    whole: Shape  # of that tensor
    source: Box
    target: Box


@dataclass(frozen=True)
class Cut:
    """What the cuts of a model's parameters depend on. `rank` is one of `ranks` that share the parameter."""

    rank: int
    ranks: int
    vocabulary: int  # rows that files have; those of the parameter are padded to equal shares
    heads: int
    groups: int  # key-value heads


def box_of(shape: Shape) -> Box:
    """All of a tensor."""
    return tuple((0, length) for length in shape)


def whole_parameter(shape: Shape, _: Cut) -> Iterator[Piece]:
    """The same on all ranks."""
    yield Piece(0, shape, box_of(shape), box_of(shape))


def rows_of_vocabulary(shape: Shape, cut: Cut) -> Iterator[Piece]:
    """Shares of the padded vocabulary; a rank may have nothing but padding."""
    rows, *rest = shape
    start, end = cut.rank * rows, min((cut.rank + 1) * rows, cut.vocabulary)
    if start < end:
        around = box_of(tuple(rest))
        yield Piece(0, (cut.vocabulary, *rest), ((start, end), *around), ((0, end - start), *around))


def outputs(shape: Shape, cut: Cut) -> Iterator[Piece]:
    """Shares of the outputs of a linear layer."""
    height, width = shape
    source = ((cut.rank * height, (cut.rank + 1) * height), (0, width))
    yield Piece(0, (height * cut.ranks, width), source, box_of(shape))


def columns(shape: Shape, cut: Cut) -> Iterator[Piece]:
    """Shares of the inputs of a linear layer."""
    rows, width = shape
    source = ((0, rows), (cut.rank * width, (cut.rank + 1) * width))
    yield Piece(0, (rows, width * cut.ranks), source, box_of(shape))


def gate_and_up(shape: Shape, cut: Cut) -> Iterator[Piece]:
    """A share of the outputs of the first layer, then the same share of those of the second."""
    rows, rest = shape[0] // 2, shape[1:]
    around = box_of(rest)
    for i in range(2):
        source = ((cut.rank * rows, (cut.rank + 1) * rows), *around)
        yield Piece(i, (rows * cut.ranks, *rest), source, ((i * rows, (i + 1) * rows), *around))


def heads_by_group(shape: Shape, cut: Cut) -> Iterator[Piece]:
    """For every key-value head of this rank its queries, its key and its value, one below the other."""
    groups, per_group = cut.groups // cut.ranks, cut.heads // cut.groups
    assert groups * cut.ranks == cut.groups, f"{cut.groups} key-value heads on {cut.ranks} ranks"
    rest = shape[1:]
    around = box_of(rest)
    width = shape[0] // (groups * (per_group + 2))
    place = 0
    for group in range(cut.rank * groups, (cut.rank + 1) * groups):
        for i, count in enumerate((per_group * width, width, width)):
            source = ((group * count, (group + 1) * count), *around)
            yield Piece(i, (cut.groups * count, *rest), source, ((place, place + count), *around))
            place += count


KINDS: dict[str, Callable[[Shape, Cut], Iterator[Piece]]] = {
    "copy": whole_parameter,
    "whole": whole_parameter,  # of a linear layer, which may have adapters
    "column": outputs,
    "vocabulary": rows_of_vocabulary,
    "row": columns,
    "gate_up": gate_and_up,
    "qkv": heads_by_group,
}
