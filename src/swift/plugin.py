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

__all__ = [
    "ORM",
    "AsyncORM",
    "Callback",
    "LossScale",
    "Save",
    "Stop",
    "callbacks_map",
    "extra_callbacks",
    "loss_scale_map",
    "optimizers_map",
    "orms",
    "rm_plugins",
]
