"""Seconds of a GRPO step on this machine: ours, and TRL's GRPOTrainer with the answers of transformers.

    python benchmarks/grpo_step.py [--prompts 4] [--tokens 48] [--steps 3]
    python benchmarks/grpo_step.py --shape qwen3-1.7b --prompts 64 --tokens 1024 --steps 2 [--together 128]

Both train all weights on the same prompts, eight answers to each of at most `--tokens` tokens, by the same
reward, without a reference, in micro-batches of `--micro` answers; each in a process of its own, one after
the other. Without `--shape` it is the built-in model in float32 on this CPU; with it, random weights of a
true shape in bfloat16 on a GPU, whose answers hardly ever end early. TRL samples `--together` answers at a
time, where a GPU does not hold all of them. Prints a JSON line for each side: seconds of a step by phase, CPU
seconds of a step (all threads, of the process alone) and tokens of the answers, all without the first step of
several, which warms up. The last line has the ratios.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_sft_step import SHAPES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from swift.cli.main import run
from swift.models.hub import resolve_model
from swift.plugins.callbacks import Callback, StartEvent, StepEvent, extra_callbacks
from swift.plugins.hooks import orms

SUBJECTS = ("the moon", "a clock", "bread", "rivers", "the number seven", "a violin", "snow", "salt")
MODEL, GROUP, RATE = "smollm2-135m", 8, 1e-6
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(shape: dict[str, Any], folder: Path) -> Path:
    """Random weights, and a tokenizer that has a word for every id."""
    words = [*SPECIALS, *(f"w{i}" for i in range(len(SPECIALS), shape["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIALS[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        config = Qwen3Config(**shape, **end, max_position_embeddings=8192)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIALS[2], pad_token=SPECIALS[0], unk_token=SPECIALS[3],
        additional_special_tokens=[SPECIALS[1]], chat_template=CHATML,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def questions(given: argparse.Namespace) -> list[str]:
    """For all steps: of 40 to 100 tokens, which a model answers at length, or 64 to 256 random words."""
    count = given.prompts * given.steps
    if given.shape:
        chosen = random.Random(0)
        last = SHAPES[given.shape]["vocab_size"] - 1
        return [
            " ".join(f"w{chosen.randint(4, last)}" for _ in range(chosen.randint(64, 256)))
            for _ in range(count)
        ]
    return [
        f"{i}. Write a long story about {SUBJECTS[i % 8]}." + " With many turns." * (i % 11)
        for i in range(count)
    ]


def score(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs from answer to answer and takes no time."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [(text.count(" ") + text.count("7")) / max(len(text), 1) for text in texts]


def report(side: str, stamps: list[tuple[float, float]], phases: dict[str, float], tokens: float) -> None:
    """`stamps`: (clock, processor) at the start and at the end of each step."""
    warm = warming(len(stamps) - 1)
    (first, first_cpu), (last, last_cpu) = stamps[warm], stamps[-1]
    steps = len(stamps) - 1 - warm
    figures = {"seconds": (last - first) / steps, "cpu_seconds": (last_cpu - first_cpu) / steps}
    shown = {k: round(v, 2) for k, v in (figures | phases).items()}
    print(json.dumps({"side": side, **shown, "mean_tokens": round(tokens, 1)}), flush=True)


def warming(steps: int) -> int:
    """How many of the first steps do not count."""
    return int(steps > 1)


def stamp() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run_ours(model: Path, given: argparse.Namespace, folder: Path) -> None:
    rows, stamps = [], []

    class Watch(Callback):
        def on_start(self, _: StartEvent) -> None:
            stamps.append(stamp())

        def on_step(self, event: StepEvent) -> None:
            rows.append(event.row)
            stamps.append(stamp())

    extra_callbacks.append(Watch())
    orms["score"] = score
    data = folder / "rows.jsonl"
    asked = questions(given)
    data.write_text("".join(json.dumps({"query": text}) + "\n" for text in asked))
    answers = given.prompts * GROUP
    code = run(
        [
            "rlhf", "--rlhf_type", "grpo", "--model", str(model), "--train_type", "full",
            "--torch_dtype", "bfloat16" if given.shape else "float32", "--optim", "adamw_torch_fused",
            "--dataset", str(data), "--reward_funcs", "score",
            "--num_generations", str(GROUP), "--per_device_train_batch_size", str(given.micro),
            "--gradient_accumulation_steps", str(answers // given.micro), "--temperature", "1", "--beta", "0",
            "--max_completion_length", str(given.tokens), "--learning_rate", str(RATE),
            "--max_steps", str(given.steps), "--logging_steps", "1", "--save_strategy", "no",
            "--split_dataset_ratio", "0", "--report_to", "none", "--output_dir", str(folder / "out"),
        ]
    )  # fmt: skip
    assert code == 0, code
    names = {"rollout": "time/rollout", "score": "time/score", "update": "time/update"}
    late = rows[warming(given.steps) :]
    phases = {k: sum(row[name] for row in late) / len(late) for k, name in names.items()}
    report("swift", stamps, phases, sum(row["completions/mean_length"] for row in rows) / len(rows))


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shape", choices=tuple(SHAPES))
    parser.add_argument("--micro", type=int, default=16, help="answers of a micro-batch")
    parser.add_argument("--together", type=int, help="answers that TRL samples at a time (default: all)")
    parser.add_argument("--model", type=Path, help="made already")
    parser.add_argument("--alone", action="store_true", help="this side only")
    return parser.parse_args()


def measure(folder: str) -> None:
    """Both sides in processes of their own, and the ratios."""
    given = read_flags()
    model = make_model(SHAPES[given.shape], Path(folder)) if given.shape else resolve_model(MODEL)
    found = {}
    for file in ("grpo_step.py", "grpo_step_peer.py"):
        command = [sys.executable, str(Path(__file__).with_name(file)), *sys.argv[1:], "--alone"]
        result = subprocess.run(
            [*command, "--model", str(model)], stdout=subprocess.PIPE, text=True, check=True
        )
        line = [line for line in result.stdout.splitlines() if line.startswith('{"side"')][-1]
        print(line, flush=True)
        found[json.loads(line)["side"]] = json.loads(line)
    ratios = {
        name: round(found["trl"][name] / found["swift"][name], 2)
        for name in ("seconds", "cpu_seconds", "rollout", "update")
    }
    print(json.dumps({"trl over swift": ratios, "threads": int(os.environ.get("OMP_NUM_THREADS", 0))}))


def main() -> None:
    given = read_flags()
    with tempfile.TemporaryDirectory() as folder:
        if given.alone:
            run_ours(given.model, given, Path(folder))
        else:
            measure(folder)


if __name__ == "__main__":
    main()
