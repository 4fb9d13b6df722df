"""Learning from rewards on the built-in model: sums of one digit. `make demo-rl` runs it.

Nobody shows the model an answer: it samples eight for every sum, and those that are right count more than
those that are not. The program checks what it shows: exit code 1 when the mean reward of the last steps is
not above 0.8.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUTPUT = Path("output/demo-rl")
GOAL = 0.8
BAR = 40  # characters of a full bar

# 4 sums x 8 answers make a step; an answer has at most 12 tokens.
TRAIN = f"""
    rlhf
    --rlhf_type grpo
    --model smollm2-135m
    --train_type lora
    --dataset examples/sums/sums.jsonl
    --external_plugins examples/sums/reward.py
    --reward_funcs sums
    --num_generations 8
    --per_device_train_batch_size 32
    --max_completion_length 12
    --temperature 1
    --beta 0
    --max_steps 14
    --logging_steps 1
    --learning_rate 2e-4
    --lr_scheduler_type constant
    --lora_rank 16
    --lora_dropout 0
    --log_completions true
    --output_dir {OUTPUT}
"""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def train() -> Path:
    """Runs `swift rlhf`; its run directory. A failed training ends the demo with the same exit code."""
    console.print(
        "$ swift " + " \\\n      ".join(TRAIN.strip().replace("    ", "").splitlines()), markup=False
    )
    result = subprocess.run([sys.executable, "-m", "swift", *shlex.split(TRAIN)], check=False)
    if result.returncode:
        sys.exit(result.returncode)
    return max(OUTPUT.glob("v*-*"), key=lambda run: int(run.name[1:].split("-")[0]))


def show_rewards(rows: list[dict], answers: list[dict]) -> None:
    table = Table(title="mean reward of 32 sampled answers a step", expand=True)
    for heading in ("step", "reward", "", "one of the answers"):
        table.add_column(heading)
    for row, kept in zip(rows, answers, strict=True):
        question = kept["prompt"][0][-1]["content"].split("?")[0].removeprefix("What is ")
        bar = "█" * round(BAR * row["reward"])
        table.add_row(
            row["global_step/max_steps"],
            f"{row['reward']:.2f}",
            bar,
            f"{question} = {kept['completion'][0]!r}",
        )
    console.print(table)


def main() -> int:
    console.rule("swift demo: rewards")
    console.print(
        "smollm2-135m learns one-digit sums from rewards alone: 14 steps of GRPO, LoRA, on this machine.\n"
        "About five minutes on two idle cores. The first time, the model is fetched as well (93 MB).\n",
        markup=False,
    )
    start = time.monotonic()
    run = train()
    log = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    rows = [row for row in log if "reward" in row]
    answers = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    show_rewards(rows, answers)
    last = sum(row["reward"] for row in rows[-4:]) / 4
    console.print(f"{rows[0]['reward']:.2f} before, {last:.2f} in the last four steps; ", end="")
    console.print(f"{time.monotonic() - start:.0f} s in all. Every answer is in {run / 'completions.jsonl'}.")
    if last <= GOAL:
        console.print(f"demo failed: the mean reward should be above {GOAL}", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
