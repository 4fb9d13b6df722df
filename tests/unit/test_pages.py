"""Pages of keys and values, and the kernel that reads them: on a GPU, else in Triton's interpreter."""

from importlib import import_module

import pytest
import torch
from tests import paged_attention

from swift.config.option import ConfigError
from swift.rollout.graphs import can_record, padded_rows
from swift.rollout.pages import PAGE, Pages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU"))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "width", "value_width"),
    [(3, 4, 2, 16, 16), (2, 4, 2, 128, 128), (1, 9, 3, 64, 64), (2, 2, 2, 96, 40)],
)
def test_the_kernel_is_attention(rows, heads, groups, width, value_width, window, dtype, monkeypatch) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux")
    kernels = import_module("swift.rollout.kernels")
    if DEVICE.type == "cpu":  # one program after the other: a few of them show as much
        monkeypatch.setattr(kernels, "ENOUGH", (1 if window else 3) * rows * groups)
    torch.manual_seed(0)
    made = {"device": DEVICE, "dtype": dtype}
    keys = torch.randn(rows * 5 + 1, groups, PAGE, width, **made)
    values = torch.randn(rows * 5 + 1, groups, PAGE, value_width, **made)
    query = torch.randn(rows, heads, width, **made)
    table = torch.randperm(rows * 5, device=DEVICE).view(rows, 5).int() + 1
    lengths = torch.randint(0, 5 * PAGE, (rows,), device=DEVICE)
    lengths[0] = 5 * PAGE - 1
    lengths[-1] = 0 if rows > 1 else 17
    how = {"scale": width**-0.5, "window": window}
    found = kernels.attend_pages(query, keys, values, table, lengths, **how)
    wide = (x.float() for x in (query, keys, values))
    expected = paged_attention.attend_pages(*wide, table, lengths, **how)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=close, atol=close)


def make_pages(tokens: int, rows: int = 8) -> Pages:
    """That hold so many tokens of one layer with one head of width 1."""
    pages = Pages(rows, 10 * PAGE, tokens * 2 * 4, torch.device("cpu"), layers=1)
    pages.layers[0] = pages.make((torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)))
    return pages


def test_answers_to_a_prompt_share_its_whole_pages() -> None:
    pages = make_pages(20 * PAGE)
    assert pages.join(2 * PAGE + 5, 4, 0, whole=True) == 4
    assert pages.count - 1 - len(pages.free) == 2 + 4
    assert len({tuple(held[:2]) for held in pages.held}) == 1 and len({held[2] for held in pages.held}) == 4
    pages.remove([0, 2], [(3, 0)], 0)
    assert pages.count - 1 - len(pages.free) == 2 + 2
    pages.remove([0, 1], [], 0)
    assert sorted(pages.free) == list(range(1, pages.count))


def test_rows_take_pages_as_they_grow_and_the_last_ones_give_way() -> None:
    pages = make_pages(6 * PAGE + 1)
    assert pages.count == 6  # one of them nobody's
    assert pages.join(PAGE - 1, 2, 0, whole=True) == 2
    assert pages.grow([PAGE, PAGE]) == 2 and len(pages.free) == 3
    assert pages.grow([PAGE + 1, PAGE + 1]) == 2 and len(pages.free) == 1
    assert pages.join(PAGE, 1, 0, whole=True) == 0  # those in flight have to have room to grow
    assert pages.grow([2 * PAGE + 1, 2 * PAGE + 1]) == 1
    assert len(pages.held[0]) == 3 and len(pages.free) == 2
    assert pages.table[0, 1:3].tolist() == pages.held[0][1:] and not pages.table[1].any()


def test_a_prompt_that_never_fits_says_so() -> None:
    pages = make_pages(3 * PAGE)
    with pytest.raises(ConfigError, match="keys and values of 128 tokens, not of a prompt of 200"):
        pages.join(200, 1, 0, whole=False)
    assert pages.join(100, 1, 0, whole=False) == 1 and pages.grow([pages.most]) == 1


def test_what_graphs_are_recorded_for() -> None:
    sizes = [padded_rows(n, 200) for n in (1, 2, 3, 33, 64, 65, 129, 193, 200)]
    assert sizes == [1, 2, 4, 64, 64, 128, 192, 200, 200]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert can_record(model)
    handle = model[1].register_forward_hook(lambda *_: None)
    assert not can_record(model)  # a graph would leave out what the hook does
    handle.remove()
    assert can_record(model)
