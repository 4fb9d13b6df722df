"""Files of an engine: weights in HF format, and the state that makes a run resumable.

Written straight into the directory given; train/saving.py makes the whole checkpoint atomic.
"""

import random
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

OPTIMIZER, SCHEDULER, RANDOM = "optimizer.pt", "scheduler.pt", "rng_state.pth"
STATE_FILES = (OPTIMIZER, SCHEDULER, RANDOM)


def save_weights(model: PreTrainedModel | PeftModel, path: Path) -> None:
    """adapter_model.safetensors for adapters, model*.safetensors and config.json otherwise."""
    model.save_pretrained(path)


def load_weights(model: PreTrainedModel | PeftModel, path: Path) -> None:
    """Puts the saved weights into a model of the same shape; no tensor may be missing or left over."""
    if isinstance(model, PeftModel):
        result = set_peft_model_state_dict(model, load_peft_weights(str(path), device="cpu"))
        assert not result.unexpected_keys, f"{path}: unexpected adapter tensors {result.unexpected_keys[:3]}"
        return
    state = {k: v for file in sorted(path.glob("model*.safetensors")) for k, v in load_file(file).items()}
    result = model.load_state_dict(state, strict=False)
    missing = set(result.missing_keys) - set(model._tied_weights_keys or ())
    assert not missing and not result.unexpected_keys, (
        f"{path}: missing {missing}, unexpected {result.unexpected_keys}"
    )


def save_state(path: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Optimizer, schedule and every random state that training reads."""
    torch.save(optimizer.state_dict(), path / OPTIMIZER)
    torch.save(scheduler.state_dict(), path / SCHEDULER)
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(states, path / RANDOM)


def load_state(path: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """The inverse of `save_state`."""
    optimizer.load_state_dict(torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True))
    scheduler.load_state_dict(torch.load(path / SCHEDULER, weights_only=True))
    # The random states hold numpy arrays and tuples; they are ours, and their hash was checked before.
    states = torch.load(path / RANDOM, weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
