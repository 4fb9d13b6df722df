"""Fixtures for every test: a real small tokenizer, tiny models saved as directories, the built-in model.

Session-wide objects are shared between tests: a test that wants to change one takes a copy of its own with
`make_tiny_model_dir` or `make_tiny_tokenizer`.
"""

import os

# Before torch and the hub library are imported: one thread, and no test ever asks a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidia0"):  # noqa: PTH110
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs are then run by Triton's interpreter

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from forked_swift import ForkedSwift
from workers import Workers

torch.set_num_threads(1)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "Who are you? I am swift-robot, an assistant made by swift.",
    "What is the capital of France? The capital of France is Paris.",
    "system user assistant tool You are a helpful assistant.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times.",
    "How many hours are in a day? A day has 24 hours. What is 7 + 5? 7 + 5 = 12.",
    "你是谁？我是swift-robot，由swift开发的人工智能助手。",
)
Answering = Callable[[str, dict[str, Any]], tuple[int, Any]]  # path, body -> status, JSON
FAMILIES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of up to 512 tokens, ChatML: `<|endoftext|>` = 0 = pad, `<|im_end|>` = 2 = eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(directory: Path, family: str = "llama", *, seed: int = 0, **config: object) -> Path:
    """Writes model, tokenizer and generation_config.json; `config` overrides fields of the model's config."""
    tokenizer = make_tiny_tokenizer()
    config_class, model_class = FAMILIES[family]
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**(fields | config))).to(torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the tiny models; shared, so not to be changed."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama: 2 layers, 64 wide, 4 heads, 2 key/value heads, float32; read only."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same size as a Qwen3 (query and key norms); read only."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def make_tiny_model_dir() -> Callable[..., Path]:
    """`make_tiny_model_dir(tmp_path, family="llama", seed=0, **config)` -> a directory of the test's own."""

    def make(parent: Path, family: str = "llama", **options: object) -> Path:
        return save_tiny_model(parent / f"own-{family}", family, **options)

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The built-in model, fetched once into the user's cache; a test that takes it is marked slow."""
    from swift.models.hub import resolve_model

    return resolve_model("smollm2-135m")


@pytest.fixture
def serve() -> Iterator[Callable[[Answering], str]]:
    """`serve(answer)`: the URL of an HTTP server that answers (path, body) with (status, JSON)."""
    servers = []

    def start(answer: Answering) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, value = answer(self.path, json.loads(body or b"{}"))
                self.send_response(status)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
                    self.wfile.write(json.dumps(value).encode())

            do_GET = do_POST = reply

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Runs command lines in processes that need no imports, on one rank or several: see tests/workers.py."""
    server = Workers(tmp_path_factory.mktemp("jobs"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def megatron_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """The same with megatron-core: importing it changes torch, so it has a server of its own."""
    server = Workers(tmp_path_factory.mktemp("megatron-jobs"), "swift.engines.megatron.model")
    yield server
    server.close()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `swift` and `megatron` that start at once; what pip installed is tried elsewhere."""
    forked = ForkedSwift(tmp_path_factory.mktemp("forked"))
    yield forked.bin
    forked.close()
