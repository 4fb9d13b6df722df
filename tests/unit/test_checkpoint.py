"""An engine's files: equal to those of transformers, cut anywhere, and read again in any number of slices."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from swift.config.optim import OptimConfig
from swift.engines.files import INDEX
from swift.engines.ranks import Ranks
from swift.engines.slices import Part, Reader, take_parts, write_parts, write_tensors
from swift.engines.transformers import checkpoint
from swift.engines.transformers.engine import TransformersEngine
from swift.engines.transformers.wrap import Wrapped

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


def load_weights(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {
        k: v for file in files if not file.name.startswith("optimizer") for k, v in load_file(file).items()
    }


def load_tiny(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_moe(_):
    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).float()


def take(model, path, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    path.mkdir()
    options = {"ranks": Ranks(), "resumable": False} | options
    wrapped = Wrapped(model, optimizer, 1.0, torch.amp.GradScaler("cpu", enabled=False))
    return checkpoint.take_snapshot(model, wrapped, scheduler, path, **options)


@pytest.mark.parametrize("make", [load_tiny, make_moe])
@pytest.mark.parametrize("shard_bytes", [2**32, 20_000])
def test_weights_are_those_that_transformers_writes(tiny_llama_dir, tmp_path, monkeypatch, make, shard_bytes):
    """Tied weights once, experts one by one; in one file or in several."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    model = make(tiny_llama_dir)
    model.save_pretrained(tmp_path / "theirs")
    expected = load_weights(tmp_path / "theirs")
    ours = tmp_path / "ours"
    snapshot = take(model, ours)
    before = {k: v.clone() for k, v in expected.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # a step after the snapshot, before the writing
    snapshot.write()
    written = load_weights(ours)
    assert written.keys() == expected.keys()
    assert all((written[k] == before[k]).all() for k in written)
    assert snapshot.bytes == sum(t.nbytes for t in written.values())
    assert (ours / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()
    index = ours / INDEX
    assert index.exists() == (shard_bytes < 2**32)
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        assert names.keys() == written.keys() and len(set(names.values())) == len(list(ours.glob("model-*")))
        assert all(name in load_file(ours / file) for name, file in names.items())
    again = type(model).from_pretrained(ours, dtype=torch.float32)
    checkpoint.load_weights(model, ours)
    assert all((a == b).all() for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_file_is_read_by_the_safetensors_package(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "turned": torch.rand(3, 2).T}
    assert write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"}) == tmp_path / "x.safetensors"
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_slices_of_three_processes_make_one_whole(tmp_path):
    whole = torch.rand(5, 4)
    for rank, (start, end) in enumerate([(0, 2), (2, 4), (4, 5)]):
        write_parts(tmp_path / f"{rank}.safetensors", {"w": Part(whole[start:end], (5, 4), (start, 0))})
    assert torch.equal(Reader(tmp_path.glob("*.safetensors")).read("w"), whole)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(AssertionError, match="w: the files hold 12 of 20 numbers"):
        Reader(tmp_path.glob("*.safetensors")).read("w")


def test_what_all_processes_hold_is_written_once(tmp_path):
    tensors = {f"w{i}": torch.full((3,), float(i)) for i in range(5)} | {"step": torch.tensor(7.0)}
    shares = [take_parts(tensors, rank=rank, world=2) for rank in range(2)]
    assert [sorted(share) for share in shares] == [["w0", "w2", "w4"], ["step", "w1", "w3"]]
    for rank, share in enumerate(shares):
        write_parts(tmp_path / f"{rank}.safetensors", share)
    reader = Reader(tmp_path.glob("*.safetensors"))
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_an_engine_goes_on_with_every_moment_and_rate(tiny_llama_dir, tmp_path):
    options = {"learning_rate": 1e-3, "total_steps": 10}
    engine = TransformersEngine(load_tiny(tiny_llama_dir), OptimConfig(), **options)

    def step(engine):
        generator = torch.Generator().manual_seed(0)
        for parameter in engine.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        return engine.optim_step()

    step(engine)
    (tmp_path / "saved").mkdir()
    engine.save(tmp_path / "saved", resumable=True).write()
    again = TransformersEngine(
        load_tiny(tiny_llama_dir), OptimConfig(), **options, resume_from=tmp_path / "saved"
    )
    assert step(engine) == step(again)
    for a, b in zip(engine.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
