"""/v1/embeddings, through OpenAI's client and the application, without a port."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from swift.config.option import ConfigError, build
from swift.config.runs import DeployRun
from swift.infer.server import build_app
from swift.infer.server_embedding import EmbeddingServer
from swift.infer.server_models import load_scorer, make_plan

TEXTS = ["Who are you?", "What is the capital of France?", "A day has 24 hours."]


def plan(model: Path, **flags: object) -> Any:
    run = build(DeployRun, {"model": str(model), "device": "cpu", "served_model_name": "own", **flags})
    return make_plan(run)


def serve(model: Path, ask: Callable[[openai.AsyncOpenAI, httpx.AsyncClient], Any], **flags: object) -> Any:
    """What `ask` gets from the application of a model."""
    planned = plan(model, **flags)
    scorer = load_scorer(planned)

    async def main() -> Any:
        app = build_app(EmbeddingServer("own", scorer, planned.run.serve))
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://swift") as http:
            client = openai.AsyncOpenAI(
                base_url="http://swift/v1", api_key="none", http_client=http, max_retries=0
            )
            return await ask(client, http)

    return asyncio.run(main())


@pytest.fixture(scope="module")
def embedder(tmp_path_factory, make_tiny_model_dir) -> Path:
    """As `swift sft --task_type embedding` leaves it."""
    path = make_tiny_model_dir(tmp_path_factory.mktemp("embedder"))
    (path / "args.json").write_text(json.dumps({"task_type": "embedding", "system": "Be brief."}))
    return path


def test_embeddings_are_the_last_hidden_states(embedder: Path) -> None:
    async def ask(client: openai.AsyncOpenAI, http: httpx.AsyncClient) -> Any:
        packed = await client.embeddings.create(model="own", input=TEXTS)  # the client asks for base64
        plain = await client.embeddings.create(model="own", input=TEXTS[0], encoding_format="float")
        return packed, plain, (await http.get("/metrics")).text, await client.models.retrieve("own")

    packed, plain, metrics, known = serve(embedder, ask)
    found = torch.tensor([row.embedding for row in packed.data])
    tokenizer = AutoTokenizer.from_pretrained(embedder)
    model = AutoModelForCausalLM.from_pretrained(embedder, dtype=torch.float32).eval()
    tokens = 0
    for text, vector in zip(TEXTS, found, strict=True):
        chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            last = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(vector, last / last.norm(), atol=1e-5, rtol=0)
        tokens += ids.shape[1]
    assert packed.usage.total_tokens == tokens
    torch.testing.assert_close(torch.tensor(plain.data[0].embedding), found[0], atol=1e-5, rtol=0)
    assert cosine_similarity(found[0], found[1], dim=0) < 0.999
    assert known.id == "own" and "swift_requests_answered_total 2\n" in metrics


def test_what_embeddings_cannot_do(embedder: Path) -> None:
    async def ask(client: openai.AsyncOpenAI, _http: httpx.AsyncClient) -> list[str]:
        create = partial(client.embeddings.create, model="own")
        told = []
        for options in (
            {"input": "x" * 5000}, {"input": []}, {"input": "a", "dimensions": 8},
            {"input": "a", "model": "other"}, {"input": ["a"] * 9},
        ):  # fmt: skip
            with pytest.raises(openai.APIStatusError) as caught:
                await create(**options)
            told.append(f"{caught.value.status_code} {caught.value.body['message']}")  # type: ignore[index]
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="own", messages=[{"role": "user", "content": "Hi"}])
        return told

    long, empty, fewer, other, many = serve(embedder, ask, max_batch_size=4, max_queue_size=4)
    assert long == "400 a text is longer than --max_length 512"
    assert empty == "400 input is empty"
    assert fewer == "400 dimensions is not known to this server"
    assert other == "404 the model 'other' does not exist, there is own"
    assert many == "429 too many texts are waiting, try again later"


@pytest.mark.parametrize(
    ("flags", "what"),
    [({"result_path": "a.jsonl"}, "--result_path"), ({"infer_backend": "vllm"}, "--infer_backend vllm")],
)
def test_flags_that_texts_have_no_use_for(embedder: Path, flags: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what} is not there for models of --task_type embedding"):
        plan(embedder, **flags)
