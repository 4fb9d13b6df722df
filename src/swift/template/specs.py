"""Texts of our own, from the files in texts/: a chat template for tokenizers that ship none, and what is told
about tools (agents.py), where @TOOLS@ stands for their descriptions and @NAMES@ for their names.

hermes is as in the templates of Qwen2.5 and Qwen3, qwen3_coder as in that of Qwen3-Coder but with tools in
JSON, glm4_5 and llama3 as in those of GLM-4.5 and Llama 3.1; react is the form of arXiv:2210.03629.
"""

from importlib import resources


def read_spec(name: str) -> str:
    """The file without the line end at its end."""
    path = resources.files("swift.template") / "texts" / name
    return path.read_text(encoding="utf-8").removesuffix("\n")


def chatml(end_of_turn: str, *, opening: str = "") -> str:
    """Jinja source of ChatML with the given end of a turn; it names no variables, so any tool can use it.

    Source: https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
    """
    return _fill("chatml.jinja", opening, end_of_turn)


def plain_text(end: str, *, opening: str = "") -> str:
    """Jinja source of the bare text of all messages, one after another: `end` is the token that ends it."""
    return _fill("plain_text.jinja", opening, end)


def _fill(name: str, opening: str, end: str) -> str:
    source = read_spec(name)
    for mark, value in (("@OPENING@", opening), ("@END@", end)):
        source = source.replace(mark, value.replace("\\", "\\\\").replace("'", "\\'"))
    return source
