"""Tokens per second of `swift deploy`: many streams at once against one after another, on the same server.

    python benchmarks/serve_streams.py [--model smollm2-135m] [--streams 16] [--requests 16] [--tokens 64]

Prints one JSON line. Each client streams answers of up to `--tokens` tokens to prompts of its own, drawn with
fixed seeds, so both passes compute the same tokens but for rounding. The clients run on the same machine, in
one process.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx

SUBJECTS = ("the moon", "a clock", "bread", "rivers", "the number seven", "a violin", "snow", "salt")


def start(model: str, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "swift", "deploy", "--model", model, "--port", str(port)]
    server = subprocess.Popen([*command, "--served_model_name", "model", "--log_interval", "0"])
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return server
        except httpx.TransportError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.2)


async def stream(client: httpx.AsyncClient, number: int, tokens: int) -> int:
    """Generated tokens of one request."""
    question = f"{number}. Write a long story about {SUBJECTS[number % len(SUBJECTS)]}."
    body = {
        "model": "model", "messages": [{"role": "user", "content": question}], "max_tokens": tokens,
        "temperature": 1.0, "seed": number, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    last = ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last = line
    return int(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"])


async def measure(port: int, *, requests: int, streams: int, tokens: int) -> tuple[int, float]:
    """Tokens and seconds of so many requests, `streams` at a time."""
    places = asyncio.Semaphore(streams)
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=600) as client:

        async def one(number: int) -> int:
            async with places:
                return await stream(client, number, tokens)

        await one(0)  # connections and buffers are there before the clock starts
        began = time.perf_counter()
        counts = await asyncio.gather(*map(one, range(requests)))
        return sum(counts), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start(options.model, port)
    try:
        sizes = {"requests": options.requests, "tokens": options.tokens}
        alone, alone_seconds = asyncio.run(measure(port, streams=1, **sizes))
        together, seconds = asyncio.run(measure(port, streams=options.streams, **sizes))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    result = {
        "model": options.model,
        "streams": options.streams,
        "requests": options.requests,
        "generated_tokens": together,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "one_client_tokens_per_second": round(alone / alone_seconds, 1),
        "streams_tokens_per_second": round(together / seconds, 1),
        "ratio": round(together / seconds / (alone / alone_seconds), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
