"""Answers from a copy of the model in training, where an engine cannot lend the model itself.

Every process holds the whole copy, in the dtype of the engine, while it answers: between two rollouts its
memory is free. Ranks that train the same rows answer a share of them each.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from swift.engines.attention import FLAT_ATTENTION
from swift.engines.ranks import Peers
from swift.rollout.cache import spare_bytes
from swift.rollout.decoder import Decoder
from swift.rollout.protocol import RolloutEngine
from swift.rollout.types import Completion, Request
from swift.utils.log import say

EXPERT = re.compile(r"\.experts\.(\d+)\.")


class ReplicaRollout:
    """Implements `swift.rollout.protocol.RolloutEngine` with a model that weights are copied into."""

    def __init__(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        device: torch.device,
        stop_token_ids: Sequence[int],
        context: int,
        max_rows: int,
    ) -> None:
        """`context`: tokens of prompt and answer. `max_rows`: answers that each rank computes together."""
        self.tokenizer = tokenizer
        self.stop_token_ids, self.context, self.max_rows = tuple(stop_token_ids), context, max_rows
        self.version = 0
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=FLAT_ATTENTION)
        self.model: PreTrainedModel = model.requires_grad_(False).eval()
        keep_wide(self.model)
        self.places = Places(self.model)
        self.storages = [p.untyped_storage() for p in self.model.parameters()]
        self.sizes = [storage.nbytes() for storage in self.storages]
        self.whole = sum({t.data_ptr(): t.nbytes for t in self.places.tensors.values()}.values())
        say(
            f"answers: by a copy of the model that every process has for them, {sum(self.sizes) / 2**30:.2f} "
            "GiB while it answers; --use_vllm true answers faster, and with models that do not fit twice"
        )
        self.sleep()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """As the protocol says, after weights have come; a rank waits for nobody."""
        decoder = Decoder(
            self.model, self.tokenizer, stop_token_ids=self.stop_token_ids, context=self.context,
            max_rows=self.max_rows, version=self.version, memory_bytes=spare_bytes(self.model.device),
        )  # fmt: skip
        return decoder.generate(requests)

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        filled = 0
        for name, tensor in weights:
            place = self.places.find(name)
            place.copy_(tensor)
            filled += place.nbytes
        assert filled == self.whole, f"{filled} bytes of {self.whole} have come"
        self.version = version

    def sleep(self) -> None:
        """The next weights come whole, so these are let go."""
        for storage in self.storages:
            storage.resize_(0)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        for storage, size in zip(self.storages, self.sizes, strict=True):
            storage.resize_(size)

    def close(self) -> None:
        """There is nothing to end."""


def keep_wide(model: PreTrainedModel) -> None:
    """Buffers that a model wants in float32, as when it is loaded: biases of experts."""
    wide = model._keep_in_fp32_modules_strict or ()
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in wide:
            buffer.data = buffer.data.float()


class Places:
    """Where tensors of published files lie in a model of transformers, which stacks experts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tensors: dict[str, Tensor] = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def find(self, name: str) -> Tensor:
        """A view into the weight that the tensor called `name` in files is, or is a part of."""
        if name in self.tensors:
            return self.tensors[name]
        renamed, pattern = rename_source_key(name, self.renamings, self.converters)
        if pattern is None:
            return self.tensors[renamed]
        # A stack over experts of what the converter names, joined along the outputs.
        parts = next(c.source_patterns for c in self.converters if pattern in c.source_patterns)
        expert = EXPERT.search(name)
        assert expert is not None, f"{name} is no expert's"
        stacked = self.tensors[renamed][int(expert[1])]
        return stacked.chunk(len(parts))[parts.index(pattern)]


class SharedRollout:
    """`rollout` for ranks of which several train the same rows: each answers a share, and all get all."""

    def __init__(self, rollout: RolloutEngine, peers: Peers) -> None:
        self.rollout, self.peers = rollout, peers
        self.update_weights, self.close = rollout.update_weights, rollout.close
        self.sleep, self.wake = rollout.sleep, rollout.wake

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The same on all peers, whoever has answered."""
        mine = share_requests(requests, self.peers.count)[self.peers.place]
        found = list(chain.from_iterable(self.rollout.generate(mine)))
        answers = chain.from_iterable(self.peers.collect(found))
        return [[next(answers) for _ in range(request.count)] for request in requests]


def share_requests(requests: Sequence[Request], shares: int) -> list[list[Request]]:
    """Shares of as many answers, in order; the answers to one request may fall into several."""
    total = sum(request.count for request in requests)
    bounds = [total * i // shares for i in range(shares + 1)]
    found: list[list[Request]] = []
    for low, high in pairwise(bounds):
        mine, start = [], 0
        for request in requests:
            first, last = max(low - start, 0), min(high - start, request.count)
            if first < last:
                mine.append(replace(request, first=request.first + first, count=last - first))
            start += request.count
        found.append(mine)
    return found
