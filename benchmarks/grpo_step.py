"""Seconds of a GRPO step on this machine: ours, and TRL's GRPOTrainer with the answers of transformers.

    python benchmarks/grpo_step.py [--prompts 4] [--tokens 48] [--steps 3]

Both train all weights of the built-in model in float32 on the same stories, eight answers to each prompt of
at most `--tokens` tokens, by the same reward, without a reference, in micro-batches of 16 answers; each in a
process of its own, one after the other. Prints a JSON line for each side: seconds of a step by phase, CPU
seconds of a step (all threads, of the process alone) and tokens of the answers, all without the first step,
which warms up. The last line has the ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from swift.cli.main import run
from swift.models.hub import resolve_model
from swift.plugins.callbacks import Callback, StepEvent, extra_callbacks
from swift.plugins.hooks import orms

SUBJECTS = ("the moon", "a clock", "bread", "rivers", "the number seven", "a violin", "snow", "salt")
MODEL, GROUP, MICRO, RATE = "smollm2-135m", 8, 16, 1e-6


def questions(count: int) -> list[str]:
    """Of 40 to 100 tokens; a model answers each at length."""
    return [
        f"{i}. Write a long story about {SUBJECTS[i % 8]}." + " With many turns." * (i % 11)
        for i in range(count)
    ]


def spaces(completions: list[Any], **_: Any) -> list[float]:
    """A reward that differs from answer to answer and takes no time."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [text.count(" ") / max(len(text), 1) for text in texts]


def report(side: str, stamps: list[tuple[float, float]], phases: dict[str, float], tokens: float) -> None:
    """`stamps`: (clock, processor) at the end of each step."""
    (first, first_cpu), (last, last_cpu) = stamps[0], stamps[-1]
    steps = len(stamps) - 1
    figures = {"seconds": (last - first) / steps, "cpu_seconds": (last_cpu - first_cpu) / steps}
    shown = {k: round(v, 2) for k, v in (figures | phases).items()}
    print(json.dumps({"side": side, **shown, "mean_tokens": round(tokens, 1)}), flush=True)


def stamp() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run_ours(model: Path, given: argparse.Namespace, folder: Path) -> None:
    rows, stamps = [], []

    class Watch(Callback):
        def on_step(self, event: StepEvent) -> None:
            rows.append(event.row)
            stamps.append(stamp())

    extra_callbacks.append(Watch())
    orms["spaces"] = spaces
    data = folder / "rows.jsonl"
    asked = questions(given.prompts * given.steps)
    data.write_text("".join(json.dumps({"query": text}) + "\n" for text in asked))
    answers = given.prompts * GROUP
    code = run(
        [
            "rlhf", "--rlhf_type", "grpo", "--model", str(model), "--train_type", "full",
            "--torch_dtype", "float32", "--dataset", str(data), "--reward_funcs", "spaces",
            "--num_generations", str(GROUP), "--per_device_train_batch_size", str(MICRO),
            "--gradient_accumulation_steps", str(answers // MICRO), "--temperature", "1", "--beta", "0",
            "--max_completion_length", str(given.tokens), "--learning_rate", str(RATE),
            "--max_steps", str(given.steps), "--logging_steps", "1", "--save_strategy", "no",
            "--split_dataset_ratio", "0", "--report_to", "none", "--output_dir", str(folder / "out"),
        ]
    )  # fmt: skip
    assert code == 0, code
    names = {"rollout": "time/rollout", "score": "time/score", "update": "time/update"}
    phases = {k: sum(row[name] for row in rows[1:]) / (len(rows) - 1) for k, name in names.items()}
    report("swift", stamps, phases, sum(row["completions/mean_length"] for row in rows) / len(rows))


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="this side only")
    return parser.parse_args()


def main() -> None:
    given = read_flags()
    if given.alone:
        with tempfile.TemporaryDirectory() as folder:
            run_ours(resolve_model(MODEL), given, Path(folder))
        return
    found = {}
    for file in ("grpo_step_peer.py", "grpo_step.py"):
        command = [sys.executable, str(Path(__file__).with_name(file)), *sys.argv[1:], "--alone"]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        line = [line for line in result.stdout.splitlines() if line.startswith('{"side"')][-1]
        print(line, flush=True)
        found[json.loads(line)["side"]] = json.loads(line)
    ratios = {
        name: round(found["trl"][name] / found["swift"][name], 2)
        for name in ("seconds", "cpu_seconds", "rollout", "update")
    }
    print(json.dumps({"trl over swift": ratios, "threads": int(os.environ.get("OMP_NUM_THREADS", 0))}))


if __name__ == "__main__":
    main()
