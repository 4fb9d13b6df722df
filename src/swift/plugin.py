"""The old import path of what plugins add to: rewards, loss scales, optimizers. New code may use it too."""

from swift.plugins.hooks import (
    ORM,
    AsyncORM,
    LossScale,
    loss_scale_map,
    optimizers_map,
    orms,
    rm_plugins,
)

__all__ = ["ORM", "AsyncORM", "LossScale", "loss_scale_map", "optimizers_map", "orms", "rm_plugins"]
