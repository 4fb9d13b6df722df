"""The built-in model itself: the published tokenizer to the byte, and a model that makes sense."""

import hashlib
from pathlib import Path

import pytest
import torch

from swift.models.load import context_length, load_model, load_tokenizer

pytestmark = pytest.mark.slow

# tokenizer.json of HuggingFaceTB/SmolLM2-135M-Instruct
TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"


def test_tokenizer_is_the_published_file(smollm2: Path) -> None:
    assert hashlib.sha256((smollm2 / "tokenizer.json").read_bytes()).hexdigest() == TOKENIZER_SHA256


def test_greedy_answers_make_sense(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    model = load_model(smollm2, dtype=None, attention=None, device=torch.device("cpu"))
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert context_length(model) == 8192
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
