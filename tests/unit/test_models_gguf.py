"""The GGUF reader and the conversion, on small files whose bytes are written here."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from swift.models.gguf import GgufError, GgufFile
from swift.models.gguf_convert import convert, round_to_bfloat16

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
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


def write_gguf(path: Path, metadata: dict, tensors: dict, *, version: int = 3) -> Path:
    """tensors: name -> (dimensions as GGUF orders them, type name, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += pack_text(key) + pack_value(value)
    data = b""
    for name, (dims, kind, raw) in tensors.items():
        head += pack_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", TYPE_NUMBERS.get(kind, 99), len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def decode_slowly(kind: str, raw: bytes) -> list[float]:
    """One block, value by value, from the format's definition."""
    if kind in ("F32", "F16"):
        return list(struct.unpack("<f" if kind == "F32" else "<e", raw))
    if kind == "BF16":
        return list(struct.unpack("<f", b"\0\0" + raw))
    scale = np.float32(struct.unpack("<e", raw[:2])[0])
    if kind == "Q8_0":
        return [float(scale * np.float32(q)) for q in struct.unpack("<32b", raw[2:])]
    packed, low = (
        (raw[2:], None) if kind == "Q4_0" else (raw[4:], np.float32(struct.unpack("<e", raw[2:4])[0]))
    )
    values = []
    for index in range(32):
        byte = packed[index % 16]
        quant = byte & 0xF if index < 16 else byte >> 4
        values.append(
            float(scale * np.float32(quant - 8) if low is None else scale * np.float32(quant) + low)
        )
    return values


BLOCK_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
BLOCK_VALUES = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_1": 32}


@pytest.mark.parametrize("kind", BLOCK_BYTES)
def test_every_block_type_decodes_as_defined(tmp_path: Path, kind: str) -> None:
    random = np.random.default_rng(7)
    rows, width = 6, 64
    blocks = []
    for _ in range(rows * width // BLOCK_VALUES[kind]):
        block = bytearray(random.integers(0, 256, BLOCK_BYTES[kind], dtype=np.uint8).tobytes())
        if kind in ("F32", "F16", "BF16"):  # finite numbers
            number = float(random.normal())
            raw32 = struct.pack("<f", number)
            block = {"F32": raw32, "F16": struct.pack("<e", number), "BF16": raw32[2:]}[kind]
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


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(GgufError, match="not a GGUF file"):
        GgufFile(tmp_path / "no.gguf")
    with pytest.raises(GgufError, match="version 1 is not supported"):
        GgufFile(write_gguf(tmp_path / "old.gguf", {}, {}, version=1))
    with pytest.raises(GgufError, match="tensor w has block type 99"):
        GgufFile(write_gguf(tmp_path / "odd.gguf", {}, {"w": ((32,), "IQ9", b"")}))
    whole = write_gguf(tmp_path / "whole.gguf", {"a": "b" * 50}, {"w": ((8,), "F32", b"\0" * 32)})
    (tmp_path / "head.gguf").write_bytes(whole.read_bytes()[:60])
    with pytest.raises(GgufError, match="header is cut short"):
        GgufFile(tmp_path / "head.gguf")
    (tmp_path / "tail.gguf").write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(GgufError, match="ends before tensor w"):
        GgufFile(tmp_path / "tail.gguf").read("w")


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = np.concatenate(
        [
            np.random.default_rng(0).normal(size=10_000).astype(np.float32),
            # exact ties: halfway between two bfloat16 numbers, both parities
            np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x00000000], np.uint32).view(np.float32),
        ]
    )
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(round_to_bfloat16(values).view(np.int16), expected)


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


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", {"general.architecture": "rwkv"}, {})
    with pytest.raises(GgufError, match="architecture rwkv is not supported"):
        convert(path, tmp_path / "out")
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
    }
    with pytest.raises(GgufError, match="tokenizer llama/default is not supported"):
        convert(write_gguf(tmp_path / "y.gguf", metadata, {}), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf", "y.gguf"]
