"""The peer's side of grpo_step.py."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from grpo_step import GROUP, RATE, questions, read_flags, report, score, stamp, warming
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def run_trl(model: Path, given: argparse.Namespace, folder: Path) -> None:
    stamps: list[tuple[float, float]] = []
    spent: dict[str, list[float]] = {"rollout": [], "prepare": [], "update": []}

    def timed(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = method(self, *args, **options)
            spent[phase].append(time.perf_counter() - start)
            return result

        return call

    class Timed(GRPOTrainer):
        _generate = timed("rollout", GRPOTrainer._generate)
        _generate_and_score_completions = timed("prepare", GRPOTrainer._generate_and_score_completions)
        training_step = timed("update", GRPOTrainer.training_step)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(stamp())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(stamp())

    answers, on_gpu = given.prompts * GROUP, torch.cuda.is_available()
    asked = [[{"role": "user", "content": text}] for text in questions(given)]
    config = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=given.micro, num_generations=GROUP,
        gradient_accumulation_steps=answers // given.micro, max_completion_length=given.tokens,
        steps_per_generation=(given.together or answers) // given.micro, gradient_checkpointing=on_gpu,
        temperature=1.0, beta=0.0, learning_rate=RATE, max_steps=given.steps, logging_steps=1,
        save_strategy="no", report_to="none", bf16=on_gpu, use_cpu=not on_gpu, loss_type="grpo",
        disable_tqdm=True,
    )  # fmt: skip
    dtype = torch.bfloat16 if given.shape else torch.float32
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        reward_funcs=score, args=config, train_dataset=Dataset.from_dict({"prompt": asked}),
        processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    warm = warming(given.steps)
    late = {
        name: sum(times[warm * len(times) // given.steps :]) / (given.steps - warm)
        for name, times in spent.items()
    }
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "reward" in row]
    phases = {
        "rollout": late["rollout"],
        "score": late["prepare"] - late["rollout"],
        "update": late["update"] - late["prepare"],  # a step prepares its batch itself
    }
    report("trl", stamps, phases, sum(lengths) / len(lengths))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run_trl(read_flags().model, read_flags(), Path(folder))
