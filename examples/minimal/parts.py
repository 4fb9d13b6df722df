"""What the three loops beside this file share: a model behind an engine, and rows as tokens."""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from swift.config.data import DataConfig
from swift.config.optim import OptimConfig
from swift.config.template import TemplateConfig
from swift.data.encode import EncodedDataset, Encoder, encode_rows
from swift.data.sources import open_rows
from swift.engines.transformers.engine import TransformersEngine
from swift.models.hub import resolve_model
from swift.models.load import load_model, load_tokenizer, pick_device
from swift.template.chat import ChatTemplate


@dataclass
class Parts:
    engine: TransformersEngine
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    rows: EncodedDataset


def read_arguments(about: str, *, dataset: str, steps: int, rows: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default="smollm2-135m", help="the built-in one, a directory or a hub id")
    parser.add_argument("--dataset", default=dataset, help="a file, as --dataset of swift takes it")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rows", type=int, default=rows, help="rows a step")
    return parser.parse_args()


def build(arguments: argparse.Namespace, *, shape: str, learning_rate: float, keep: bool = False) -> Parts:
    """All weights are trained. `shape`: of the rows, see swift/data/shapes.py. `keep`: a frozen reference."""
    torch.manual_seed(0)
    path = resolve_model(arguments.model)
    tokenizer = load_tokenizer(path)
    template = ChatTemplate(tokenizer, TemplateConfig())
    table = open_rows([arguments.dataset], seed=0, shuffle=True, columns={})
    rows, report = encode_rows(table, Encoder(template, 512, shape=shape), DataConfig())
    print(f"{report.kept} rows of {report.total} {report.summary()}")
    models = [load_model(path, dtype=None, attention=None, device=pick_device(None)) for _ in range(1 + keep)]
    engine = TransformersEngine(
        models[0], OptimConfig(), learning_rate=learning_rate, total_steps=arguments.steps,
        frozen=models[1] if keep else None,
    )  # fmt: skip
    return Parts(engine, tokenizer, template, rows)


def draw(step: int, count: int, total: int) -> list[int]:
    """Numbers of `count` rows out of `total`. A pure function of the step: whoever resumes draws the same."""
    return np.random.default_rng([0, step]).choice(total, size=min(count, total), replace=False).tolist()
