"""The experts of a mixture, all of a rank in one grouped matrix product of torch.

megatron-core's router and dispatchers do the rest: tokens arrive sorted by expert, with expert tensor
parallelism those of all its ranks, and go back as partial sums. Checkpoints have the keys and shapes that
TEGroupedMLP and SequentialMLP write, so that either reads what the other wrote.
Shapes: n = tokens of this rank's experts, e = those experts, E = all experts, D = model width, f = width of
an expert on this rank.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from swift.engines.megatron.settings import Settings


class StackedLinear(nn.Module):
    """A linear layer for each local expert: `weight` [e, out, in], cut over expert-tensor ranks."""

    def __init__(self, config: Settings, count: int, rows: int, columns: int, *, cut: int) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.cut = cut  # 0 = rows (column parallel), 1 = columns (row parallel)
        self.weight = nn.Parameter(
            torch.empty(count, rows, columns, dtype=config.params_dtype, device=device)
        )
        # Without these, gradient norms count the experts of the first tensor-parallel rank alone.
        set_tensor_model_parallel_attributes(self.weight, True, cut + 1, 1)
        # Experts that are not spread as the rest of the model is have their own data-parallel ranks.
        spread_alike = (
            config.expert_model_parallel_size == 1
            and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        )
        self.weight.allreduce = spread_alike  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """tokens [n, in], ends int32 [e] (one past the last token of each expert) -> [n, out]."""
        return F.grouped_mm(tokens, self.weight.transpose(1, 2), offs=ends)


class GroupedExperts(MegatronModule):
    """SwiGLU experts. Gate and up projections are the halves of `linear_fc1`."""

    def __init__(self, num_local_experts: int, config: Settings, *, pg_collection: Any, **_: Any) -> None:
        super().__init__(config=config)
        assert config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear
        assert config.moe_ffn_hidden_size
        self.groups, self.count = pg_collection, num_local_experts
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = StackedLinear(config, self.count, 2 * width, config.hidden_size, cut=0)
        self.linear_fc2 = StackedLinear(config, self.count, config.hidden_size, width, cut=1)
        self.recompute = config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, probabilities: Tensor
    ) -> tuple[Tensor, None]:
        """tokens [n, D], probabilities [n] -> [n, D], each token weighed by its probability.

        Without any token the products are empty but stay in the graph: the exchanges in front of them wait
        for every rank in the backward pass too.
        """
        ends = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0).to(torch.int32)
        weights = probabilities[:, None]
        if self.config.moe_apply_probs_on_input:
            tokens, weights = (tokens * weights).to(tokens.dtype), torch.ones_like(weights)
        hidden = self.linear_fc1(tokens, ends)
        if not self.recompute:
            return self.linear_fc2(self.activate(hidden, weights), ends), None
        checkpoint = CheckpointWithoutOutput()
        output = self.linear_fc2(checkpoint.checkpoint(self.activate, hidden, weights), ends)
        checkpoint.discard_output_and_register_recompute(output)
        return output, None

    def activate(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """[n, 2f] -> [n, f]; in float32 where probabilities are."""
        if self.config.bias_activation_fusion:
            return weighted_bias_swiglu_impl(hidden, None, weights, False)  # type: ignore[no-untyped-call]
        gate, up = hidden.chunk(2, dim=-1)
        return (F.silu(gate) * up * weights).to(hidden.dtype)

    def backward_dw(self) -> None:
        """megatron-core asks for weight gradients that were put off; none are."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Mapping[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        """`<prefix>experts.linear_fc1.weight` of [..., E, 2f, D] and `linear_fc2.weight` of [..., E, D, f].

        Raises NotImplementedError for keys of single experts, which only FSDP of megatron-core asks for.
        """
        if (metadata or {}).get("singleton_local_shards"):
            raise NotImplementedError("checkpoints with a key for each expert")
        return {
            f"{prefix}{name}.weight": self.sharded(module, f"{prefix}experts.{name}.weight", sharded_offsets)
            for name, module in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2))
        }

    def sharded(self, linear: StackedLinear, key: str, offsets: tuple) -> ShardedTensorFactory:
        """A stack of experts as single ones, gates apart from ups: a rank has the same rows of both."""
        groups, parts = self.groups, 2 if linear is self.linear_fc1 else 1
        first, total = groups.ep.rank() * self.count, groups.ep.size() * self.count
        shares, share = groups.expt_tp.size(), groups.expt_tp.rank()
        axis = len(offsets)

        def cut(key: str, stack: Tensor, replica: ReplicaId, _flat: slice | None) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *offsets,
                    (axis, first + i, total),
                    (axis + 1 + linear.cut, share + shares * j, shares * parts),
                    replica_id=replica,
                    prepend_axis_num=axis + 1,
                )
                for i, expert in enumerate(stack.unbind(0))
                for j, part in enumerate(expert.chunk(parts))
            ]

        def join(tensors: list[Tensor]) -> Tensor:
            experts = (torch.cat(tensors[i : i + parts]) for i in range(0, len(tensors), parts))
            return torch.stack(list(experts))

        # Copies are along data parallelism alone: pipeline, tensor and expert ranks hold parts of their own.
        return ShardedTensorFactory(key, linear.weight, cut, join, (0, 0, groups.expt_dp.rank()))
