"""`megatron pt|sft|rlhf`: the same runs on megatron-core. Nothing of it is imported by `swift`'s commands."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from swift.config.layout import Layout, choose_layout, micro_batches, model_sizes
from swift.config.megatron import MegatronConfig
from swift.config.option import ConfigError
from swift.config.runs import MegatronRlhfRun, MegatronSftRun
from swift.engines.megatron.building import (
    build_model,
    describe_implementation,
    find_mcore_model,
    is_mcore_model,
    load_base,
)
from swift.engines.megatron.checkpoint import load_checkpoint
from swift.engines.megatron.engine import MegatronEngine, Wrapping
from swift.engines.megatron.setup import context_ranks, join_model_parallel, seed_model_parallel
from swift.engines.ranks import Ranks, join_ranks
from swift.models.load import load_config, pick_device
from swift.train.backend import Backend
from swift.train.building import seed_everything
from swift.train.method import Method, rlhf_method, sft_method
from swift.train.preparing import Prepared, locate_model
from swift.train.resume import Resumption, with_model
from swift.train.run import train
from swift.utils import env
from swift.utils.log import say

Run = TypeVar("Run", MegatronSftRun, MegatronRlhfRun)


def run_pt(run: MegatronSftRun) -> int:
    """`megatron pt`; returns the exit code."""
    return train(begin(run), "pt", lambda run: sft_method(run.task, run.sft), MEGATRON)


def run_sft(run: MegatronSftRun) -> int:
    """`megatron sft`; returns the exit code."""
    return train(begin(run), "sft", lambda run: sft_method(run.task, run.sft), MEGATRON)


def run_rlhf(run: MegatronRlhfRun) -> int:
    """`megatron rlhf`; returns the exit code."""
    return train(begin(run), "rlhf", lambda run: rlhf_method(run.rlhf), MEGATRON)
