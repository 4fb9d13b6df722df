"""Whoever answers while a model is trained: the model itself, or vLLM."""

import torch

from swift.config.runs import RlhfRun
from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks
from swift.models.directory import read_json
from swift.rollout.local import LocalRollout
from swift.rollout.protocol import RolloutEngine
from swift.rollout.vllm import start_rollout
from swift.template.chat import ChatTemplate
from swift.train.preparing import Prepared

ROWS_ON_CPU = 256
SHARE_OF_FREE = 0.7  # of the memory that the weights have left


def start_answers(run: RlhfRun, ready: Prepared, engine: Engine, ranks: Ranks, context: int) -> RolloutEngine:
    """Called by all ranks. `context`: tokens of prompt and answer."""
    stops = find_stops(run, ready)
    if run.vllm.use_vllm:
        return start_rollout(
            run.vllm, ready.model_path, dtype=engine.dtype, stop_token_ids=stops, ranks=ranks,
            seed=run.schedule.seed,
        )  # fmt: skip
    rows = count_rows(engine, ready, context)
    return LocalRollout(engine, ready.tokenizer, context=context, max_rows=rows, stop_token_ids=stops)


def find_stops(run: RlhfRun, ready: Prepared) -> list[int]:
    """Tokens that end an answer: the template's, the tokenizer's and those of generation_config.json."""
    template = ChatTemplate(ready.tokenizer, run.template)
    path = ready.model_path / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({*template.stop_token_ids, *listed, ready.tokenizer.eos_token_id} - {None})


def count_rows(engine: Engine, ready: Prepared, context: int) -> int:
    """Answers computed together: what keys and values of that many tokens leave room for on a GPU."""
    if engine.device.type != "cuda":
        return ROWS_ON_CPU
    config = ready.model_config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * width * engine.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(engine.device)
    return max(int(SHARE_OF_FREE * free / per_token / context), 1)
