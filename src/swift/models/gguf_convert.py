"""GGUF -> a plain transformers directory: safetensors, config, tokenizer, chat template.

Owns: the Llama architecture with SmolLM's byte-level BPE tokenizer. transformers' own GGUF reader takes a
minute, splits white space before digits unlike the published tokenizer, and its models cannot be saved.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from swift.models.gguf import GgufFile

# Part of a GGUF tensor name -> module of transformers' Llama layer.
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
OUTER_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type
LAST_WRITTEN = "config.json"


def convert(source: Path, target: Path, *, dtype: str = "bfloat16") -> None:
    """Writes `target`, which appears whole or not at all.

    Another process that finishes first wins: its directory stays.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
        made = Path(work) / "model"
        made.mkdir()
        write_directory(GgufFile(source), made, dtype)
        try:
            made.rename(target)
        except OSError:
            if not (target / LAST_WRITTEN).is_file():
                raise


def write_directory(gguf: GgufFile, directory: Path, dtype: str) -> None:
    read = (read_weight(gguf, name) for name in gguf.tensors)
    weights = {name: values.to(getattr(torch, dtype)) for name, values in read}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    documents = {
        "tokenizer.json": tokenizer_json(gguf.metadata),
        "tokenizer_config.json": tokenizer_config(gguf.metadata),
        "generation_config.json": special_ids(gguf.metadata),
        LAST_WRITTEN: model_config(gguf, dtype),
    }
    for name, document in documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=False)
        (directory / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    # A cache may be shared by several users, whatever the umask and mkdtemp's private mode.
    for file in directory.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    directory.chmod(0o755)


def read_weight(gguf: GgufFile, name: str) -> tuple[str, torch.Tensor]:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`, in the row order of transformers."""
    values = gguf.read(name)
    if name in OUTER_TENSORS:
        return OUTER_TENSORS[name], torch.from_numpy(values)
    _, layer, part, kind = name.split(".")
    if part in HEADS:
        values = join_rotary_halves(values, gguf.metadata[HEADS[part]])
    return f"model.layers.{layer}.{LAYER_MODULES[part]}.{kind}", torch.from_numpy(values)


def join_rotary_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Query and key rows of every head from (x0, y0, x1, y1, ...) to (x0, x1, ..., y0, y1, ...).

    GGUF keeps the two numbers that rotary embedding turns together side by side; transformers keeps them half
    a head apart. weight: [heads * head width, ...].
    """
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Token ids of begin, end and padding, as config.json names them."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {field: f"tokenizer.ggml.{name}_token_id" for field, name in names.items()}
    return {field: metadata[key] for field, key in keys.items() if key in metadata}


def model_config(gguf: GgufFile, dtype: str) -> dict[str, Any]:
    metadata = gguf.metadata
    llama = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    num_heads = llama["attention.head_count"]
    # Stored as float32: 9.99999975e-06 was 1e-05.
    epsilon = float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama.get("attention.key_length", llama["embedding_length"] // num_heads),
        "max_position_embeddings": llama["context_length"],
        "rope_theta": llama.get("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "rms_norm_eps": epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
        **special_ids(metadata),
    }


def tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json, equal to the published file byte for byte once dumped with indent 2.

    Merges are therefore strings ("a b") and not pairs.
    """
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN])
    document = json.loads(tokenizer.to_str())
    document["model"]["merges"] = merges
    return document


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: special tokens, context length, chat template."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    keys = {field: f"tokenizer.ggml.{name}_token_id" for field, name in names.items()}
    named = {field: tokens[metadata[key]] for field, key in keys.items() if key in metadata}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": [named[field] for field in ("bos_token", "eos_token") if field in named],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
