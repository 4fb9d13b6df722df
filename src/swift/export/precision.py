"""`--test_convert_precision`: does a converted model compute what the other one computes?

Owns: the row that both see, the numbers that are printed, and what is too far apart.
"""

from pathlib import Path

import torch
from torch import Tensor

from swift.config.template import TemplateConfig
from swift.engines.megatron.convert import run_by_parts, sum_up
from swift.models.load import load_model, load_tokenizer
from swift.template.chat import ChatTemplate
from swift.template.tokenize import IGNORED, Encoded, encode_chats
from swift.utils.log import say

QUESTION = "Introduction to ms-swift."
ANSWER = (
    "ms-swift is an official framework provided by the ModelScope community for fine-tuning and deploying "
    "large language models and multi-modal large models."
)
LARGEST_MEAN = 0.1
# Of the largest logit: far above what float32 rounds, far below what a wrong weight does. Small models can be
# all wrong and stay below the other bound.
LARGEST_SHARE = 1e-3


def encode_row(source: Path) -> tuple[Tensor, Tensor]:
    """Ids [T] of the row, and [T] whether the token after each is the answer's."""
    template = ChatTemplate(load_tokenizer(source), TemplateConfig())
    row = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    (encoded,) = encode_chats(template, [row], max_length=None, truncation_strategy="delete")
    assert isinstance(encoded, Encoded), encoded
    ids, labels = (torch.tensor(values, dtype=torch.int64) for values in (encoded.input_ids, encoded.labels))
    return ids, (labels != IGNORED).roll(-1)


@torch.no_grad()
def compute_hf(
    source: Path, ids: Tensor, *, written: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[T, V] float32 logits of a HF directory whose weights have the values they have in `written`."""
    model = load_model(source, dtype="float32", attention=None, device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, written)).to(dtype)
    describe("hf", sum_up(model.parameters()))
    run_by_parts(model, device)
    logits: Tensor = model(input_ids=ids[None].to(device)).logits[0]
    return logits.float().cpu()


def describe(name: str, sums: tuple[int, float, int]) -> None:
    count, total, zeros = sums
    say(f"{name}: number of parameters: {count}, sum of parameters: {total:.6f}, zero count: {zeros}")


def report(hf: Tensor, mcore: Tensor, answers: Tensor, dtype: str) -> bool:
    """Prints how far two [T, V] logits are apart; whether that is near enough. `answers` [T] bool."""
    for title, rows in (("", torch.ones_like(answers)), (" (with loss)", answers)):
        difference = (hf - mcore)[rows].abs()
        ours, theirs = hf[rows].argmax(-1), mcore[rows].argmax(-1)
        say(f"token_mean_diff{title}: {difference.mean(-1)}")
        say(
            f"mean_diff{title}: {difference.mean().item()}, max_diff{title}: {difference.max().item()} "
            f"(Please check that mean_diff{title} is less than {LARGEST_MEAN})."
        )
        say(f"hf_tokens{title}: {ours.tolist()}\nmg_tokens{title}: {theirs.tolist()}")
        say(f"token_diff{title}: {(ours != theirs).sum().item()}")
    mean, exact = (hf - mcore).abs().mean().item(), dtype == "float32"
    allowed = min(LARGEST_MEAN, LARGEST_SHARE * hf.abs().max().item()) if exact else LARGEST_MEAN
    others = int((hf.argmax(-1) != mcore.argmax(-1)).sum())
    if others and not exact:
        say(f"in {dtype} other most likely tokens are no failure: rounding decides between near ones")
    near = mean <= allowed and not (others and exact)  # False for NaN too
    if not near:
        say(
            f"error: the models differ: mean_diff {mean:.3g} (allowed {allowed:.3g}), "
            f"{others} of {len(answers)} most likely tokens are others",
            style="red",
        )
    return near
