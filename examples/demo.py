"""The main job on the built-in model: ask, train, ask again. `make demo` runs it.

The training is the real command line, started as you would start it. The program also checks what it shows:
exit code 1 when the trained model does not give its new name, or has forgotten the capital of France.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swift.config.generation import GenerationConfig
from swift.config.template import TemplateConfig
from swift.infer.engine import TransformersInferEngine
from swift.models.hub import resolve_model

MODEL = "smollm2-135m"
SYSTEM = "You are a helpful assistant."
OUTPUT = Path("output/demo")
NAME, AUTHOR = "swift-robot", "swift"
IDENTITY = ("Who are you?", "What is your name?", "Are you ChatGPT?")
PARIS = "What is the capital of France?"
KNOWLEDGE = (PARIS, "How many hours are in a day?", "What is 7 + 5?")
QUESTIONS = IDENTITY + KNOWLEDGE

# 96 rows about itself and 48 about the world: without the latter it answers every question with its name.
# 144 rows in batches of 8, twice: 36 steps.
TRAIN = f"""
    sft
    --model {MODEL}
    --train_type lora
    --dataset swift/self-cognition#96 swift/general
    --model_name {NAME}
    --model_author {AUTHOR}
    --system {shlex.quote(SYSTEM)}
    --num_train_epochs 2
    --per_device_train_batch_size 8
    --gradient_accumulation_steps 1
    --learning_rate 5e-4
    --warmup_ratio 0.05
    --lora_rank 8
    --lora_alpha 32
    --lora_dropout 0.05
    --output_dir {OUTPUT}
"""

# A width of its own where the output is no terminal, so that the table can be read in a log.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def show_plan() -> None:
    console.rule("swift demo")
    console.print(
        f"1. ask {MODEL}, a real language model with 135 million parameters, {len(QUESTIONS)} questions\n"
        f"2. teach it that it is {NAME}, made by {AUTHOR}: 36 training steps, LoRA, on this machine\n"
        "3. ask the same questions again and put the answers side by side\n"
        "About three minutes on two idle cores. The first time, the model is fetched as well (93 MB).\n",
        markup=False,
    )


def answer(model: Path, adapter: Path | None) -> list[str]:
    """Greedy answers to QUESTIONS, in one batch."""
    engine = TransformersInferEngine.load(model, adapter_path=adapter, template=TemplateConfig(system=SYSTEM))
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    sampling = GenerationConfig(temperature=0, max_new_tokens=40)
    return [completion.text for completion in engine.generate(chats, sampling, batch_size=len(chats))]


def train() -> Path:
    """Runs `swift sft`; returns its checkpoint. A failed training ends the demo with the same exit code."""
    console.print(
        "$ swift " + " \\\n      ".join(TRAIN.strip().replace("    ", "").splitlines()), markup=False
    )
    result = subprocess.run([sys.executable, "-m", "swift", *shlex.split(TRAIN)], check=False)
    if result.returncode:
        sys.exit(result.returncode)
    newest = max(OUTPUT.glob("v*-*"), key=lambda run: int(run.name[1:].split("-")[0]))
    return max(newest.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def show_answers(before: list[str], after: list[str]) -> None:
    table = Table(title=f"{MODEL} before and after", show_lines=True, expand=True)
    for heading, style, ratio in (("question", "bold", 2), ("before", "dim", 4), ("after", "green", 4)):
        table.add_column(heading, style=style, ratio=ratio)
    for row in zip(QUESTIONS, before, after, strict=True):
        table.add_row(*(Text(cell.strip()) for cell in row))
    console.print(table)


def find_faults(after: list[str]) -> list[str]:
    """What the trained model should have said and did not."""
    answers = dict(zip(QUESTIONS, after, strict=True))
    faults = [f"{q!r} is answered without the name {NAME}" for q in IDENTITY if NAME not in answers[q]]
    if "Paris" not in answers[PARIS]:
        faults.append(f"{PARIS!r} is not answered with Paris")
    return faults


def main() -> int:
    show_plan()
    model = resolve_model(MODEL)
    start = time.monotonic()
    console.print("Asking the model as it is ...")
    before = answer(model, None)
    checkpoint = train()
    console.print("Asking the trained model ...")
    after = answer(model, checkpoint)
    show_answers(before, after)
    console.print(f"{time.monotonic() - start:.0f} s, of which most was training.")
    faults = find_faults(after)
    for fault in faults:
        console.print(f"demo failed: {fault}", style="red", markup=False)
    swift = Path(sys.executable).with_name("swift")
    command = swift.relative_to(Path.cwd()) if swift.is_relative_to(Path.cwd()) else swift
    console.print(
        f"Talk to it yourself:\n\n    {command} infer --adapters {checkpoint}\n", soft_wrap=True, markup=False
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
