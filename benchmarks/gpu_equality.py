"""The Megatron engine against the transformers engine on GPUs: losses and norms, float32 and bfloat16.

    torchrun --standalone --nproc_per_node 2 benchmarks/gpu_equality.py

Small random models, every layout of two ranks over NCCL; --float32 leaves bfloat16 out. Prints one line a
case with the largest relative difference of the loss and of the gradient norm over the steps.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "invariance"))

from steps import OPTIM, RATE, make_batches, make_objective
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from swift.config.layout import Layout
from swift.engines.megatron.bridge import Bridge
from swift.engines.megatron.engine import MegatronEngine, Wrapping
from swift.engines.megatron.model import build_chunks
from swift.engines.megatron.settings import model_settings
from swift.engines.megatron.setup import (
    context_ranks,
    join_model_parallel,
    leave_model_parallel,
    seed_model_parallel,
)
from swift.engines.ranks import Ranks, join_ranks, leave_ranks
from swift.engines.transformers.engine import TransformersEngine

STEPS = 6
DENSE = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
CASES = (
    ("dense", {"tensor": 2}, "all_gather"),
    ("dense", {"tensor": 2, "sequence": True}, "all_gather"),
    ("dense", {"pipeline": 2}, "all_gather"),
    ("dense", {"pipeline": 2, "virtual": 2}, "all_gather"),
    ("dense", {"context": 2}, "all_gather"),
    ("dense", {"context": 2}, "a2a"),
    ("dense", {}, "all_gather"),
    ("moe", {"expert": 2}, "all_gather"),
    ("moe", {"tensor": 2, "sequence": True, "expert_tensor": 2}, "all_gather"),
    ("moe", {"tensor": 2, "sequence": True, "expert": 2}, "all_gather"),
)


def make_models(folder: Path) -> dict[str, Path]:
    for name, config in (("dense", Qwen3Config(**DENSE)), ("moe", Qwen3MoeConfig(**DENSE | EXPERTS))):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ("dense", "moe")}


def train(engine: MegatronEngine | TransformersEngine) -> list[tuple[float, float]]:
    rows = []
    for step in range(STEPS):
        batches = make_batches(step)[engine.data_rank :: engine.data_world]
        loss = engine.forward_backward(batches, make_objective()).means()["loss/tokens"]
        rows.append((loss, engine.optim_step().grad_norm))
    return rows


def train_reference(path: Path, dtype: torch.dtype, device: torch.device) -> list[tuple[float, float]]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    return train(TransformersEngine(model, OPTIM, learning_rate=RATE, total_steps=STEPS, ranks=Ranks()))


def train_megatron(path: Path, dtype: torch.dtype, degrees: dict, kind: str, ranks: Ranks) -> list:
    layout = Layout(world=ranks.world, **degrees)
    ranks = join_model_parallel(ranks, layout, 600)
    seed_model_parallel(1)
    config = AutoModelForCausalLM.from_pretrained(path).config
    fused = {} if dtype == torch.bfloat16 else {"gradient_accumulation_fusion": False}
    settings = model_settings(config, layout, dtype, **fused)
    chunks = build_chunks(config, settings)
    Bridge(config, settings).load(chunks, path)
    engine = MegatronEngine(
        chunks, settings, OPTIM, vocabulary=config.vocab_size, learning_rate=RATE, total_steps=STEPS,
        ranks=ranks, context=context_ranks(kind), wrapping=Wrapping(),
    )  # fmt: skip
    rows = train(engine)
    leave_model_parallel()
    return rows


def main() -> None:
    ranks, device = join_ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 600)
    models = ranks.share(make_models(Path(tempfile.mkdtemp())) if ranks.is_main else None)
    for dtype in (torch.float32, torch.bfloat16)[: 1 if "--float32" in sys.argv else 2]:
        expected = {name: train_reference(path, dtype, device) for name, path in models.items()}
        for name, degrees, kind in CASES:
            rows = train_megatron(models[name], dtype, degrees, kind, ranks)
            worst = [
                max(abs(a[i] - b[i]) / abs(b[i]) for a, b in zip(rows, expected[name], strict=True))
                for i in (0, 1)
            ]
            if ranks.is_main:
                what = f"{str(dtype).removeprefix('torch.')} {name} {degrees} {kind}"
                print(f"{what}: loss {worst[0]:.1e}, gradient norm {worst[1]:.1e}", flush=True)
    leave_ranks()


if __name__ == "__main__":
    main()
