"""Do two models say the same? Logits of both on a few fixed texts, compared to a stated tolerance.

Owns: the texts, the tolerances, the numbers that are printed. Not here: loading and merging (merge.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVERSATIONS = (
    ("Who are you?", "I am an assistant. I was made to answer questions."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("你是谁？", "我是一个人工智能助手，可以回答问题。"),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b\n\nprint(add(1, 22))"),
)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What may differ between two models that count as the same."""

    relative: float  # largest logit difference, as a share of the largest reference logit
    agreement: float  # share of positions that must have the same most likely next token


# float32: the order of additions. Others: merged weights are rounded to 8 (bfloat16) or 11 (float16) bits.
TOLERANCES = {
    "float32": Tolerance(relative=1e-4, agreement=0.99),
    "float16": Tolerance(relative=5e-3, agreement=0.97),
    "bfloat16": Tolerance(relative=3e-2, agreement=0.9),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far two lists of logits are apart."""

    mean: float  # absolute difference
    largest: float  # absolute difference
    scale: float  # largest absolute logit of the reference
    agreement: float  # share of positions with the same most likely token
    positions: int

    def within(self, tolerance: Tolerance) -> bool:
        """False for NaN too."""
        return self.largest <= tolerance.relative * self.scale and self.agreement >= tolerance.agreement

    def describe(self, tolerance: Tolerance) -> str:
        return (
            f"logits differ by {self.mean:.2e} on average, {self.largest:.2e} at most "
            f"(allowed {tolerance.relative:g} x {self.scale:.1f}); the same next token at "
            f"{self.agreement:.1%} of {self.positions} positions"
        )


def render_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The fixed conversations as the model sees chats; plain lines where there is no chat template."""
    if not tokenizer.chat_template:
        return [f"{question}\n{answer}" for question, answer in CONVERSATIONS]
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in CONVERSATIONS
    ]
    return [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]


@torch.inference_mode()
def compute_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[Tensor]:
    """Logits of every text, each [tokens, V] float32 on the CPU."""
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in texts]
    return [model(input_ids=i.to(model.device)).logits[0].float().cpu() for i in ids]


def compare_logits(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Comparison:
    """Numbers over all positions of all texts; both lists have the same shapes."""
    expected, found = torch.cat(list(reference)), torch.cat(list(other))
    difference = (expected - found).abs()
    return Comparison(
        mean=difference.mean().item(),
        largest=difference.max().item(),
        scale=expected.abs().max().item(),
        agreement=(expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
        positions=len(expected),
    )
