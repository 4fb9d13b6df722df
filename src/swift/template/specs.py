"""Texts of our own, from the files in texts/: a chat template for tokenizers that ship none, and what is told
about tools (agents.py), where @TOOLS@ stands for their descriptions and @NAMES@ for their names.

hermes is as in the templates of Qwen2.5 and Qwen3, qwen3_coder as in that of Qwen3-Coder but with tools in
JSON, glm4_5 and llama3 as in those of GLM-4.5 and Llama 3.1; react is the form of arXiv:2210.03629.
"""

import json
from importlib import resources


def read_spec(name: str) -> str:
    """The file without the line end at its end."""
    path = resources.files("swift.template") / "texts" / name
    return path.read_text(encoding="utf-8").removesuffix("\n")


def chat_spec(name: str, *, opening: str, end: str) -> str:
    """Jinja source that names no variables, so that any tool can use it; `end` is a token.

    chatml.jinja: turns that end with it (https://github.com/openai/openai-python/blob/v0.28.1/chatml.md);
    plain_text.jinja: the bare text of all messages, one after another, which it ends.
    """
    source = read_spec(name)
    for mark, value in (("@OPENING@", opening), ("@END@", end)):
        source = source.replace(mark, value.replace("\\", "\\\\").replace("'", "\\'"))
    return source


def with_defaults(source: str, *, system: str, enable_thinking: bool | None, folds_system: bool) -> str:
    """A chat template that by itself does what we do with a run's settings, wherever it is rendered.

    system: for conversations without one of their own; "" = none. folds_system: the template shows no system
    messages, so their text goes before the first user's.
    """
    lines = []
    if enable_thinking is not None:
        value = str(enable_thinking).lower()
        lines.append(
            f"if enable_thinking is not defined -%}}{{%- set enable_thinking = {value} -%}}{{%- endif"
        )
    if system:
        ours = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
        lines += [
            "if not messages or messages[0]['role'] != 'system'",
            f"set messages = {ours} + messages",
            "endif",
        ]
    if folds_system and system:
        words = "[messages[0]['content'], messages[1]['content']] | select | join('\n\n')"
        lines += [
            "if messages[0]['role'] == 'system' and messages[1:] and messages[1]['role'] == 'user'",
            f"set messages = [{{'role': 'user', 'content': {words}}}] + messages[2:]",
            "endif",
        ]
    # The empty text at the end keeps a line end with which the template may start.
    return "".join(f"{{%- {line} -%}}" for line in lines) + ("{{- '' }}" if lines else "") + source
