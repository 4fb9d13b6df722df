"""The decoder with its graphs and kernels, where there is a GPU."""

import pytest
import torch
from transformers import AutoTokenizer

from swift.engines.attention import FLAT_ATTENTION
from swift.models.load import load_model
from swift.rollout.decoder import Decoder
from swift.rollout.types import Request, Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ALIKE = list(range(5, 205))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "prompts",
    [
        [list(range(5, 5 + n)) for n in (7, 150, 20, 3)],
        [ALIKE + list(range(9, 9 + n)) for n in (7, 50, 3, 1)],
    ],
    ids=["different", "alike at first"],
)
def test_graphs_give_what_teacher_forcing_gives(tiny_qwen3_dir, prompts, autocast) -> None:
    """Rows of different lengths that join and leave, in memory that does not suffice for all of them."""
    device = torch.device("cuda")
    model = load_model(tiny_qwen3_dir, dtype=None, attention=FLAT_ATTENTION, device=device).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3_dir)
    settings = zip(prompts, (30, 9, 200, 40), (3, 1, 2, 5), strict=True)
    requests = [Request(p, Sampling(max_tokens=most, seed=len(p)), count) for p, most, count in settings]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        decoder = Decoder(
            model, tokenizer, stop_token_ids=[], context=512, max_rows=6, memory_bytes=512 * 64 * 16
        )
        answers = decoder.generate(requests)
    assert decoder.graphs is not None and decoder.graphs.works and decoder.graphs.recorded
    held = torch.cuda.memory_allocated()
    del decoder  # nothing waits for the collector of garbage: training needs the memory
    assert torch.cuda.memory_allocated() < held - 512 * 64 * 12
    model.set_attn_implementation("sdpa")
    for request, group in zip(requests, answers, strict=True):
        for answer in group:
            assert len(answer.token_ids) == request.sampling.max_tokens
            ids = torch.tensor([request.token_ids + answer.token_ids], device=device)
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            told = logps.gather(1, ids[0, 1:, None])[len(request.token_ids) - 1 :, 0].cpu()
            close = 0.05 if autocast else 1e-4
            torch.testing.assert_close(torch.tensor(answer.logps), told, rtol=0, atol=close)
