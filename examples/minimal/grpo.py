"""Group relative policy optimisation (arXiv:2402.03300), with nothing around it.

    python examples/minimal/grpo.py [--model DIR] [--dataset FILE] [--steps N] [--rows N]

Again the loop of sft.py, but the rows of a step are written by the model itself:

    prompts -> several answers each (the decoder, with the model that is trained)
            -> a reward for every answer (any function of texts)
            -> advantages: better or worse than the other answers to the same prompt
            -> a Batch whose trained tokens are the answers'.

The answers are drawn from the model as it is, so the first and only pass over them is on-policy: the ratio of
the objective is 1 and no log-probabilities have to be kept. `make demo-rl` is the same with adapters.
"""

import re

import numpy as np
import torch
from parts import Parts, build, draw, read_arguments

from swift.batch import IGNORED, Batch
from swift.data.collate import collate
from swift.objectives.advantages import compute_advantages
from swift.objectives.policy import Policy, PolicyRule
from swift.rollout.decoder import Decoder
from swift.rollout.types import Completion, Request, Sampling
from swift.template.tokenize import Encoded

GENERATIONS = 8  # answers to each prompt
MAX_TOKENS = 12


def reward(answer: Completion, solution: str) -> float:
    """1 for the right number in an answer that ended by itself, half where it ran on."""
    numbers = re.findall(r"\d+", answer.text)
    if not numbers or numbers[-1] != solution:
        return 0.0
    return 1.0 if answer.finish_reason == "stop" else 0.5


def sample(parts: Parts, requests: list[Request]) -> list[list[Completion]]:
    stops = [*parts.template.stop_token_ids, parts.tokenizer.eos_token_id]
    with parts.engine.generating() as model:
        decoder = Decoder(
            model, parts.tokenizer, stop_token_ids=stops, context=512 + MAX_TOKENS,
            max_rows=len(requests) * GENERATIONS,
        )  # fmt: skip
        return decoder.generate(requests)


def to_batch(prompts: list[list[int]], answers: list[Completion], advantages: torch.Tensor) -> Batch:
    """One segment an answer; only its own tokens are trained, each with the answer's advantage."""
    sequences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = np.array(prompt + answer.token_ids, dtype=np.int64)
        labels = np.where(np.arange(len(ids)) < len(prompt), IGNORED, ids)
        sequences.append(Encoded(ids, labels, None))
    batch = collate(sequences)
    batch.token["advantages"] = advantages.float()[batch.segment_ids]
    return batch


def main() -> None:
    arguments = read_arguments("GRPO", dataset="examples/sums/sums.jsonl", steps=10, rows=4)
    parts = build(arguments, shape="prompt", learning_rate=5e-6)
    objective = Policy(PolicyRule(beta=0.0, max_completion_length=MAX_TOKENS))
    for step in range(arguments.steps):
        chosen = draw(step, arguments.rows, len(parts.rows))
        requests = [
            Request(parts.rows[i].input_ids.tolist(), Sampling(MAX_TOKENS, seed=step), GENERATIONS)
            for i in chosen
        ]
        groups = sample(parts, requests)
        solutions = [parts.rows.samples[i].extra["solution"] for i in chosen]
        rewards = [
            [reward(answer, s) for answer in group] for group, s in zip(groups, solutions, strict=True)
        ]
        found = compute_advantages(
            torch.tensor(rewards).reshape(-1, 1),
            torch.arange(len(chosen)).repeat_interleave(GENERATIONS),
            weights=torch.ones(1),
        )
        prompts = [request.token_ids for request in requests for _ in range(GENERATIONS)]
        answers = [answer for group in groups for answer in group]
        parts.engine.forward_backward([to_batch(prompts, answers, found.advantages)], objective)
        info = parts.engine.optim_step()
        print(
            f"step {step + 1}: reward {float(found.rewards.mean()):.3f}, grad_norm {info.grad_norm:.3f}, "
            f"equal rewards in {found.frac_reward_zero_std:.0%} of groups; one answer: {answers[0].text!r}"
        )


if __name__ == "__main__":
    main()
