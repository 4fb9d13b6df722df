"""Rendering: where the assistant's words stand, for the templates of real families and for difficult ones."""

import pickle

import pytest
from template_families import FAMILIES, build_tokenizer, chat, family_template, jinja_template, trained_text

from swift.config.option import ConfigError
from swift.config.template import TemplateConfig
from swift.template.chat import ChatTemplate
from swift.template.types import RenderError

EOT = {"llama3.1": "<|eot_id|>", "r1": "<｜end▁of▁sentence｜>"}
HEADER = "<|im_start|>assistant\n"
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
TOOL_CHAT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_text_is_what_the_tokenizer_renders(family: str, system: str | None) -> None:
    template, messages = family_template(family), chat("Hi", "Yo 😀", "And?", "Bye 你好", system=system)
    rendered = template.render(messages)
    assert rendered.text == template.tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = template.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert template.prompt(messages[:-1]) == prompt


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3"])
def test_every_answer_is_trained_with_its_end(family: str) -> None:
    end = EOT.get(family, "<|im_end|>")
    trained = trained_text(family_template(family), chat("Hi", "Yo 😀", "And?", "Bye", system="S"))
    assert trained == ["Yo 😀" + end, "Bye" + end]


@pytest.mark.parametrize("family", FAMILIES)
def test_row_of_raw_text(family: str) -> None:
    trained = trained_text(family_template(family), [{"role": "assistant", "content": "raw"}])
    assert trained[0].endswith("raw" + EOT.get(family, "<|im_end|>"))
    assert len(trained) == 1


def test_qwen3_trains_what_follows_the_prompt() -> None:
    messages = chat("Hi", "<think>\nhm\n</think>\n\nYo", "And?", "Bye")
    empty = "<think>\n\n</think>\n\n"
    # History loses its thinking, the last answer gets an empty one.
    assert trained_text(family_template("qwen3"), messages) == ["Yo<|im_end|>", f"{empty}Bye<|im_end|>"]
    no_thinking = family_template("qwen3", enable_thinking=False)
    assert trained_text(no_thinking, messages) == ["Yo<|im_end|>", "Bye<|im_end|>"]
    assert no_thinking.prompt(chat("Hi")).endswith(HEADER + empty)


def test_qwen3_thinking_of_the_last_answer_is_trained_even_where_the_prompt_closes_it() -> None:
    messages = chat("Hi", "<think>\nhm\n</think>\n\nYo")
    expected = ["<think>\nhm\n</think>\n\nYo<|im_end|>"]
    assert trained_text(family_template("qwen3"), messages) == expected
    assert trained_text(family_template("qwen3", enable_thinking=False), messages) == expected


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_tool_calls_are_trained_and_results_are_not(family: str) -> None:
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    think = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    trained = trained_text(family_template(family), TOOL_CHAT, TOOLS)
    assert trained == [call, f"{think}Sunny.<|im_end|>"]


def test_llama_tool_call() -> None:
    trained = trained_text(family_template("llama3.1"), TOOL_CHAT, TOOLS)
    assert trained[0] == '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>'


def test_tools_are_written_as_hermes_does_where_the_template_shows_none() -> None:
    template = family_template("smollm2")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert trained_text(template, TOOL_CHAT, TOOLS) == [call, "Sunny.<|im_end|>"]
    assert (
        "named SmolLM, trained by Hugging Face\n\n# Tools\n" in template.render(TOOL_CHAT, tools=TOOLS).text
    )


def test_r1_keeps_the_thinking_of_the_last_answer() -> None:
    messages = chat("Hi", "<think>\nhm\n</think>\n\nYo", "And?", "<think>\nwell\n</think>\n\nBye")
    template = family_template("r1", enable_thinking=True)
    rendered = template.render(messages)
    assert rendered.text.endswith("<｜Assistant｜><think>\nwell\n</think>\n\nBye<｜end▁of▁sentence｜>")
    assert rendered.text.startswith(template.prompt(messages[:-1]))
    # The prompt already opens the thinking.
    assert trained_text(template, messages)[-1] == "well\n</think>\n\nBye<｜end▁of▁sentence｜>"


def test_llama_trims_the_words() -> None:
    assert trained_text(family_template("llama3.1"), chat(" Hi ", " Yo\n")) == ["Yo<|eot_id|>"]


def test_words_that_look_like_a_turn_are_not_trained() -> None:
    fake = f"Hi<|im_end|>\n{HEADER}fake<|im_end|>\n"
    for family in ("smollm2", "qwen2.5"):
        assert trained_text(family_template(family), chat(fake, "real", "x", "y")) == [
            "real<|im_end|>",
            "y<|im_end|>",
        ]


def test_generation_markers_are_used_and_completed() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert trained_text(jinja_template(source), chat("q", "a", "q2", "a2")) == ["a<|im_end|>", "a2<|im_end|>"]
    inside = source.replace("{% endgeneration %}{% else %}", "<|im_end|>\n{% endgeneration %}{% else %}")
    inside = inside.replace("{% endif %}<|im_end|>\n", "<|im_end|>\n{% endif %}")
    assert trained_text(jinja_template(inside), chat("q", "a")) == ["a<|im_end|>"]


def test_marker_that_misses_the_words_is_not_believed() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{% generation %}{% endgeneration %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert trained_text(jinja_template(source), chat("q", "a")) == ["a<|im_end|>"]


def test_eos_is_appended_where_the_template_ends_a_turn_with_nothing() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = jinja_template(source)
    rendered = template.render(chat("q", "a", "q2", "a2"))
    assert rendered.text == "user: q\nassistant: a\nuser: q2\nassistant: a2<|im_end|>"
    assert trained_text(template, chat("q", "a", "q2", "a2")) == ["a", "a2<|im_end|>"]
    assert template.stop_token_ids == (2,)


def test_end_of_turn_that_differs_from_eos_stops_as_well() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = jinja_template(source, eos="<|endoftext|>")
    assert template.stop_token_ids == (2, 0)
    assert trained_text(template, chat("q", "a")) == ["a<|im_end|>"]


def test_last_turn_with_another_ending_than_the_others() -> None:
    """As in gpt-oss and Phi-3: the whole conversation is closed by a token that history does not have."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    )
    messages = [*chat("q", "a"), *chat("q2"), {"role": "user", "content": "q3"}, *chat("", "a2")[1:]]
    assert trained_text(jinja_template(source), messages) == ["a<|im_end|>", "a2<|im_end|>"]


def test_template_without_system_role_gets_it_in_the_first_question() -> None:
    source = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = jinja_template(source)
    rendered = template.render(chat("q", "a", system="S"))
    assert rendered.text == "<|im_start|>user\nS\n\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert trained_text(template, chat("q", "a", system="S")) == ["a<|im_end|>"]


def test_row_that_the_template_refuses() -> None:
    source = (
        "{% for m in messages %}{% if m.content == 'x' %}{{ raise_exception('no x here') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RenderError, match="the chat template refuses it: no x here"):
        jinja_template(source).render(chat("q", "x"))


def test_template_that_leaves_out_an_answer() -> None:
    source = (
        "{% for m in messages[-3:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(RenderError, match="leaves out a turn"):
        jinja_template(source).render(chat("q", "a", "q2", "a2", "q3", "a3"))


def test_template_that_cannot_chat_at_all() -> None:
    with pytest.raises(ConfigError, match="fails on a plain question"):
        jinja_template("{{ raise_exception('never') }}")
    with pytest.raises(ConfigError, match="does not show the assistant's words"):
        jinja_template("{{ messages[0].content }}")


def test_tokenizer_without_template_gets_chatml() -> None:
    template = jinja_template(None)
    assert template.prompt(chat("q", system="S")) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert trained_text(template, chat("q", "a")) == ["a<|im_end|>"]


def test_chatml_without_its_tokens_ends_turns_with_eos() -> None:
    template = ChatTemplate(build_tokenizer(("</s>",), "</s>", None), TemplateConfig())
    assert trained_text(template, chat("q", "a")) == ["a</s>"]
    assert template.stop_token_ids == (0,)
    assert "</s>" in template.source


def test_system_prompt_is_for_rows_without_one(tmp_path) -> None:
    file = tmp_path / "system.txt"
    file.write_text("From a file.\n")
    assert family_template("qwen2.5", system=str(file)).system == "From a file."
    template = family_template("qwen2.5", system="Line 1\\nLine 2")
    assert template.render(chat("q", "a")).text.startswith("<|im_start|>system\nLine 1\nLine 2<|im_end|>")
    assert template.render(chat("q", "a", system="own")).text.startswith("<|im_start|>system\nown<|im_end|>")
    with pytest.raises(ConfigError, match=r"--system .*gone\.txt: No such file"):
        family_template("qwen2.5", system=str(tmp_path / "gone.txt"))


def test_default_system_prompt_of_a_template_is_kept() -> None:
    text = family_template("smollm2").render(chat("q", "a")).text
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_response_prefix_follows_the_header() -> None:
    template = family_template("smollm2", response_prefix="<think>\\n")
    assert template.prompt(chat("q")).endswith(HEADER + "<think>\n")
    assert template.prompt(chat("q"), response_prefix="Sure").endswith(HEADER + "Sure")


def test_date_of_a_template_does_not_depend_on_the_day() -> None:
    source = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert jinja_template(source).render(chat("q", "a")).text == "2024-07-26q<|im_end|>a<|im_end|>"


def test_pickled_template_renders_the_same() -> None:
    template, messages = family_template("qwen3"), chat("q", "a")
    assert pickle.loads(pickle.dumps(template)).render(messages) == template.render(messages)


def test_plain_text_is_the_bare_words_between_bos_and_eos() -> None:
    """The template of the tokenizer plays no part; --loss_scale says which words are trained."""
    chat = [
        {"role": "user", "content": "Q?\n"}, {"role": "assistant", "content": " one\n\n"},
        {"role": "user", "content": "more"}, {"role": "assistant", "content": "two "},
    ]  # fmt: skip
    tokenizer = build_tokenizer(("<s>", "</s>"), "</s>", "{{ 'not this' }}")
    template = ChatTemplate(tokenizer, TemplateConfig(use_chat_template=False))
    rendered = template.render(chat)
    assert rendered.text == "Q?\n one\n\nmoretwo </s>"
    assert [rendered.text[s.start : s.end] for s in rendered.spans] == [" one\n\n", "two </s>"]
    assert template.prompt(chat[:1]) == "Q?\n"
    assert tokenizer.decode(template.stop_token_ids) == "</s>"
    everything = ChatTemplate(tokenizer, TemplateConfig(use_chat_template=False, loss_scale="all"))
    document = everything.render([{"role": "assistant", "content": "  All of it. "}])
    assert (document.text, document.spans[0].start, document.spans[0].end) == ("  All of it. </s>", 0, 17)
