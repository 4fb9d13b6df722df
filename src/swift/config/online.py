"""Methods that sample their own answers: how many, how long, and what is learnt from them.

Owns: the knobs, and the arithmetic of prompts, answers and optimizer steps. Not here: what answers are worth
(rewards.py), who gives them (vllm.py).
"""

import math
from dataclasses import dataclass

from swift.config.option import Clash, ConfigError, changed, option, refuse_method

SAMPLES = ("grpo", "ppo")  # methods that learn from rewards of such answers
PPO_TOO = (
    "log_completions", "log_entropy", "overlong_filter", "offload_model", "offload_optimizer",
    "wandb_log_unique_prompts",
)  # fmt: skip
ANSWERS = (*SAMPLES, "gkd")  # all that sample
SHARED = ("max_completion_length", "temperature", "top_p", "top_k", "repetition_penalty")
SCALES = {"true": "group", "false": "none"}  # the spelling of earlier versions


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """One rollout: the answers that are sampled together, and the optimizer steps that learn from them."""

    prompts: int
    generations: int  # answers to each prompt
    parts: int  # optimizer steps that see each answer once
    iterations: int  # times that each answer is seen

    @property
    def answers(self) -> int:
        return self.prompts * self.generations

    @property
    def updates(self) -> int:
        """Optimizer steps of one rollout."""
        return self.parts * self.iterations


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineConfig:
    num_generations: int = option(8, "answers to each prompt, which are compared", min=1)
    num_generations_eval: int | None = option(None, "answers to held-out prompts; none = as many", min=1)
    max_completion_length: int = option(512, "longest answer", unit="tokens", min=1)
    temperature: float = option(0.9, "of sampling; training sees the same distribution", min=0)
    top_p: float = option(1.0, "nucleus of sampling", range=(0, 1))
    top_k: int = option(-1, "most likely tokens that are sampled from; -1 = all")
    repetition_penalty: float = option(1.0, "of sampling; 1 = none", min=0)
    generation_batch_size: int | None = option(
        None, "answers of one rollout on all processes; none = as --steps_per_generation says",
        unit="answers", min=1,
    )  # fmt: skip
    steps_per_generation: int | None = option(
        None, "micro-batches that one rollout fills; none = --gradient_accumulation_steps, so that "
        "every optimizer step has answers of its own", min=1,
    )  # fmt: skip
    num_iterations: int = option(1, "times that each answer is learnt from", min=1)
    epsilon: float = option(0.2, "how far the ratio to the old policy may fall below 1", min=0)
    epsilon_high: float | None = option(None, "how far above 1; none = --epsilon (DAPO: 0.28)", min=0)
    delta: float | None = option(
        None, "upper limit of the ratio where the advantage is negative; none = no limit",
        min=0,
    )  # fmt: skip
    importance_sampling_level: str = option(
        "token",
        "what the ratio is taken of; sequence = GSPO",
        choices=("token", "sequence", "sequence_token"),
    )
    tau_pos: float = option(1.0, "sapo: temperature of the gate for good answers", min=0)
    tau_neg: float = option(1.05, "sapo: temperature of the gate for bad ones", min=0)
    advantage_estimator: str = option(
        "grpo",
        "what an answer is compared with: its group's mean, the others' mean (rloo), or the mean with "
        "the scale of the whole batch (reinforce_plus_plus)",
        choices=("grpo", "rloo", "reinforce_plus_plus"),
    )
    scale_rewards: str = option(
        "group",
        "what advantages are divided by: deviation of the group or of the batch, nothing, or each "
        "reward by its own (gdpo)",
        choices=("group", "batch", "none", "gdpo", *SCALES),
    )
    kl_in_reward: bool = option(False, "take the distance from the reference off the reward")
    dynamic_sample: bool = option(False, "sample again in place of groups whose rewards are all one (DAPO)")
    max_resample_times: int = option(3, "rounds of that", min=1)
    async_generate: bool = option(
        False,
        "servers of vLLM answer for the next rollout while this one is learnt from, with weights that "
        "are one rollout older",
    )
    overlong_filter: bool = option(False, "learn nothing from answers that were cut at their longest")
    top_entropy_quantile: float = option(
        1.0, "share of the tokens that are learnt from, the most uncertain ones", range=(0, 1)
    )
    offload_model: bool = option(False, "keep trained weights on the CPU while vLLM answers beside them")
    offload_optimizer: bool = option(False, "keep optimizer moments on the CPU while answers are sampled")
    log_entropy: bool = option(False, "log how uncertain the model is")
    log_completions: bool = option(
        False, "keep every answer with its rewards in completions.jsonl, and show some to --report_to"
    )
    wandb_log_unique_prompts: bool = option(False, "--log_completions: show trackers one answer a prompt")
    rollout_importance_sampling_mode: str | None = option(
        None,
        "correction where the sampler's probabilities differ from the trainer's; none = logged alone",
        choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )
    rollout_importance_sampling_threshold: float = option(2.0, "largest weight of that correction", min=0)
    off_policy_sequence_mask_delta: float | None = option(
        None, "bad answers further than this from the policy teach nothing; none = all teach",
        min=0,
    )  # fmt: skip

    @property
    def scaling(self) -> str:
        """--scale_rewards by its present name."""
        return SCALES.get(self.scale_rewards, self.scale_rewards)

    def check(self, rlhf_type: str) -> None:
        given = changed(self)
        for name in given:
            methods = ANSWERS if name in SHARED else SAMPLES if name in PPO_TOO else ("grpo",)
            refuse_method(self, (name,), rlhf_type, methods)
        if self.wandb_log_unique_prompts and not self.log_completions:
            raise ConfigError("--wandb_log_unique_prompts has no effect without --log_completions true")
        if self.temperature == 0:
            raise ConfigError(
                "--temperature 0 gives every prompt the same answer again and again",
                hint="1 samples what the model believes",
            )
        if rlhf_type != "grpo":
            return
        if self.num_generations == 1 and self.advantage_estimator != "reinforce_plus_plus":
            raise ConfigError(
                "--num_generations 1 leaves nothing to compare an answer with", hint="8 is usual"
            )
        if self.scaling == "gdpo" and (self.kl_in_reward or self.advantage_estimator != "grpo"):
            clash = "--kl_in_reward true" if self.kl_in_reward else "another --advantage_estimator than grpo"
            raise ConfigError(
                f"--scale_rewards gdpo does not go with {clash}: it sees each reward by itself",
                hint="--scale_rewards group",
            )
        if self.generation_batch_size and self.steps_per_generation:
            raise Clash("--generation_batch_size and --steps_per_generation say the same thing twice")
        if "max_resample_times" in given and not self.dynamic_sample:
            raise ConfigError("--max_resample_times has no effect without --dynamic_sample true")
        if self.top_entropy_quantile == 0:
            raise ConfigError("--top_entropy_quantile 0 leaves no token to learn from", hint="0.2 is usual")

    def plan(self, micro_batch_size: int, accumulation: int, data_world: int) -> RolloutPlan:
        """What one rollout is. Raises ConfigError where the numbers do not go together."""
        micro = micro_batch_size * data_world
        where = f"--per_device_train_batch_size {micro_batch_size} x {data_world} process(es)"
        if self.generation_batch_size:
            steps, rest = divmod(self.generation_batch_size, micro)
            if rest:
                raise ConfigError(
                    f"--generation_batch_size {self.generation_batch_size} is not a multiple of {where}",
                    hint=f"for example {micro * max(steps, 1)}",
                )
        else:
            steps = self.steps_per_generation or accumulation
        if steps % accumulation:
            raise ConfigError(
                f"--steps_per_generation {steps} is not a multiple of --gradient_accumulation_steps "
                f"{accumulation}",
                hint=f"for example {accumulation * math.ceil(steps / accumulation)}",
            )
        answers = micro * steps
        prompts, rest = divmod(answers, self.num_generations)
        if rest:
            near = math.lcm(micro, self.num_generations) // micro
            raise ConfigError(
                f"a rollout has {answers} answers ({where} x {steps} micro-batches), which is not a multiple "
                f"of --num_generations {self.num_generations}",
                hint=f"for example --gradient_accumulation_steps {near * max(steps // near, 1)}",
            )
        return RolloutPlan(prompts, self.num_generations, steps // accumulation, self.num_iterations)
