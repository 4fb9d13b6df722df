"""Files of an engine: weights in HF format, and the state that makes a run resumable.

Weights do not depend on how many processes there are; random states are those of each process.
Written straight into the directory given; train/saving.py makes the whole checkpoint atomic.
"""

import random
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from swift.models.starts import has_starts, load_starts, save_with_starts

OPTIMIZER, SCHEDULER, RANDOM = "optimizer.pt", "scheduler.pt", "rng_state.pth"


def save_weights(
    model: PreTrainedModel | PeftModel, path: Path, state: dict[str, Tensor] | None = None
) -> None:
    """adapter_model.safetensors for adapters, model*.safetensors and config.json otherwise.

    `state`: the whole tensors by name, where those of the model are slices.
    """
    if isinstance(model, PeftModel) and has_starts(model):
        save_with_starts(model, path, state)
    else:
        model.save_pretrained(path, state_dict=state)


def load_weights(model: PreTrainedModel | PeftModel, path: Path) -> None:
    """Puts the saved weights into a model of the same shape; no tensor may be missing or left over."""
    if isinstance(model, PeftModel):
        tensors = load_peft_weights(str(path), device="cpu")
        saved_rank = PeftConfig.from_pretrained(str(path)).r
        if saved_rank == 2 * model.peft_config["default"].r:
            tensors = load_starts(model, tensors)
        result = set_peft_model_state_dict(model, tensors)
        assert not result.unexpected_keys, f"{path}: unexpected adapter tensors {result.unexpected_keys[:3]}"
        return
    state = {k: v for file in sorted(path.glob("model*.safetensors")) for k, v in load_file(file).items()}
    result = model.load_state_dict(state, strict=False)
    missing = set(result.missing_keys) - set(model._tied_weights_keys or ())
    assert not missing and not result.unexpected_keys, (
        f"{path}: missing {missing}, unexpected {result.unexpected_keys}"
    )


def random_file(rank: int) -> str:
    """Rank 0's has the name that single processes use."""
    return RANDOM if rank == 0 else f"{Path(RANDOM).stem}_{rank}.pth"


def save_random(path: Path, rank: int) -> None:
    """Every random state that training reads, of this process."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(states, path / random_file(rank))


def load_random(path: Path, rank: int) -> None:
    """The inverse of `save_random`. A rank that the saving job did not have keeps its fresh seed."""
    if not (path / random_file(rank)).exists():
        return
    # The states hold numpy arrays and tuples; they are ours, and their hash was checked before.
    states = torch.load(path / random_file(rank), weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
