"""Runs inside vLLM's workers, in its processes: new weights for the loaded model.

vLLM mixes this class into its own worker (`worker_extension_cls`), which has `reload_weights`: the one way to
new weights that it promises to keep. Not here: who sends them (vllm_local.py, vllm_client.py).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

from swift.rollout.weight_port import drop, fetch


class WeightReceiver:
    """Methods that `collective_rpc` calls by name."""

    model_runner: Any
    reload_weights: Any

    def receive(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over full tensors under HuggingFace's names; only within one process."""
        self.reload_weights(weights_iterator=weights)
        # On a CPU a tied output layer computes with a packed copy of its own, which the reload does not see
        # (vLLM 0.32). Without this the logits are silently those of the old embedding.
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if current_platform.is_cpu() and hasattr(head, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)

    def receive_files(self, *paths: str) -> None:
        """The same from safetensors files, one tensor at a time."""
        self.receive(read_tensors(paths))

    def receive_urls(self, *urls: str) -> None:
        """The same from files of another host."""
        self.receive(read_tensors(map(str, fetch(urls))))

    def drop_urls(self, *urls: str) -> None:
        """Deletes what was fetched, after every worker has read it."""
        drop(urls)

    def can_read(self, path: str) -> bool:
        """Whether a file of the training's host is one of this host too."""
        return Path(path).is_file()

    def can_fetch(self, url: str) -> bool | str:
        """Whether files of the training's host can be had from there; else why not."""
        try:
            return all(path.is_file() for path in fetch([url]))
        except OSError as error:
            return str(error)
        finally:
            drop([url])


def read_tensors(paths: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files by name."""
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it has no iterator
                yield name, file.get_tensor(name)
