"""How long training waits for a checkpoint, and how long the checkpoint takes beside it.

    python benchmarks/checkpoint_pause.py [--saves 3] [--folder DIR]

A Llama of 110 million random weights in float32 with AdamW (1.3 GB a checkpoint), on the GPU where there is
one. Prints one JSON line: the pause of each save (the training path), the time until its checkpoint is whole,
steps taken meanwhile, and the seconds of a step alone and beside a save. The first save may not be typical:
memory for the copies is asked for then.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swift.batch import Batch
from swift.config.optim import OptimConfig
from swift.engines.ranks import Ranks
from swift.engines.transformers.engine import TransformersEngine
from swift.objectives.sft import Sft
from swift.train.saving import Saver
from swift.train.state import TrainState

TOKENS = 64


def build_engine() -> TransformersEngine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    return TransformersEngine(model, OptimConfig(), learning_rate=1e-5, total_steps=10**6)


def step_seconds(engine: TransformersEngine) -> float:
    started = time.perf_counter()
    ids = torch.randint(32_000, (TOKENS,))
    engine.forward_backward([Batch(ids, ids.roll(-1), torch.zeros(TOKENS, dtype=torch.int64), 1)], Sft())
    engine.optim_step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", default=None, help="on the disk to be measured; none = the temporary one")
    given = parser.parse_args()
    engine = build_engine()
    step_seconds(engine)
    alone = [step_seconds(engine) for _ in range(5)]
    pauses, wholes, beside = [], [], []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
        saver = Saver(
            Path(folder), tokenizer, {}, {}, only_model=False, total_limit=1, symlinks=True, ranks=Ranks()
        )
        for step in range(1, given.saves + 1):
            started = time.perf_counter()
            saver.save(engine, TrainState(step=step), None, lower_is_better=True)
            pauses.append(round(time.perf_counter() - started, 3))
            while not saver.take_whole():
                beside.append(step_seconds(engine))
            wholes.append(round(time.perf_counter() - started, 3))
        checkpoint = Path(folder) / f"checkpoint-{given.saves}"
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
    numbers = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "megabytes": round(size / 1e6),
        "pause_seconds": pauses,
        "whole_after_seconds": wholes,
        "steps_meanwhile": len(beside),
        "step_seconds_alone": round(statistics.median(alone), 3),
        "step_seconds_beside": round(statistics.median(beside), 3),
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
