"""The stage of methods that sample their own answers: prompts, rewards, whoever answers."""

import math
from dataclasses import asdict, fields, replace
from typing import Any

from swift.config.online import RolloutPlan
from swift.config.option import ConfigError, flatten
from swift.config.runs import RlhfRun
from swift.data.loader import StepPlan
from swift.engines.protocol import Engine
from swift.engines.ranks import Ranks
from swift.models.load import context_length
from swift.rewards.panel import Panel
from swift.rollout.multi_turn import Turns, build_scheduler
from swift.train.actor_critic import ActorCritic, Foresight
from swift.train.ahead import Ahead
from swift.train.answers import RolloutEvaluation, Sampler
from swift.train.online import RolloutFeed
from swift.train.preparing import Prepared
from swift.train.reward_models import find_reward_models, load_reward_models
from swift.train.rollouts import check_answers, start_answers
from swift.train.stage import Opened
from swift.utils.log import say, warn

TURNS = 8  # answers of full length that a conversation has room for
HEAD = 100  # rows whose columns are looked at before the weights load


class OnlineStage:
    """Prompts, and the panel that judges what is answered."""

    def __init__(self, ready: Prepared, ranks: Ranks) -> None:
        run = ready.run
        assert isinstance(run, RlhfRun)
        if ready.stream is not None:
            raise ConfigError(f"--streaming true does not go with --rlhf_type {run.rlhf.rlhf_type} yet")
        check_answers(run, ready)
        if run.online.offload_model and run.answers_itself:
            say("--offload_model true has no effect: the weights in training give the answers themselves")
        if run.parallel.zero and (run.online.offload_model or run.online.offload_optimizer):
            warn("--deepspeed keeps weights and moments where they are: --offload_* moves nothing")
            run = replace(run, online=replace(run.online, offload_model=False, offload_optimizer=False))
        self.run, self.ready, self.ranks = run, ready, ranks
        self.accumulation = run.schedule.gradient_accumulation_steps or 1
        size = run.schedule.per_device_train_batch_size
        self.plan = self._plan(size)
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
        most, epochs = run.schedule.max_steps, run.schedule.num_train_epochs
        self.total_steps = most if most > 0 else self.order.total_steps(epochs, -1) * self.plan.updates
        settings = {**flatten(run), "tokenizer": ready.tokenizer}
        self.panel = Panel.build(run.rewards, settings=settings, has_environment=run.turns.use_gym_env)
        self.judges = find_reward_models(run.rewards, run.model)
        self.turns = self._plan_turns() if run.turns.scheduler else None
        first = (ready.rows.samples[i] for i in range(min(HEAD, len(ready.rows))))
        self.panel.check_columns({name for sample in first for name in sample.extra})
        self.position = (ready.resumption.state.position or {}) if ready.resumption else {}

    def _plan(self, size: int) -> RolloutPlan:
        """The flags' arithmetic; a resumed run keeps its rollouts, however many processes it has now."""
        world, resumption = self.ranks.data_world, self.ready.resumption
        if not resumption and self.run.rlhf.rlhf_type == "ppo":
            ppo = self.run.ppo
            if self.accumulation % ppo.num_mini_batches:
                raise ConfigError(
                    f"--num_mini_batches {ppo.num_mini_batches} does not divide "
                    f"--gradient_accumulation_steps {self.accumulation}",
                    hint=f"for example --gradient_accumulation_steps {ppo.num_mini_batches}",
                )
            answers = size * self.accumulation * world
            self.accumulation //= ppo.num_mini_batches
            return RolloutPlan(answers, 1, ppo.num_mini_batches, ppo.num_ppo_epochs)
        if not resumption:
            return self.run.online.plan(size, self.accumulation, world)
        plan = RolloutPlan(**{field.name: resumption.data[field.name] for field in fields(RolloutPlan)})
        self.accumulation = math.ceil(plan.answers / plan.parts / size / world)
        return plan

    def identity(self) -> dict[str, Any]:
        rows = self.ready.rows
        return {"rows": len(rows), **asdict(self.plan), "fingerprint": rows.fingerprint}

    def tell(self, *, flat: bool) -> None:  # noqa: ARG002 - as other stages
        plan, size = self.plan, self.run.schedule.per_device_train_batch_size
        rollouts = math.ceil(self.total_steps / plan.updates)
        say(
            f"rollouts: {plan.prompts} prompts x {plan.generations} answers = {plan.answers} answers "
            f"({size} x {plan.answers // size // self.ranks.data_world} micro-batches x "
            f"{self.ranks.data_world} process(es)), {plan.updates} optimizer step(s) each"
        )
        say(
            f"steps: {self.order.steps_per_epoch} rollouts an epoch of {len(self.ready.rows):,} prompts, "
            f"{rollouts} rollouts and {self.total_steps} optimizer steps in all"
        )

    def open(self, engine: Engine) -> Opened:
        run, ready, config = self.run, self.ready, self.run.online
        self.panel.add_models(load_reward_models(self.judges, run.model, engine.device))
        context = self.turns.context if self.turns else self._longest_prompt() + config.max_completion_length
        rollout = start_answers(run, ready, engine, self.ranks, context)
        sampler = Sampler(
            engine, rollout, self.panel, ready.rows, config, run.schedule.seed,
            run.template.response_prefix or "", self.turns, self.ranks,
        )  # fmt: skip
        ahead = self._answer_ahead(sampler) if config.async_generate else None
        feed = RolloutFeed(
            sampler,
            self.order,
            self.plan,
            micro_batch_size=run.schedule.per_device_train_batch_size,
            beta=1.0 if isinstance(engine, ActorCritic) else run.rlhf.beta_value,
            foresee=Foresight(engine, run.ppo) if isinstance(engine, ActorCritic) else None,
            held=self.position.get("answers"),
            ahead=ahead,
        )
        evaluation = None
        if ready.eval_rows is not None and run.eval_limit != 0:
            generations = config.num_generations_eval or self.plan.generations
            held_out, wait = replace(sampler, rows=ready.eval_rows), ahead.wait if ahead else lambda: None
            evaluation = RolloutEvaluation(held_out, generations, run.eval_limit, wait)
        return Opened(feed, evaluation, feed.observe, feed.take_answers)

    def _answer_ahead(self, sampler: Sampler) -> Ahead:
        return Ahead(
            lambda number: sampler.answer(self.order.step_rows(number), self.plan.generations, number),
            math.ceil(self.total_steps / self.plan.updates),
            self.position.get("ahead"),
        )

    def _longest_prompt(self) -> int:
        both = [rows for rows in (self.ready.rows, self.ready.eval_rows) if rows is not None]
        return max(int(rows.lengths.max()) for rows in both)

    def _plan_turns(self) -> Turns:
        """A conversation has as much of the model's context as its turns may need."""
        run, ready = self.run, self.ready
        scheduler = build_scheduler(run.turns, tokenizer=ready.tokenizer)
        wanted = self._longest_prompt() + TURNS * run.online.max_completion_length
        limits = (context_length(ready.model_config), run.vllm.vllm_max_model_len, wanted)
        return Turns(
            scheduler, str(run.turns.scheduler), ready.template,
            min(filter(None, limits)), run.rewards.reward_timeout,
            run.turns.completion_length_limit_scope == "total",
        )  # fmt: skip
