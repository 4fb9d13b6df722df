"""Which model, in which precision, from where."""

from dataclasses import dataclass
from typing import Any

from swift.config.option import option

DTYPES = ("bfloat16", "float16", "float32")
ATTENTION = ("sdpa", "eager", "flash_attn", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    model: str | None = option(None, "hub id, local directory, or the built-in smollm2-135m")
    model_revision: str | None = option(None, "branch, tag or commit of a hub model; none = the default")
    torch_dtype: str | None = option(
        None, "dtype of the weights; none = config.json's on a GPU, float32 on a CPU", choices=DTYPES
    )
    attn_impl: str | None = option(None, "attention kernel; none = the best one present", choices=ATTENTION)
    device: str | None = option(None, "cpu, cuda or cuda:N; none = the first GPU, else the CPU")
    use_hf: bool = option(False, "take hub ids from HuggingFace instead of ModelScope")
    hub_token: str | None = option(None, "access token of the hub; never written to a file or the log")

    @property
    def hub(self) -> dict[str, Any]:
        """Which hub, and as whom: keywords of everything that may ask one."""
        return {"use_hf": self.use_hf, "token": self.hub_token}
