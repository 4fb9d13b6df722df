"""Tokens per second of answers to a file of questions: ours, transformers' `generate`, and ms-swift's.

    python benchmarks/infer_batch.py [--rows 64] [--tokens 64] [--batch_sizes 16 32 64] [--dtype float32]
        [--peer-python VENV/bin/python]

Prints one JSON line for each way, and our rate over the best of each. All of them answer the same
conversations with the built-in model, greedily, with at most `--tokens` tokens; a rate counts the tokens of
answers, with the one that ends them. One-by-one takes the first `--alone` rows. `--peer-python` is an
interpreter with ms-swift 4.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from swift.config.generation import GenerationConfig
from swift.config.model import ModelConfig
from swift.infer.engine import TransformersInferEngine
from swift.models.hub import resolve_model

SUBJECTS = ("the moon", "a clock", "bread", "rivers", "the number seven", "a violin", "snow", "salt")


def conversations(rows: int) -> list[list[dict[str, str]]]:
    """Questions of 40 to 110 tokens, each of which a model answers at length."""
    return [
        [
            {"role": "system", "content": "You tell stories."},
            {
                "role": "user",
                "content": f"{i}. Write a long story about {SUBJECTS[i % 8]}."
                + " With many turns." * (i % 11),
            },
        ]
        for i in range(rows)
    ]


def measure(way: str, answer: Callable[[], int], **fields: object) -> float:
    """Prints the rate of one way; `answer` returns how many tokens it generated."""
    start, cpu = time.perf_counter(), time.process_time()
    tokens = answer()
    seconds = time.perf_counter() - start
    rate = tokens / seconds
    figures = {
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }
    print(json.dumps({"way": way, **fields, **figures, "tokens_per_second": round(rate, 2)}), flush=True)
    return rate


def ask_peer(
    python: str, model: Path, dtype: str, tokens: int, rows: int, batch_size: int
) -> dict[str, float]:
    """What infer_batch_peer.py says, in an interpreter of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(conversations(rows), file)
        file.flush()
        command = [python, str(Path(__file__).with_name("infer_batch_peer.py")), str(model), file.name]
        options = ["--dtype", dtype, "--tokens", str(tokens), "--batch_size", str(batch_size)]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        output = subprocess.run(
            [*command, *options], env=environment, capture_output=True, text=True, check=True
        ).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peer-python")
    given = parser.parse_args()
    path = resolve_model(given.model)
    sampling = GenerationConfig(temperature=0, max_new_tokens=given.tokens)
    asked = conversations(given.rows)

    def load(attention: str | None) -> TransformersInferEngine:
        config = ModelConfig(torch_dtype=given.dtype, attn_impl=attention)
        return TransformersInferEngine.load(path, model=config)

    def answer(engine: TransformersInferEngine, rows: int, batch_size: int) -> int:
        answers = engine.generate(asked[:rows], sampling, batch_size=batch_size)
        return sum(answer.num_generated_tokens for answer in answers)

    common = {"rows": given.rows, "max_tokens": given.tokens, "dtype": given.dtype}
    common |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    ours = load(None)
    answer(ours, min(4, given.rows), 4)  # warm
    rate = measure("ours", lambda: answer(ours, given.rows, given.rows), **common)
    theirs = load("sdpa")
    answer(theirs, 1, 1)
    alone = measure(
        "generate, one by one", lambda: answer(theirs, given.alone, 1), **common | {"rows": given.alone}
    )
    batched = [
        measure("generate", lambda size=size: answer(theirs, given.rows, size), **common, batch_size=size)
        for size in given.batch_sizes
    ]
    ratios = {"to_one_by_one": round(rate / alone, 2), "to_generate": round(rate / max(batched), 2)}
    if given.peer_python:
        peers = []
        for size in given.batch_sizes:
            found = ask_peer(given.peer_python, path, given.dtype, given.tokens, given.rows, size)
            print(json.dumps({"way": "ms-swift", **common, "batch_size": size, **found}), flush=True)
            peers.append(found["tokens_per_second"])
        ratios["to_ms_swift"] = round(rate / max(peers), 2)
    print(json.dumps({"way": "ratios of ours", **common, **ratios}))


if __name__ == "__main__":
    main()
