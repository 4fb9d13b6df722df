"""Memory that is given back while something waits, and what is in it afterwards."""

import torch

from swift.engines.offload import set_aside


def test_tensors_come_back_to_the_bit():
    """Two views of one storage, a tensor that is a slice, one without elements."""
    whole = torch.randn(100)
    tensors = [whole[:40], whole[40:], torch.randn(7, 3)[2:], torch.randn(0), torch.arange(5)]
    before = [tensor.clone() for tensor in tensors]
    places = [tensor.untyped_storage() for tensor in tensors]
    with set_aside(tensors):
        assert [storage.nbytes() for storage in places] == [0] * 5
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    tensors[0].add_(1)
    assert torch.equal(whole[:40], before[0] + 1)
