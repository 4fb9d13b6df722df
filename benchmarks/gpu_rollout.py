"""Sampling on one GPU with random weights of a true shape: our decoder, and transformers' `generate`.

    python benchmarks/gpu_rollout.py [--shape qwen3-1.7b] [--prompts 64] [--answers 8] [--tokens 1024] \\
        [--eager] [--peer 128]

Answers never end before --tokens, so every row is as long as any. Prompts have 64 to 256 random tokens.
Prints a JSON line for a decoder with graphs, with --eager one without, with --peer ROWS one for `generate`
over so many rows at once (temperature 1, all tokens, as GRPO samples). Seconds are of the second run, after
kernels have been compiled; recording the graphs is part of it. --profile shows what the time goes into.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import torch
from gpu_sft_step import SHAPES
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from swift.engines.attention import FLAT_ATTENTION
from swift.rollout.decoder import Decoder
from swift.rollout.types import Request, Sampling


def build(shape: str) -> torch.nn.Module:
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPES[shape]), dtype=torch.bfloat16)
    return model.eval()


def sample(model: torch.nn.Module, prompts: list[list[int]], answers: int, tokens: int, graphs: bool) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    context = max(map(len, prompts)) + tokens
    rows = len(prompts) * answers
    decoder = Decoder(model, tokenizer, stop_token_ids=[], context=context, max_rows=rows)
    if not graphs:
        decoder.graphs = None
    found = decoder.generate([Request(p, Sampling(tokens, seed=i), answers) for i, p in enumerate(prompts)])
    assert all(len(answer.token_ids) == tokens for group in found for answer in group)


def show_profile(run: Callable[[], None]) -> None:
    """The kernels that take most of the time."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60))


def measure(what: str, drawn: int, run: Callable[[], None], **facts: object) -> None:
    for _ in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    line = {"what": what, "device": torch.cuda.get_device_name(), **facts, "seconds": round(seconds, 2)}
    print(json.dumps({**line, "tokens_per_second": round(drawn / seconds), "memory_gib": memory}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--peer", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="also without graphs")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    model = build(options.shape)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 257, (options.prompts,), generator=generator).tolist()
    prompts = [torch.randint(10, 150_000, (n,), generator=generator).tolist() for n in lengths]
    total = options.prompts * options.answers * options.tokens
    facts = {
        "shape": options.shape,
        "prompts": options.prompts,
        "answers": options.answers,
        "tokens": options.tokens,
    }
    model.set_attn_implementation(FLAT_ATTENTION)
    for graphs in (True, False) if options.eager else (True,):
        run = partial(sample, model, prompts, options.answers, options.tokens, graphs)
        measure("decoder, graphs" if graphs else "decoder", total, run, **facts)
    if options.profile:
        show_profile(partial(sample, model, prompts, options.answers, 64, True))
    if options.peer:
        model.set_attn_implementation("sdpa")
        rows = [p for p in prompts for _ in range(options.answers)][: options.peer]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device="cuda")
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device="cuda")
        config = GenerationConfig(
            max_new_tokens=options.tokens,
            min_new_tokens=options.tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )

        def generate() -> None:
            with torch.no_grad():
                model.generate(input_ids=ids, attention_mask=mask, generation_config=config)

        measure("transformers generate", len(rows) * options.tokens, generate, **facts, rows=len(rows))


if __name__ == "__main__":
    main()
