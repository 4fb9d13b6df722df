"""The stage of methods that sample their own answers: prompts, rewards, whoever answers."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from swift.config.online import RolloutPlan
from swift.config.option import ConfigError, flatten
from swift.config.runs import RlhfRun
from swift.data.loader import StepPlan
from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks
from swift.models.directory import read_json
from swift.models.load import context_length
from swift.rewards.panel import Panel
from swift.rollout.local import LocalRollout
from swift.rollout.multi_turn import build_scheduler
from swift.rollout.protocol import RolloutEngine
from swift.rollout.vllm import check_vllm, start_rollout
from swift.template.chat import ChatTemplate
from swift.train.answers import RolloutEvaluation, Sampler
from swift.train.completions import keep_completions
from swift.train.conversations import Conversations, plan_context
from swift.train.online import RolloutFeed
from swift.train.preparing import Prepared
from swift.train.resume import Resumption
from swift.train.reward_models import find_reward_models, load_reward_models
from swift.train.stage import Opened
from swift.utils.log import say

ROWS_ON_CPU = 256
SHARE_OF_FREE = 0.7  # of the memory that the weights have left
HEAD = 100  # rows whose columns are looked at before the weights load


class OnlineStage:
    """Prompts, and the panel that judges what is answered."""

    def __init__(self, run: RlhfRun, ready: Prepared, ranks: Ranks, resumption: Resumption | None) -> None:
        if ready.stream is not None:
            raise ConfigError(f"--streaming true does not go with --rlhf_type {run.rlhf.rlhf_type} yet")
        if run.vllm.use_vllm:
            check_vllm("--use_vllm true")
        self.run, self.ready, self.ranks = run, ready, ranks
        self.accumulation = run.schedule.gradient_accumulation_steps or 1
        size = run.schedule.per_device_train_batch_size
        self.plan = self._plan(size, resumption)
        self.order = StepPlan(
            len(ready.rows), self.plan.prompts, 1, seed=run.data_seed,
            shuffle=run.data.train_dataloader_shuffle, drop_last=run.schedule.dataloader_drop_last,
        )  # fmt: skip
        if not self.order.steps_per_epoch:
            raise ConfigError(
                f"--dataloader_drop_last true leaves nothing: {len(ready.rows)} prompts, and a rollout takes "
                f"{self.plan.prompts}",
                hint="leave it out, or lower --gradient_accumulation_steps",
            )
        self.panel = Panel.build(
            run.rewards,
            settings={**flatten(run), "tokenizer": ready.tokenizer},
            has_environment=run.turns.use_gym_env,
        )
        self.reward_models = find_reward_models(run.rewards, run.model)
        self.turns = self._build_turns() if run.turns.scheduler else None
        first = (ready.rows.samples[i] for i in range(min(HEAD, len(ready.rows))))
        self.panel.check_columns({name for sample in first for name in sample.extra})
        self.held = (resumption.state.position or {}).get("answers") if resumption else None

    def _plan(self, size: int, resumption: Resumption | None) -> RolloutPlan:
        """The flags' arithmetic; a resumed run keeps its rollouts, however many processes it has now."""
        world, config = self.ranks.data_world, self.run.online
        if not resumption:
            return config.plan(size, self.accumulation, world)
        plan = RolloutPlan(
            **{name: resumption.data[name] for name in ("prompts", "generations", "parts", "iterations")}
        )
        self.accumulation = math.ceil(plan.answers / plan.parts / size / world)
        return plan

    def identity(self) -> dict[str, Any]:
        rows, plan = self.ready.rows, self.plan
        numbers = {name: getattr(plan, name) for name in ("prompts", "generations", "parts", "iterations")}
        return {"rows": len(rows), **numbers, "fingerprint": rows.fingerprint}

    def total_steps(self, epochs: float, max_steps: int) -> int:
        return max_steps if max_steps > 0 else self.order.total_steps(epochs, -1) * self.plan.updates

    def tell(self, total_steps: int, *, flat: bool) -> None:  # noqa: ARG002 - part of the protocol
        plan, size = self.plan, self.run.schedule.per_device_train_batch_size
        rollouts = math.ceil(total_steps / plan.updates)
        say(
            f"rollouts: {plan.prompts} prompts x {plan.generations} answers = {plan.answers} answers "
            f"({size} x {plan.answers // size // self.ranks.data_world} micro-batches x "
            f"{self.ranks.data_world} process(es)), {plan.updates} optimizer step(s) each"
        )
        say(
            f"steps: {self.order.steps_per_epoch} rollouts an epoch of {len(self.ready.rows):,} prompts, "
            f"{rollouts} rollouts and {total_steps} optimizer steps in all"
        )

    def _build_turns(self) -> Conversations:
        run, ready = self.run, self.ready
        limits = [context_length(ready.model_config), run.vllm.vllm_max_model_len]
        context = plan_context(
            longest_prompt(ready),
            answer=run.online.max_completion_length,
            turns=run.turns.max_turns,
            limit=min(filter(None, limits), default=None),
        )
        assert run.turns.scheduler is not None
        return Conversations(
            build_scheduler(run.turns, tokenizer=ready.tokenizer), run.turns.scheduler,
            ChatTemplate(ready.tokenizer, run.template), context, run.rewards.reward_timeout,
        )  # fmt: skip

    def open(self, engine: Engine, directory: Path) -> Opened:
        run, ready, config = self.run, self.ready, self.run.online
        rollout = self._start(engine)
        self.panel.add_models(load_reward_models(self.reward_models, run.model, engine.device))
        parts = {
            "engine": engine, "rollout": rollout, "panel": self.panel, "config": config,
            "seed": run.schedule.seed, "ranks": self.ranks, "prefix": run.template.response_prefix or "",
            "turns": self.turns,
        }  # fmt: skip
        feed = RolloutFeed(
            Sampler(rows=ready.rows, **parts),
            self.order,
            self.plan,
            micro_batch_size=run.schedule.per_device_train_batch_size,
            beta=run.rlhf.beta_value,
            held=self.held,
            keep=partial(keep_completions, directory) if config.log_completions else None,
        )
        evaluation = None
        if ready.eval_rows is not None and run.eval_limit != 0:
            generations = config.num_generations_eval or config.num_generations
            evaluation = RolloutEvaluation(
                Sampler(rows=ready.eval_rows, **parts), generations, run.eval_limit
            )
        return Opened(feed, evaluation, feed.observe)

    def _start(self, engine: Engine) -> RolloutEngine:
        """Whoever answers: the trained model itself, or vLLM."""
        ready, run, longest = self.ready, self.run, self.run.online.max_completion_length
        stops = find_stops(run, ready)
        if run.vllm.use_vllm:
            return start_rollout(
                run.vllm, ready.model_path, dtype=engine.dtype, stop_token_ids=stops, ranks=self.ranks,
                seed=run.schedule.seed,
            )  # fmt: skip
        context = self.turns.context if self.turns else longest_prompt(ready) + longest
        return LocalRollout(
            engine, ready.tokenizer, context=context, max_rows=count_rows(engine, ready, context),
            stop_token_ids=stops,
        )  # fmt: skip


def longest_prompt(ready: Prepared) -> int:
    """Tokens of the longest one, held-out prompts included."""
    return max(int(one.lengths.max()) for one in (ready.rows, ready.eval_rows) if one is not None)


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
