"""The import path of rewards in newer plugins; the same objects as in swift.plugin."""

from swift.plugins.hooks import ORM, AsyncORM, orms, rm_plugins

__all__ = ["ORM", "AsyncORM", "orms", "rm_plugins"]
