"""Chat templates of our own, as data: only for tokenizers that ship none."""

_CHATML = """\
{{ '@OPENING@' }}{% for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '@END@' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def chatml(end_of_turn: str, *, opening: str = "") -> str:
    """Jinja source of ChatML with the given end of a turn; it names no variables, so any tool can use it.

    Source: https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
    """
    source = _CHATML
    for name, value in (("@OPENING@", opening), ("@END@", end_of_turn)):
        source = source.replace(name, value.replace("\\", "\\\\").replace("'", "\\'"))
    return source
