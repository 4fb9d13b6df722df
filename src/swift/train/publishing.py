"""--push_to_hub in a training: checkpoints go to a hub beside it, and a hub that fails never ends it.

Not here: what is sent of a checkpoint, and how (models/push.py).
"""

from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from swift.config.publish import CheckpointPublishing
from swift.models.push import Destination, push
from swift.plugins.callbacks import Callback, EndEvent, SaveEvent
from swift.utils.log import say, warn


class Publisher(Callback):
    """Uploads checkpoints one by one, in a thread. What could not be sent is tried again at the end."""

    def __init__(self, asked: CheckpointPublishing, where: Destination, run_args: dict[str, Any]) -> None:
        self.asked, self.where, self.run_args = asked, where, run_args
        self.waiting: list[Path] = []  # the newest last
        self.failed: Path | None = None
        self.thread: Thread | None = None

    def on_save(self, event: SaveEvent) -> None:
        """Begins to upload, or goes on after what is on its way."""
        self.waiting = [*(self.waiting if self.asked.hub_always_push else ()), event.path]
        if self.asked.hub_strategy == "every_save" and not (self.thread and self.thread.is_alive()):
            self.thread = Thread(target=self._upload, name="push", daemon=True)
            self.thread.start()

    def on_end(self, event: EndEvent) -> None:
        """Waits for the uploads of a run that was finished; one that was stopped leaves them."""
        if not event.finished:
            if self.waiting or (self.thread and self.thread.is_alive()):
                warn("not everything was uploaded; swift export --push_to_hub true sends a checkpoint")
            return
        if self.thread:
            say(f"waiting for the upload to {self.where.hub}")
            self.thread.join()
        self.waiting = self.waiting or ([self.failed] if self.failed else [])
        self._upload()
        if self.failed:
            warn(
                f"{self.failed.name} is not on {self.where.hub}; again: swift export --push_to_hub true "
                f"--hub_model_id {self.where.name} --adapters or --model {self.failed}"
            )

    def _upload(self) -> None:
        while self.waiting:
            path = self.waiting.pop(0)
            try:
                push(path, replace(self.where, message=path.name), self.run_args)
                self.failed = None
            except Exception as error:  # a hub, a network or a disk that is not there for a while
                self.failed = path
                warn(f"{path.name} was not uploaded: {error}")
