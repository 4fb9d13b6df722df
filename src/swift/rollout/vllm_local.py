"""vLLM inside the process that asks: beside a training on the same GPUs, or for `swift infer`.

Loaded only when vLLM is asked for: the package is an extra. Not here: vLLM behind a port (vllm_client.py).
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from swift.config.option import ConfigError
from swift.engines.ranks import Ranks
from swift.rollout.types import Completion, Request
from swift.rollout.vllm_terms import Terms

RECEIVER = "swift.rollout.vllm_worker.WeightReceiver"


class VllmLocal:
    """One vLLM in this process: `swift.rollout.protocol.RolloutEngine`.

    Where the weights are cut over several GPUs, as many neighbouring processes answer together: each holds a
    part of the weights, and all of them go through the requests of all.
    """

    def __init__(
        self,
        model: Path,
        arguments: dict[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        ranks: Ranks | None = None,
        sleep_level: int = 0,
        adapter: Path | None = None,
    ) -> None:
        """`arguments`: of vLLM's engine. `adapter`: a directory of PEFT's that answers go through."""
        self.ranks, self.terms = ranks or Ranks(), Terms(tokenizer, tuple(stop_token_ids))
        self.together = int(arguments.get("tensor_parallel_size", 1)) if self.ranks.world > 1 else 1
        self.sleep_level = sleep_level
        self.asleep: set[str] = set()
        self.version = 0
        self.adapter = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        with same_random_states():
            self.llm = start(model, arguments, spread=self.ranks.world > 1, sleeps=sleep_level > 0)
        self.context = int(self.llm.model_config.max_model_len)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        self._check_length(requests)
        self._wake("weights", "kv_cache")
        if self.together == 1:
            return self._answer(requests) if requests else []
        first = self.ranks.rank - self.ranks.rank % self.together
        everyone = self.ranks.collect(list(requests))[first : first + self.together]
        answers = self._answer([request for theirs in everyone for request in theirs])
        before = sum(map(len, everyone[: self.ranks.rank - first]))
        return answers[before : before + len(requests)]

    def _answer(self, requests: Sequence[Request]) -> list[list[Completion]]:
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=request.token_ids) for request in requests],
            [SamplingParams(**self.terms.sampling(request)) for request in requests],
            use_tqdm=False,
            lora_request=self.adapter,
        )
        return [self._read(request, output) for request, output in zip(requests, outputs, strict=True)]

    def _read(self, request: Request, output: RequestOutput) -> list[Completion]:
        return [self.terms.read_answer(request, answer, self.version) for answer in output.outputs]

    def complete(
        self, requests: Iterable[tuple[int, Request]], *, max_rows: int
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The answers to each request by its number, as they finish; taken from the iterator with time."""
        engine, source, asked = self.llm.llm_engine, iter(requests), dict[str, Request]()
        more = True
        while more or asked:
            while more and len(asked) < max_rows:
                number, request = next(source, (0, None))
                more = request is not None
                if request is not None:
                    asked[str(number)] = request
                    self._submit(str(number), request, RequestOutputKind.FINAL_ONLY)
            for output in engine.step():
                if output.finished:
                    yield int(output.request_id), self._read(asked.pop(output.request_id), output)

    def stream(self, request: Request) -> Iterator[RequestOutput]:
        """One answer as it grows, in vLLM's terms; the last is all of it."""
        engine, done = self.llm.llm_engine, False
        self._submit("stream", request, RequestOutputKind.CUMULATIVE)
        try:
            while not done:
                for output in engine.step():
                    done = output.finished
                    yield output
        finally:
            if not done:
                engine.abort_request(["stream"])

    def _submit(self, name: str, request: Request, kind: RequestOutputKind) -> None:
        self._check_length([request])
        settings = self.terms.sampling(request) | {"output_kind": kind}
        prompt = TokensPrompt(prompt_token_ids=request.token_ids)
        self.llm.llm_engine.add_request(name, prompt, SamplingParams(**settings), lora_request=self.adapter)

    def _check_length(self, requests: Sequence[Request]) -> None:
        longest = max((len(request.token_ids) for request in requests), default=0)
        if longest >= self.context:
            raise ConfigError(
                f"a prompt has {longest} tokens, and vLLM was started for {self.context} with the answer",
                hint="raise --vllm_max_model_len, or drop such rows with --max_length",
            )

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self._wake("weights")
        pairs = iter(weights)
        self.llm.collective_rpc("receive", args=(pairs,))
        for _ in pairs:  # other ranks may be waiting to exchange what vLLM had no use for
            pass
        # Keys and values of the old weights would go on answering for prompts that come again.
        self.llm.reset_prefix_cache()
        self.version = version

    def sleep(self) -> None:
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """Only the weights, which may be sent now; the cache comes back with the first request."""
        self._wake("weights")

    def _wake(self, *parts: str) -> None:
        for part in parts:
            if part in self.asleep:
                self.llm.wake_up(tags=[part])
                self.asleep.remove(part)

    def close(self) -> None:
        """Also ends the process group, the training's own included: the last thing before `leave_ranks`."""
        self.llm.llm_engine.engine_core.shutdown()


def start(model: Path, arguments: dict[str, Any], *, spread: bool, sleeps: bool) -> LLM:
    """vLLM's engine in this process; ConfigError where it cannot start, in its words."""
    settings = {
        "model": str(model),
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # defaults of sampling are ours
        "worker_extension_cls": RECEIVER,
        "use_tqdm_on_load": False,
        "enable_sleep_mode": sleeps and torch.cuda.is_available(),  # a CPU has nothing to free
        "disable_log_stats": True,
    }
    if spread:
        settings["distributed_executor_backend"] = "external_launcher"
    elif max(arguments.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")) == 1:
        settings["distributed_executor_backend"] = "uni"  # else vLLM starts the processes that it needs
    try:
        return LLM(**settings | arguments)
    except (ValueError, TypeError, RuntimeError, torch.OutOfMemoryError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"vLLM does not start: {first}", hint="--vllm_* and --vllm_engine_kwargs are its arguments"
        ) from error


@contextmanager
def same_random_states() -> Iterator[None]:
    """Leaves every generator of this process as it was: vLLM seeds them all when it starts."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
