"""Whoever answers while a model is trained: the model itself, a copy of it, or vLLM."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from swift.config.runs import RlhfRun
from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks, join_peers
from swift.engines.transformers.forward import check_answering
from swift.models.directory import read_json
from swift.rollout.local import LocalRollout
from swift.rollout.protocol import RolloutEngine
from swift.rollout.replica import ReplicaRollout, SharedRollout
from swift.rollout.vllm import check_vllm, start_rollout
from swift.train.preparing import Prepared

MOST_ROWS = 1024  # answers computed together, where there is memory for their keys and values


def start_answers(run: RlhfRun, ready: Prepared, engine: Engine, ranks: Ranks, context: int) -> RolloutEngine:
    """Called by all ranks. `context`: tokens of prompt and answer."""
    stops, tokenizer = find_stops(ready), ready.tokenizer
    terms = {"context": context, "max_rows": MOST_ROWS, "stop_token_ids": stops}
    if run.answers_itself:
        return LocalRollout(engine, tokenizer, **terms)
    rollout: RolloutEngine
    if run.vllm.use_vllm:
        rollout = start_rollout(
            run.vllm, ready.model_path, dtype=engine.dtype, tokenizer=tokenizer,
            stop_token_ids=stops, ranks=ranks, seed=run.schedule.seed,
        )  # fmt: skip
    else:
        rollout = ReplicaRollout(
            ready.model_config, tokenizer, dtype=engine.dtype, device=engine.device, **terms
        )
    return rollout if ranks.data_world == ranks.world else SharedRollout(rollout, join_peers(ranks))


def check_answers(run: RlhfRun, ready: Prepared) -> None:
    """Raises ConfigError where nobody can answer; needs no weights."""
    if run.vllm.use_vllm:
        check_vllm("--use_vllm true")
        return
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(ready.model_config), None)
    check_answering(architecture, ready.model_config)


def find_stops(ready: Prepared) -> list[int]:
    """Tokens that end an answer: the template's, the tokenizer's and those of generation_config.json."""
    path = ready.model_path / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({*ready.template.stop_token_ids, *listed, ready.tokenizer.eos_token_id} - {None})
