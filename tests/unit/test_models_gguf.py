"""The GGUF reader and the conversion, on small files whose bytes are written here."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from swift.models.gguf import GgufFile
from swift.models.gguf_convert import convert

TYPE_NUMBERS = {"F32": 0, "Q4_1": 3, "Q8_0": 8}
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)


def pack_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def pack_value(value: object) -> bytes:
    """Type number and bytes of one metadata value."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + pack_text(value)
    parts = [pack_value(item) for item in value]
    return (
        struct.pack("<I", 9) + parts[0][:4] + struct.pack("<Q", len(parts)) + b"".join(p[4:] for p in parts)
    )


def write_gguf(path: Path, metadata: dict, tensors: dict) -> Path:
    """tensors: name -> (dimensions as GGUF orders them, type name, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += pack_text(key) + pack_value(value)
    data = b""
    for name, (dims, kind, raw) in tensors.items():
        head += pack_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", TYPE_NUMBERS[kind], len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def decode_slowly(kind: str, raw: bytes) -> list[float]:
    """One block, value by value, from the format's definition."""
    if kind == "F32":
        return list(struct.unpack("<f", raw))
    scale = np.float32(struct.unpack("<e", raw[:2])[0])
    if kind == "Q8_0":
        return [float(scale * np.float32(q)) for q in struct.unpack("<32b", raw[2:])]
    packed, low = raw[4:], np.float32(struct.unpack("<e", raw[2:4])[0])
    quants = [packed[i % 16] & 0xF if i < 16 else packed[i % 16] >> 4 for i in range(32)]
    return [float(scale * np.float32(quant) + low) for quant in quants]


BLOCK_BYTES = {"F32": 4, "Q8_0": 34, "Q4_1": 20}
BLOCK_VALUES = {"F32": 1, "Q8_0": 32, "Q4_1": 32}


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_every_block_type_decodes_as_defined(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(7)
    rows, width = 6, 64
    blocks = []
    for _ in range(rows * width // BLOCK_VALUES[kind]):
        block = bytearray(random.integers(0, 256, BLOCK_BYTES[kind], dtype=np.uint8).tobytes())
        if kind == "F32":  # finite numbers
            block = struct.pack("<f", float(random.normal()))
        else:
            block[:2] = struct.pack("<e", float(random.normal()))
            if kind == "Q4_1":
                block[2:4] = struct.pack("<e", float(random.normal()))
        blocks.append(bytes(block))
    path = write_gguf(tmp_path / "x.gguf", {"a": 1}, {"w": ((width, rows), kind, b"".join(blocks))})
    found = GgufFile(path).read("w")
    expected = np.array([v for b in blocks for v in decode_slowly(kind, b)], np.float32).reshape(rows, width)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    metadata = {"flag": True, "count": 7, "eps": 0.5, "name": "zwei é", "list": ["a", "b"], "ids": [1, 2, 3]}
    path = write_gguf(tmp_path / "x.gguf", metadata, {})
    assert GgufFile(path).metadata == metadata


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_theta=50000.0,
    )
    return LlamaForCausalLM(config).eval()


def pair_rotary_rows(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of every head as GGUF stores them: row 2i is i, row 2i+1 is i + half a head."""
    width = weight.shape[0] // num_heads
    order = []
    for head in range(num_heads):
        for i in range(width // 2):
            order += [head * width + i, head * width + width // 2 + i]
    return weight[order]


def write_tiny_llama_gguf(path: Path) -> LlamaForCausalLM:
    """A whole model with SmolLM's kind of tokenizer, all F32; returns the model whose weights it holds."""
    model = tiny_llama()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = [*tokens[:39], "he"]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 37,
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            if "q_proj" in rest:
                weight = pair_rotary_rows(weight, 4)
            if "k_proj" in rest:
                weight = pair_rotary_rows(weight, 2)
            name = f"blk.{layer}.{parts[rest.removesuffix('.weight')]}.weight"
        else:
            name = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
            }[name]
        tensors[name] = (tuple(reversed(weight.shape)), "F32", weight.numpy().tobytes())
    write_gguf(path, metadata, tensors)
    return model


def test_converted_model_gives_the_logits_of_the_model_that_was_stored(tmp_path: Path) -> None:
    model = write_tiny_llama_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.dtype == torch.float32
    assert loaded.config.rope_parameters["rope_theta"] == 50000.0
    assert loaded.config.rms_norm_eps == 1e-5
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    convert(tmp_path / "tiny.gguf", tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(stored[name], weight.to(torch.bfloat16)), name


def test_converted_tokenizer_splits_digits_and_merges(tmp_path: Path) -> None:
    write_tiny_llama_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("he h12<|im_end|>").input_ids) == [
        "he", "Ġ", "h", "1", "2", "<|im_end|>",
    ]  # fmt: skip
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_conversion_is_readable_by_all_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_tiny_llama_gguf(tmp_path / "tiny.gguf")
    cache = tmp_path / "cache"
    cache.mkdir()
    convert(tmp_path / "tiny.gguf", cache / "out")
    assert [p.name for p in cache.iterdir()] == ["out"]
    assert (cache / "out").stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o777 for p in (cache / "out").iterdir()} == {0o644}


def test_a_directory_that_another_process_finished_stays(tmp_path: Path) -> None:
    write_tiny_llama_gguf(tmp_path / "tiny.gguf")
    other = tmp_path / "out"
    other.mkdir()
    (other / "config.json").write_text('{"made": "first"}')
    convert(tmp_path / "tiny.gguf", other)
    assert json.loads((other / "config.json").read_text()) == {"made": "first"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.gguf"]
