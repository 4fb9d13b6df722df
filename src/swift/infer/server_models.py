"""The models of `swift deploy`: one in memory, with adapters that each are a model of their own by name.

Owns: which directories and settings belong to which name, loading, how text becomes tokens of a name's own.
Not here: requests (server.py), steps (service.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from llguidance import LLTokenizer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from swift.config.generation import GenerationConfig
from swift.config.option import ConfigError, fill_defaults
from swift.config.runs import DeployRun
from swift.config.template import TemplateConfig
from swift.engines.transformers.forward import refusal_of_flat
from swift.engines.transformers.scorer import TextScorer
from swift.infer.engine import TransformersInferEngine
from swift.infer.guiding import choose_grammar, compile_grammar, load_vocabulary
from swift.infer.openai_requests import ApiError, ChatRequest, SampledRequest
from swift.models.adapters import TAKEN, adapter_base, load_adapter, load_run_args, merge, tokenizer_directory
from swift.models.heads import count_labels
from swift.models.hub import resolve_adapter, resolve_model
from swift.models.load import load_config, load_model, load_tokenizer, pick_device
from swift.rollout.cache import spare_bytes
from swift.rollout.decoder import Decoder
from swift.rollout.types import Guide, Sampling
from swift.template.chat import ChatTemplate
from swift.utils.log import say


@dataclass(frozen=True, slots=True)
class Source:
    """What a name stands for."""

    name: str
    adapter: Path | None
    template: TemplateConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is known before weights are loaded."""

    run: DeployRun  # with what args.json of the first checkpoint adds
    model: Path
    sources: tuple[Source, ...]
    embeds: bool = False  # whole texts are read, and none is written


class Served:
    """A model under a name: how conversations become its tokens, and how it samples unless told otherwise."""

    def __init__(self, name: str, engine: TransformersInferEngine, generation: GenerationConfig) -> None:
        self.name, self.tokenizer, self.context = name, engine.tokenizer, engine.context
        self.config, self.ends = engine.template.config, engine.stop_token_ids
        self.sampling = engine.settle(generation)
        self.max_tokens = generation.max_new_tokens  # None = what the context leaves
        self.templates = {self.config.enable_thinking: engine.template}

    def template(self, thinking: bool | None) -> ChatTemplate:
        """The template as the server was started, or with --enable_thinking as a request wants it."""
        thinking = self.config.enable_thinking if thinking is None else thinking
        if thinking not in self.templates:
            config = replace(self.config, enable_thinking=thinking)
            self.templates[thinking] = ChatTemplate(self.tokenizer, config)
        return self.templates[thinking]

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        return load_vocabulary(self.tokenizer, self.ends)

    def guide(self, request: ChatRequest, template: ChatTemplate, prompt: str) -> Callable[[], Guide] | None:
        """Makes the guides of answers that must have a form. Raises ApiError for one that none can follow."""
        grammar = choose_grammar(request, template, prompt)
        return None if grammar is None else compile_grammar(grammar, self.vocabulary)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special` adds those that a text begins with. Raises ApiError for half a character."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"the text is not Unicode: {error.reason}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def sample(
        self, request: SampledRequest, *, limit: int, seed: int, stops: tuple[str, ...], logprobs: int
    ) -> Sampling:
        """The settings of a request, those of the server where it has none."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty",
            "presence_penalty",
        )  # fmt: skip
        given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        if self.sampling.temperature == 0 and given.keys() & {"top_p", "top_k", "min_p"}:
            given.setdefault("temperature", 1.0)  # whoever shapes a distribution wants to draw from it
        return replace(
            self.sampling,
            **given,
            max_tokens=limit,
            stop=self.sampling.stop + stops,
            stop_token_ids=tuple(request.stop_token_ids),
            seed=seed if request.seed is None else request.seed,
            top_logps=logprobs,
        )

    def room(self, prompt: list[int], asked: int | None, default: int | None) -> int:
        """Longest answer to a prompt, in tokens; raises ApiError where the context is too short."""
        left = self.context - len(prompt)
        if left < (asked or 1):
            wanted = f" and {asked} of the answer" if asked else ""
            raise ApiError(
                400, f"{len(prompt)} tokens of prompt{wanted} do not fit into the context of {self.context}",
                param="max_tokens" if asked and left > 0 else "messages", code="context_length_exceeded",
            )  # fmt: skip
        return asked or min(left, default or left)


@dataclass(frozen=True, slots=True)
class Loaded:
    """All models by name, what computes for each, and how the one in memory becomes the one of a name."""

    models: dict[str, Served]
    decoders: dict[str, Decoder]
    activate: Callable[[str], None]


def make_plan(run: DeployRun) -> Plan:
    """Directories and settings by name; downloads what is missing. Raises ConfigError."""
    hub = run.model.hub
    adapters = {name: resolve_adapter(path, **hub) for name, path in run.serve.named_adapters.items()}
    first = next(iter(adapters.values()), None)
    bases = {path: adapter_base(path) for path in adapters.values()}
    if not run.model.model and len(set(bases.values())) > 1:
        named = ", ".join(f"{path} of {base}" for path, base in bases.items())
        raise ConfigError(f"--adapters are of different models: {named}", hint="name theirs with --model")
    saved = saved_by(run, first) | {"model": bases.get(first)} if first else saved_by(run, run.model.model)
    names = ("torch_dtype",) if run.model.model else TAKEN["model"]
    config, _ = fill_defaults(run.model, saved, names)
    if not config.model:
        raise ConfigError(f"--adapters {first} does not name its base model", hint="name it with --model")
    model = resolve_model(config.model, revision=config.model_revision, **hub)
    embeds = saved.get("task_type") == "embedding"
    if embeds:
        check_embedding(run)
    else:
        check_answers(model, list(adapters.values()), own_decoder=run.serve.infer_backend != "vllm")
    base = run.serve.served_model_name or Path(config.model).name
    if base in adapters:
        raise ConfigError(
            f"--adapters {base}=... has the name of the model", hint="choose another, or --served_model_name"
        )
    places = {base: adapters.pop(None, None)} | {str(name): path for name, path in adapters.items()}
    sources = [find_source(run, name, path, path or config.model) for name, path in places.items()]
    return Plan(replace(run, model=config), model, tuple(sources), embeds)


def saved_by(run: DeployRun, path: Path | str | None) -> dict[str, Any]:
    """args.json of a checkpoint; {} for what is none, and with --load_args false."""
    own = Path(path or "").expanduser()
    return load_run_args(own) if run.serve.load_args and path and own.is_dir() else {}


def find_source(run: DeployRun, name: str, adapter: Path | None, checkpoint: Path | str) -> Source:
    """A model by name, with the settings of its own training where the flags have their defaults."""
    template, taken = fill_defaults(run.template, saved_by(run, checkpoint), TAKEN["template"])
    if taken:
        say(f"{name}, from the checkpoint: " + ", ".join(f"{key} {value!r}" for key, value in taken.items()))
    return Source(name, adapter, template)


def check_embedding(run: DeployRun) -> None:
    """Raises ConfigError for what has no effect on a model that embeds texts."""
    options = run.serve
    for flag, given in (
        ("--infer_backend vllm", options.infer_backend == "vllm"), ("--merge_lora", options.merge_lora),
        ("--adapters NAME=DIR", len(options.named_adapters) > 1), ("--result_path", options.result_path),
        ("--quant_method", run.quant.quant_method),
    ):  # fmt: skip
        if given:
            raise ConfigError(f"{flag} is not there for models of --task_type embedding", hint="leave it out")


def load_scorer(plan: Plan) -> TextScorer:
    [source] = plan.sources
    return TextScorer.load(
        plan.model, num_labels=None, model=plan.run.model, template=source.template, adapter=source.adapter
    )


def check_answers(model: Path, adapters: list[Path], *, own_decoder: bool) -> None:
    """Raises ConfigError for what gives scores, and for a model that cannot answer many at once."""
    for path in (model, *adapters):
        if count_labels(path) is not None:
            raise ConfigError(
                f"{path} gives scores, not answers", hint="swift infer --val_dataset reads them"
            )
    if not own_decoder:
        return
    config = load_config(model)
    refusal = refusal_of_flat(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), config)
    if refusal:
        raise ConfigError(f"{model} cannot be served, because {refusal}", hint="swift infer answers with it")


def load_models(plan: Plan) -> Loaded:
    run, options = plan.run, plan.run.serve
    device = pick_device(run.model.device)
    network: Any = load_model(
        plan.model, dtype=run.model.torch_dtype, attention=None, device=device, quant=run.quant,
    )  # fmt: skip
    adapters: dict[str, str] = {}
    for i, source in enumerate(plan.sources):
        if source.adapter:
            adapters[source.name] = f"adapter{i}"  # a name of PEFT's cannot hold a dot
            network = load_adapter(network, source.adapter, trainable=False, name=f"adapter{i}")
    if options.merge_lora:
        network, adapters = merge(network), {}
    models, decoders = {}, {}
    for source in plan.sources:
        tokenizer = load_tokenizer(tokenizer_directory(plan.model, source.adapter))
        engine = TransformersInferEngine(network, tokenizer, source.template)
        models[source.name] = Served(source.name, engine, run.generation)
        decoders[source.name] = Decoder(
            network, tokenizer, stop_token_ids=engine.stop_token_ids, context=engine.context,
            max_rows=options.max_batch_size, memory_bytes=spare_bytes(device) // len(plan.sources),
        )  # fmt: skip
    return Loaded(models, decoders, partial(activate, network, adapters))


def activate(network: Any, adapters: dict[str, str], name: str) -> None:
    """Makes the network the model of a name, in the thread that computes."""
    if network.device.type == "cuda":
        torch.cuda.set_device(network.device)  # each thread has a current device of its own
    if name in adapters:
        network.base_model.enable_adapter_layers()
        network.set_adapter(adapters[name])
    elif adapters:
        network.base_model.disable_adapter_layers()
