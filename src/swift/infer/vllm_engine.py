"""`swift infer --infer_backend vllm`: the same prompts, sampling and rows, computed by vLLM.

Not here: vLLM itself (rollout/vllm_local.py), prompts and sampling (engine.py).
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig as HfGenerationConfig
from transformers import PreTrainedTokenizerBase

from swift.config.model import ModelConfig
from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.config.vllm import VllmConfig
from swift.engines.ranks import Ranks
from swift.infer.engine import TransformersInferEngine, find_ends
from swift.models.adapters import tokenizer_directory
from swift.models.directory import ADAPTER_CONFIG, read_json
from swift.models.load import load_tokenizer
from swift.rollout.types import Completion, End, Request, Token
from swift.rollout.vllm import engine_arguments, start_local
from swift.rollout.vllm_terms import Terms
from swift.template.chat import ChatTemplate

GENERATION_CONFIG = "generation_config.json"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
WAITING = 1024  # requests that vLLM knows of at once; it runs as many as fit


@dataclass(frozen=True, slots=True)
class Vllm:
    """Implements Answering, by vLLM; `local` is a VllmLocal."""

    local: Any

    def answers(
        self, requests: Iterable[tuple[int, Request]], *, max_rows: int | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        return self.local.complete(requests, max_rows=max_rows or WAITING)

    def events(self, request: Request) -> Generator[Token | End]:
        local, told = self.local, 0
        ends, top = local.terms.ends(request), request.sampling.top_logps
        writer = local.terms.writer(request)
        with closing(local.stream(request)) as outputs:
            for output in outputs:
                answer = output.outputs[0]
                for token, at in list(zip(answer.token_ids, answer.logprobs, strict=True))[told:]:
                    likely = {t: found.logprob for t, found in at.items()} if top else None
                    yield Token(
                        0, token, at[token].logprob, "" if token in ends else writer.push(token), likely
                    )
                told = len(answer.token_ids)
                if output.finished:
                    yield End(0, writer.flush(), local.terms.read_answer(request, answer, local.version))


class VllmInferEngine(TransformersInferEngine):
    """One vLLM in this process: other models, the same prompts and settings."""

    def __init__(
        self, local: Any, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, file: HfGenerationConfig
    ) -> None:
        self.local, self.tokenizer, self.template, self.defaults = local, tokenizer, template, file
        self.context = min(local.context, template.config.max_length or local.context)
        self.stop_token_ids = find_ends(file, template)
        self.by_decoder = True  # tells log-probabilities

    @property
    def answering(self) -> Vllm:
        """Made anew for whoever changed the stop tokens."""
        self.local.terms = Terms(self.tokenizer, tuple(self.stop_token_ids))
        return Vllm(self.local)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.local.llm.model_config.dtype
        return found


def load_vllm(
    model_path: Path,
    adapter_path: Path | None,
    model: ModelConfig,
    config: TemplateConfig,
    vllm: VllmConfig,
    ranks: Ranks,
) -> VllmInferEngine:
    """From a model directory; the adapter's tokenizer wins. ConfigError where vLLM cannot apply it."""
    named = model.torch_dtype or (None if torch.cuda.is_available() else "float32")
    arguments = engine_arguments(vllm, dtype=named and getattr(torch, named))
    tokenizer_path = tokenizer_directory(model_path, adapter_path)
    if adapter_path:
        arguments = {"enable_lora": True, "max_lora_rank": lora_rank(adapter_path)} | arguments
        arguments = {"tokenizer": str(tokenizer_path)} | arguments
    tokenizer = load_tokenizer(tokenizer_path)
    has_file = (model_path / GENERATION_CONFIG).is_file()
    defaults = HfGenerationConfig.from_pretrained(model_path) if has_file else HfGenerationConfig()
    local = start_local(
        model_path, arguments, tokenizer=tokenizer, stop_token_ids=(), ranks=ranks, adapter=adapter_path
    )
    return VllmInferEngine(local, tokenizer, ChatTemplate(tokenizer, config), defaults)


def lora_rank(adapter_path: Path) -> int:
    """The size of adapters that vLLM has to be ready for; ConfigError for what is no plain LoRA."""
    saved = read_json(adapter_path / ADAPTER_CONFIG)
    hint = "fold them in first: swift export --merge_lora true"
    for name, plain in (
        ("use_dora", False),
        ("bias", "none"),
        ("modules_to_save", None),
        ("target_parameters", None),
    ):
        if saved.get(name) not in (plain, None, []):
            raise ConfigError(f"--adapters {adapter_path}: vLLM cannot apply what {name} adds", hint=hint)
    wanted = max([saved["r"], *saved.get("rank_pattern", {}).values()])
    if wanted > LORA_RANKS[-1]:
        raise ConfigError(
            f"--adapters {adapter_path} of rank {wanted}: vLLM takes up to {LORA_RANKS[-1]}", hint=hint
        )
    return min(rank for rank in LORA_RANKS if rank >= wanted)
