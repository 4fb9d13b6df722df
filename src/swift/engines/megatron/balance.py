"""Losses of routers: that experts share the tokens evenly, and that logits stay small.

megatron-core's own take a micro-batch for one sequence, and shrink with the number of tensor and context
ranks where losses count tokens. Here the balance is that of the transformers engine (objectives/router.py),
segment by segment, but for each layer by itself: layers on other pipeline stages are unknown.
Shapes: n = tokens of this tensor rank, t = those of its context rank, S = segments, E = experts.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from swift.engines.megatron.deepseek import choose_experts
from swift.engines.megatron.layers import FlatTokens
from swift.engines.megatron.settings import Settings


class BalancedRouter(TopKRouter):
    """A router whose losses join the backward pass at its logits.

    They are sums over tokens; `Settings.per_token` says what one token counts.
    """

    config: Settings

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flat: FlatTokens | None = None  # the batch in hand
        modules = self.config.recompute_modules or ()
        self.is_recomputed = self.config.recompute_granularity == "selective" and "moe" in modules
        # Then it is asked again by the backward pass, which takes batches in the order of the forward pass.
        self.waiting: deque[FlatTokens | None] = deque()
        self.sums: dict[str, Tensor] = {}  # this rank's share of each loss, since `take_sums`

    def routing(self, logits: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """logits [n, 1, E]."""
        config = self.config
        has_losses = bool(config.balance or config.small_logits)
        flat = self.batch() if self.training and (has_losses or self.enable_expert_bias) else None
        if flat and has_losses:
            found = self.losses(logits.flatten(0, 1).float(), flat)
            for name, value in found.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            balance = config.balance / sum(config.sparse) * found["aux_loss"]
            loss = balance + config.small_logits * found["z_loss"]
            logits = MoEAuxLossAutoScaler.apply(logits, loss * config.per_token)
        if config.routing is None:
            routed: tuple[Tensor, Tensor] = super().routing(logits, *rest, **named)
            return routed
        weights, chosen = choose_experts(logits.flatten(0, 1), self.expert_bias, config.routing)
        if flat and self.enable_expert_bias:  # megatron-core moves the biases by what was counted in a step
            is_trained = (flat.weights > 0)[self.own_ids(flat)]
            self.local_tokens_per_expert += (chosen & is_trained[:, None]).sum(0)
        if config.moe_expert_capacity_factor is None:
            return weights, chosen
        kept: tuple[Tensor, Tensor] = apply_router_token_dropping(
            weights, chosen, router_topk=self.topk, capacity_factor=config.moe_expert_capacity_factor
        )
        return kept

    def batch(self) -> FlatTokens | None:
        """What the losses are of; none where nothing is differentiated."""
        if torch.is_grad_enabled():
            return self.waiting.popleft() if self.is_recomputed else self.flat
        if self.is_recomputed:
            self.waiting.append(self.flat)
        return None

    def own_ids(self, flat: FlatTokens) -> Tensor:
        """int64 [n] segment of each token."""
        assert flat.segment_ids is not None
        if not self.config.sequence_parallel:
            return flat.segment_ids
        return flat.segment_ids.chunk(self.tp_group.size())[self.tp_group.rank()]

    def losses(self, logits: Tensor, flat: FlatTokens) -> dict[str, Tensor]:
        """Sums over the tokens of trained segments. Peers, who have the other tokens, give the rest of them.

        The balance of a segment is E times the sum over experts of f_e * p_e: how often e was chosen, by
        tokens of all peers, times its probabilities here. Size of logits: ST-MoE, arXiv:2202.08906 eq. 5.
        """
        ids_n, weights_S = self.own_ids(flat), flat.weights
        assert weights_S is not None
        probability = torch.softmax(logits, -1)
        picks = torch.zeros_like(probability).scatter(1, probability.topk(self.topk, -1).indices, 1.0)
        empty_SE = probability.new_zeros(len(weights_S), logits.shape[-1])
        chosen_SE = empty_SE.index_add(0, ids_n, picks)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(chosen_SE, group=self.tp_cp_group)
        expected_SE = empty_SE.index_add(0, ids_n, probability)
        size_n = torch.logsumexp(logits, -1).square()
        return {
            "aux_loss": logits.shape[-1] * (weights_S * (chosen_SE * expected_SE).sum(-1)).sum(),
            "z_loss": (size_n * (weights_S > 0)[ids_n]).sum(),
        }


def watch_batches(chunk: GPTModel) -> None:
    """Tells the routers of a chunk which batch its layers are called with, also when they are recomputed."""

    def tell(layer: nn.Module, _inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        layer.mlp.router.flat = named["packed_seq_params"]

    for layer in chunk.decoder.layers:
        if layer.is_moe_layer:
            layer.register_forward_pre_hook(tell, with_kwargs=True)


def take_sums(chunks: Sequence[GPTModel]) -> dict[str, Tensor]:
    """Losses of this rank's layers since the last call, for metrics; none where nothing was added.

    Summed over all ranks of the job and divided by the tokens of segments that train and by layers with
    experts, they are means.
    """
    totals: dict[str, Tensor] = {}
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BalancedRouter):
                for name, value in module.sums.items():
                    totals[name] = totals.get(name, 0.0) + value
                module.sums = {}
    return totals
