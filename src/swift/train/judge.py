"""`--reward_model_plugin genrm`: a language model reads conversations and judges their last answers."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from swift.engines.attention import FLAT_ATTENTION
from swift.engines.transformers.forward import check_answering
from swift.rollout.decoder import Decoder
from swift.rollout.types import Request, Sampling
from swift.template.chat import ChatTemplate

TASK = """\
You are shown a conversation. Judge the assistant's last answer alone: is it right, is it complete, does it \
keep to what was asked? Say in a few sentences why. Then write one more line,
Reward: x
where x is a number between 0 for an answer without any use and 1 for one that could not be better."""
LONGEST = 512  # tokens of a judgement
ROWS = 64  # judgements written together
VERDICT = re.compile(r"Reward:\s*(1(?:\.0+)?|0(?:\.\d+)?)(?!\.?\d)")


class Judge:
    """The judge's most likely words, read to their end; None for an answer about which no number is said."""

    def __init__(self, model: Any, template: ChatTemplate) -> None:
        if model.get_output_embeddings() is None:
            raise ValueError("genrm needs a model that writes, and this one has a score head")
        check_answering(type(model), model.config)
        model.set_attn_implementation(FLAT_ATTENTION)
        self.model, self.template = model.eval(), template

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[float | None]:
        prompts = [self._ask(row["messages"]) for row in rows]
        decoder = Decoder(
            self.model, self.template.tokenizer, stop_token_ids=self.template.stop_token_ids,
            context=max(map(len, prompts)) + LONGEST, max_rows=ROWS,
        )  # fmt: skip
        with torch.no_grad():
            found = decoder.generate([Request(ids, Sampling(LONGEST, temperature=0)) for ids in prompts])
        return [read_verdict(answer.text) for (answer,) in found]

    def _ask(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        shown = "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
        asked = [{"role": "system", "content": TASK}, {"role": "user", "content": shown}]
        return self.template.tokenizer.encode(self.template.prompt(asked), add_special_tokens=False)


def read_verdict(text: str) -> float | None:
    """The last number after `Reward:`."""
    found = VERDICT.findall(text)
    return float(found[-1]) if found else None
