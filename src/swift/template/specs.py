"""Texts of our own, as data: a chat template for tokenizers that ship none, and what is told about tools."""

_CHATML = """\
{{ '@OPENING@' }}{% for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '@END@' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

_PLAIN_TEXT = """{{- '@OPENING@' }}{% for message in messages %}{{ message['content'] }}{% endfor %}\
{%- if not add_generation_prompt %}{{ '@END@' }}{% endif %}"""


def chatml(end_of_turn: str, *, opening: str = "") -> str:
    """Jinja source of ChatML with the given end of a turn; it names no variables, so any tool can use it.

    Source: https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
    """
    return _fill(_CHATML, opening, end_of_turn)


def plain_text(end: str, *, opening: str = "") -> str:
    """Jinja source of the bare text of all messages, one after another: `end` is the token that ends it."""
    return _fill(_PLAIN_TEXT, opening, end)


def _fill(source: str, opening: str, end: str) -> str:
    for name, value in (("@OPENING@", opening), ("@END@", end)):
        source = source.replace(name, value.replace("\\", "\\\\").replace("'", "\\'"))
    return source


# What models are told about tools (agents.py). @TOOLS@ = their descriptions, @NAMES@ = their names.

_SIGNATURES = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
@TOOLS@
</tools>

"""

# As in the templates of Qwen2.5 and Qwen3.
HERMES_TOOLS = (
    _SIGNATURES
    + """\
For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
)

# As in the template of Qwen3-Coder, with the tools as JSON.
QWEN_CODER_TOOLS = """\
# Tools

You have access to the following functions:

<tools>
@TOOLS@
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>"""

# As in the template of GLM-4.5.
GLM_TOOLS = (
    _SIGNATURES
    + """\
For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
<arg_key>{arg-key-2}</arg_key>
<arg_value>{arg-value-2}</arg_value>
...
</tool_call>"""
)

# As in the template of Llama 3.1.
LLAMA_TOOLS = """\
Given the following functions, please respond with a JSON for a function call with its proper arguments that \
best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. \
Do not use variables.

@TOOLS@"""

# The form of https://arxiv.org/abs/2210.03629.
REACT_EN = """\
Answer the question with the help of these tools. The arguments of a tool are a JSON object.

@TOOLS@

Write in this form:

Thought: what to do next
Action: the tool to use, one of [@NAMES@]
Action Input: its arguments
Observation: what the tool returns
... (these four lines as often as needed)
Thought: I now know the final answer
Final Answer: the answer to the question"""

REACT_ZH = """\
借助下列工具回答问题。工具的参数是一个 JSON 对象。

@TOOLS@

请按以下格式书写：

Thought: 接下来做什么
Action: 要使用的工具，必须是 [@NAMES@] 之一
Action Input: 工具的参数
Observation: 工具返回的结果
……（以上四行可以重复多次）
Thought: 我现在知道最终答案了
Final Answer: 问题的答案"""
