"""The peer's side of infer_batch.py: answers as its `swift infer --infer_backend transformers` gives them.

Runs in an interpreter in which ms-swift 4 is installed, not ours.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from swift.infer_engine import InferRequest, RequestConfig, TransformersEngine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("conversations")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    given = parser.parse_args()
    engine = TransformersEngine(
        given.model, max_batch_size=given.batch_size, torch_dtype=getattr(torch, given.dtype),
        model_type="llama", template_type="chatml", attn_impl="sdpa",
    )  # fmt: skip
    requests = [InferRequest(messages=m) for m in json.loads(Path(given.conversations).read_text())]
    config = RequestConfig(max_tokens=given.tokens, temperature=0)
    engine.infer(requests[:1], config, use_tqdm=False)
    start = time.perf_counter()
    answers = engine.infer(requests, config, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(answer.usage.completion_tokens for answer in answers)
    rate = round(tokens / seconds, 2)
    print(json.dumps({"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": rate}), flush=True)


if __name__ == "__main__":
    main()
