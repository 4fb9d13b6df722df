"""A reward as users write them: right is an answer whose last number is the sum, better one that ends there.

swift rlhf --rlhf_type grpo --external_plugins examples/sums/reward.py --reward_funcs sums ...
"""

import re
from typing import Any

from swift.rewards import ORM, orms


class Sums(ORM):
    """1 for the right number in an answer that ended by itself, 0.5 where it ran on, 0 otherwise."""

    def __call__(self, completions: list[str], solution: list[str], **columns: Any) -> list[float]:
        rewards = []
        for text, right, reason in zip(completions, solution, columns["finish_reason"], strict=True):
            numbers = re.findall(r"\d+", text)
            if not numbers or numbers[-1] != right:
                rewards.append(0.0)
            else:
                rewards.append(1.0 if reason == "stop" else 0.5)
        return rewards


orms["sums"] = Sums
