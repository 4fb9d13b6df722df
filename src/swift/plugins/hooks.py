"""The places where a plugin can add something, and the classes that it may start from.

Importing this costs nothing: no torch, no template. Data sets are added in data/datasets.py.
"""

from typing import Any

from swift.plugins.registry import Registry


class ORM:
    """A reward: one number a completion. Columns of the row come as keyword arguments, a list each.

    None in the list = this reward does not judge that row.
    """

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        raise NotImplementedError


class AsyncORM(ORM):
    """A reward that waits for something, such as a server; all completions of a batch are judged at once."""

    async def __call__(  # type: ignore[override]
        self, completions: list[str], **columns: Any
    ) -> list[float | None]:
        raise NotImplementedError


class LossScale:
    """Weights of the parts of an answer, for --loss_scale. Instances go to worker processes by pickling."""

    def get_loss_scale(self, context: str, query: str) -> tuple[list[str], list[float]]:
        """The answer `context`, cut into parts that together are the answer, and the weight of each.

        `query` is the user's message before it. What ends a turn is not part of an answer.
        """
        raise NotImplementedError


orms: Registry[Any] = Registry(  # classes, instances or functions
    "reward",
    {
        "accuracy": "swift.rewards.accuracy:MathAccuracy",
        "format": "swift.rewards.builtin:Format",
        "react_format": "swift.rewards.builtin:ReActFormat",
        "cosine": "swift.rewards.accuracy:CosineReward",
        "repetition": "swift.rewards.builtin:RepetitionPenalty",
        "soft_overlong": "swift.rewards.builtin:SoftOverlong",
        "toolbench": "swift.rewards.builtin:ToolCall",
        "math": "swift.rewards.accuracy:MathSection",
    },
)
rm_plugins: Registry[Any] = Registry("reward model plugin", {"genrm": "swift.train.judge:Judge"})
loss_scale_map: Registry[type[LossScale] | LossScale] = Registry("loss scale")
# Functions (settings, model, None) -> (optimizer, schedule or None), for --optimizer. `settings` has every
# flag of the optimizer's group as an attribute, such as `learning_rate`.
optimizers_map: Registry[Any] = Registry("optimizer")
