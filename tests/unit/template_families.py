"""Tiny tokenizers with the special tokens and the chat template of real model families."""

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from swift.config.template import TemplateConfig
from swift.template.chat import ChatTemplate

_TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")

# family -> (special tokens, eos, bos, file)
_FAMILIES = {
    "smollm2": (_CHATML, "<|im_end|>", None, "HuggingFaceTB-SmolLM2-135M-Instruct.jinja"),
    "qwen2.5": (_CHATML, "<|im_end|>", None, "Qwen-Qwen2.5-7B-Instruct.jinja"),
    "qwen3": (_CHATML, "<|im_end|>", None, "Qwen-Qwen3-0.6B.jinja"),
    "llama3.1": (_LLAMA, "<|eot_id|>", "<|begin_of_text|>", "meta-llama-Llama-3.1-8B-Instruct.jinja"),
    "r1": (_R1, _R1[1], _R1[0], "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja"),
}
FAMILIES = tuple(_FAMILIES)

_CORPUS = (
    "Who are you? I am swift-robot, an assistant made by swift. The capital of France is Paris.",
    "system user assistant tool You are a helpful assistant. think tool_call arguments name",
    "你是谁？我是机器人。",
)


def build_tokenizer(
    specials: tuple[str, ...],
    eos: str | None,
    template: str | None,
    *,
    bos: str | None = None,
    trim_offsets: bool | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE. `trim_offsets` adds the post-processor that takes spaces out of tokens' places."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if trim_offsets is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template
    )


@lru_cache
def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    specials, eos, bos, file = _FAMILIES[family]
    return build_tokenizer(specials, eos, (_TEMPLATES / file).read_text(encoding="utf-8"), bos=bos)


def family_template(family: str, **config: object) -> ChatTemplate:
    return ChatTemplate(family_tokenizer(family), TemplateConfig(**config))


def jinja_template(source: str | None, *, eos: str | None = "<|im_end|>", **config: object) -> ChatTemplate:
    """A template of the test's own with the ChatML special tokens."""
    return ChatTemplate(build_tokenizer(_CHATML, eos, source), TemplateConfig(**config))


def chat(*turns: str, system: str | None = None) -> list[dict]:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": words} for i, words in enumerate(turns)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def trained_text(template: ChatTemplate, messages: list[dict], tools: list | None = None) -> list[str]:
    rendered = template.render(messages, tools=tools)
    return [rendered.text[span.start : span.end] for span in rendered.spans]
