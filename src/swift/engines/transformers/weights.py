"""The weights of a model that is being trained, as its published files have them, one after the other.

Owns: names without PEFT's wrappers, adapters merged on the way, slices put together.
Not here: whoever takes them (rollout/), files of a checkpoint (checkpoint.py).
"""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from swift.config.option import ConfigError
from swift.engines.files import split_shards
from swift.engines.transformers.checkpoint import unique_weights
from swift.engines.transformers.wrap import Wrapped

BELOW, WHOLE, FROZEN = ".base_layer", ".modules_to_save.default", ".original_module"  # of PEFT's wrappers


class _Merged(nn.Module):
    """PEFT's own merge of one layer as a function of its tensors, so that others can stand in for them."""

    def __init__(self, layer: LoraLayer, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self) -> Tensor:
        self.layer.merge(safe_merge=True)
        self.layer.merged_adapters.clear()
        owner, _, leaf = self.name.rpartition(".")
        merged: Tensor = getattr(self.get_submodule(owner), leaf)
        return merged


@torch.no_grad()
def stream_weights(model: PreTrainedModel | PeftModel, wrapped: Wrapped) -> Iterator[tuple[str, Tensor]]:
    """(name in files, whole tensor) in one order on all ranks, which all go through to the end.

    A tensor is as good as the step to the next one: it may be the model's own. One is in memory at a time; of
    models whose files cut tensors otherwise, such as stacks of experts, those of one layer. Adapters are
    merged in float32, and the sum has the dtype of the weight.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(base, "hf_quantizer", None) is not None:
        raise ConfigError(
            "weights that are quantised cannot be handed to vLLM: --quant_method does not go with --use_vllm",
            hint="leave one of them out",
        )
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    state = {
        name: tensor
        for name, tensor in unique_weights(base).items()
        if FROZEN not in name and not any(part.startswith("lora_") for part in name.split("."))
    }

    def whole(name: str) -> Tensor:
        layer = adapted(name, layers)
        if layer is None:
            return wrapped.gather(state[name]).detach()
        return merge_whole(layers[layer], name.removeprefix(f"{layer}."), wrapped)

    converted = bool(getattr(base, "_weight_conversions", None))
    for names in split_shards(dict.fromkeys(state, 1), limit=1) if converted else ([n] for n in state):
        tensors = {name.replace(BELOW, "").replace(WHOLE, ""): whole(name) for name in names}
        yield from (revert_weight_conversion(base, tensors) if converted else tensors).items()


def adapted(name: str, layers: dict[str, LoraLayer]) -> str | None:
    """The name of the layer whose adapter changes the tensor `name`, if there is one."""
    owner, _, leaf = name.rpartition(".")
    while owner.endswith(BELOW):
        owner = owner.removesuffix(BELOW)
        layer = layers[owner]
        if leaf == (layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"):
            return owner
    return None


def merge_whole(layer: LoraLayer, name: str, wrapped: Wrapped) -> Tensor:
    """The weight `name` of an adapted layer with its adapter, from the slices of all ranks."""
    own = {n: p for n, p in layer.named_parameters() if n == name or n.startswith("lora_")}
    gathered = {n: wrapped.gather(p).detach() for n, p in own.items()}
    wide = {f"layer.{n}": t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in gathered.items()}
    try:
        merged: Tensor = torch.func.functional_call(_Merged(layer, f"layer.{name}"), wide, ())
    except ValueError as error:
        raise ConfigError(f"the adapters cannot be merged: {str(error).splitlines()[0]}") from error
    return merged.to(gathered[name].dtype)
