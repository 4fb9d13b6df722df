"""The import path of rewards in newer plugins; the same objects as in swift.plugin."""

from swift.plugins.hooks import ORM, AsyncORM, orms, rm_plugins
from swift.rewards.arithmetic import evaluate_arithmetic

__all__ = ["ORM", "AsyncORM", "evaluate_arithmetic", "orms", "rm_plugins"]
