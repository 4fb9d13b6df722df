"""What transformers is told to hold weights in few bits. Source: QLoRA, arXiv:2305.14314."""

import torch
from transformers import BitsAndBytesConfig

from swift.config.quant import QuantConfig


def build_quantization(config: QuantConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """`dtype`: of the rest of the model, and of products unless the flag says."""
    if config.quant_bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    named = config.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=getattr(torch, named) if named else dtype,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
    )
