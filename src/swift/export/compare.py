"""Do two models say the same? Logits of both on a few fixed texts, compared to stated bounds.

Owns: the texts, what counts as the same, the numbers that are printed.
Not here: loading and merging (merge.py).
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


# Two computations of the same thing: largest logit difference, as a share of the largest logit.
EXACT = 1e-4
# What rounding merged weights to a dtype may cost: mean divergence of the next-token distributions, in nats.
# Several times what was seen with adapters trained on a small model, the most sensitive kind.
ROUNDING = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


@dataclass(frozen=True, slots=True)
class Comparison:
    mean: float  # absolute difference
    largest: float  # absolute difference
    scale: float  # largest absolute logit of the reference
    divergence: float  # mean KL(reference || other) of the next-token distributions, in nats
    agreement: float  # share of positions with the same most likely token
    positions: int

    @property
    def equal(self) -> bool:
        """Up to the order of additions in float32; False for NaN too."""
        return self.largest <= EXACT * self.scale

    def close(self, dtype: str) -> bool:
        """Not further apart than rounding to `dtype` explains; False for NaN too."""
        return self.divergence <= ROUNDING[dtype]

    def describe_difference(self) -> str:
        return (
            f"logits differ by {self.mean:.2e} on average, {self.largest:.2e} at most "
            f"(allowed {EXACT:g} x {self.scale:.1f})"
        )

    def describe_divergence(self, allowed: float) -> str:
        return (
            f"next-token distributions differ by {self.divergence:.2e} nats (allowed {allowed:g}), "
            f"the same token first at {self.agreement:.1%} of {self.positions} positions"
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


def cut_answers(tokenizer: PreTrainedTokenizerBase, logits: Sequence[Tensor]) -> list[Tensor]:
    """Of the logits of `render_texts` those that say an answer: what stands before it was never trained.

    In few bits, a model's guesses at the words of a system prompt move far without meaning anything.
    """
    prompts = [f"{question}\n" for question, _ in CONVERSATIONS]
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": question}] for question, _ in CONVERSATIONS]
        prompts = [
            tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
        ]
    starts = [len(tokenizer(prompt, add_special_tokens=False).input_ids) - 1 for prompt in prompts]
    return [rows[start:] for rows, start in zip(logits, starts, strict=True)]


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
    ours, theirs = expected.log_softmax(-1), found.log_softmax(-1)
    return Comparison(
        mean=difference.mean().item(),
        largest=difference.max().item(),
        scale=expected.abs().max().item(),
        divergence=(ours.exp() * (ours - theirs)).sum(-1).mean().item(),
        agreement=(expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
        positions=len(expected),
    )
