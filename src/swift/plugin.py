"""The old import path of what plugins add to: rewards, loss scales, callbacks, optimizers."""

from swift.plugins.callbacks import Callback, Save, Stop, callbacks_map, extra_callbacks
from swift.plugins.hooks import (
    ORM,
    AsyncORM,
    LossScale,
    loss_scale_map,
    optimizers_map,
    orms,
    rm_plugins,
)
from swift.plugins.turns import Env, MultiTurnScheduler, envs, multi_turns

__all__ = [
    "ORM",
    "AsyncORM",
    "Callback",
    "Env",
    "LossScale",
    "MultiTurnScheduler",
    "Save",
    "Stop",
    "callbacks_map",
    "envs",
    "extra_callbacks",
    "loss_scale_map",
    "multi_turns",
    "optimizers_map",
    "orms",
    "rm_plugins",
]
