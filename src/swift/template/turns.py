"""Finds the assistant's words in a rendered conversation, exactly or not at all.

Owns: four ways to find them, each checked against the text: the template's own generation markers; the fixed
text around turns; rendering up to a turn; rendering with a turn's words replaced. Not here: which turns are
trained (loss_scale.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swift.template.jinja import Renderer
from swift.template.shape import Shape
from swift.template.types import Message, RenderError

_MARK = "zqmarkqz"

# [start, end) of one answer in the text: from what the model is asked to continue to its end-of-turn token.
Turn = tuple[int, int]


def find_turns(
    renderer: Renderer, shape: Shape, messages: Sequence[Message], tools: list[Any] | None
) -> tuple[str, list[Turn]]:
    """The rendered text and one turn per assistant message, ascending. Raises RenderError."""
    turns = None
    if renderer.has_markers:
        text, blocks = renderer.marked(messages, tools)
        turns = _turns_from_markers(shape, messages, text, blocks)
    else:
        text = renderer.text(messages, tools)
    _check_tools(messages, tools, text)
    if turns is None and not tools:
        turns = _turns_from_joints(shape, messages, text)
    chat = _Chat(renderer, shape, messages, tools, text)
    if turns is None:
        turns = [chat.locate(i) for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or messages[-1]["role"] != "assistant":
        return text, turns
    last = messages[-1]
    if not shape.keeps_reasoning and "</think>" in last["content"] and "tool_calls" not in last:
        text, turns[-1] = chat.restore_reasoning(turns[-1])
    if shape.end_of_turn is None and shape.eos:
        start, end = turns[-1]
        text = text[:end] + shape.eos
        turns[-1] = (start, len(text))
    return text, turns


def _turns_from_markers(
    shape: Shape, messages: Sequence[Message], text: str, blocks: Sequence[Turn]
) -> list[Turn] | None:
    """Turns from `{% generation %}` blocks, where there is one per answer and it holds the answer's words."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(answers) != len(blocks):
        return None
    turns = []
    for message, (start, end) in zip(answers, blocks, strict=True):
        if message["content"].split("</think>")[-1].strip() not in text[start:end]:
            return None
        end = start + len(text[start:end].rstrip("\n"))
        following = shape.special.match(text, end)
        if shape.end_of_turn and following and not text.endswith(shape.end_of_turn, start, end):
            end = following.end()
        turns.append((start, end))
    return turns


def _turns_from_joints(shape: Shape, messages: Sequence[Message], text: str) -> list[Turn] | None:
    """Turns of a plain conversation, put together from the words and joints and compared with `text`."""
    joints, first = shape.joints, int(messages[0]["role"] == "system")
    if joints is None or len(messages) == first or (len(messages) - first) % 2:
        return None
    lead = joints.before_system + messages[0]["content"] + joints.after_system if first else joints.opening
    pieces: list[str] = []
    turns: list[Turn] = []
    position = 0
    for i in range(first, len(messages), 2):
        user, answer = messages[i], messages[i + 1]
        if user["role"] != "user" or answer["role"] != "assistant":
            return None
        is_last = i + 2 == len(messages)
        joint, joint_start, tail = (
            (joints.to_last_answer, joints.last_answer_start, shape.closing)
            if is_last
            else (joints.to_answer, joints.answer_start, joints.to_user)
        )
        pieces += (lead, user["content"], joint, answer["content"])
        start = position + len(lead) + len(user["content"]) + joint_start
        position = start - joint_start + len(joint) + len(answer["content"])
        turns.append((start, shape.closed(position, tail)))
        lead = joints.to_user
    pieces.append(shape.closing)
    return turns if "".join(pieces) == text else None


@dataclass(frozen=True, slots=True)
class _Chat:
    renderer: Renderer
    shape: Shape
    messages: Sequence[Message]
    tools: list[Any] | None
    text: str

    def locate(self, i: int) -> Turn:
        """The turn of message i: by rendering up to it if that gives a prefix, else by a marked copy."""
        closing = self.shape.closing
        start = self._prefix_length(self.messages[:i], self.text, add_generation_prompt=True)
        end = self._prefix_length(self.messages[: i + 1], self.text)
        if end is not None:
            ends_here = self.text.endswith(closing, 0, end)
            end = self.shape.closed(end - len(closing), closing) if ends_here else None
        if start is None or end is None:
            marked_start, marked_end = self._locate_by_mark(i)
            start = marked_start if start is None else start
            end = marked_end if end is None else end
        if start > end:
            raise RenderError("the place of an answer in the rendered text is not clear")
        return start, end

    def restore_reasoning(self, turn: Turn) -> tuple[str, Turn]:
        """The last answer with its <think> part, which templates for inference drop (DeepSeek-R1-Distill).

        The model is asked to continue after the prompt, so prompt, answer and end of turn are what it has to
        learn.
        """
        (start, end), size = turn, len(self.shape.end_of_turn or "")
        words = self.messages[-1]["content"].strip()
        text = self.text[:start] + words + self.text[end - size :]
        prompt = self._prefix_length(self.messages[:-1], text, add_generation_prompt=True)
        return text, (start if prompt is None else prompt, start + len(words) + size)

    def _prefix_length(
        self, messages: Sequence[Message], text: str, *, add_generation_prompt: bool = False
    ) -> int | None:
        try:
            prefix = self.renderer.text(messages, self.tools, add_generation_prompt=add_generation_prompt)
        except RenderError:  # some templates refuse a conversation that ends here
            return None
        return len(prefix) if text.startswith(prefix) else None

    def _locate_by_mark(self, i: int) -> Turn:
        """The turn of message i, by rendering it with a mark in its place.

        What stands before and after the mark must be the same in both texts. The answer starts after the last
        header before the mark, because templates also add to or take from the beginning of an answer (Qwen3's
        thinking).
        """
        message, shape, text = self.messages[i], self.shape, self.text
        calls = message.get("tool_calls")
        if calls:
            *before_it, call = calls
            marked_call = {**call, "function": {**call["function"], "name": _MARK}}
            replaced = {**message, "tool_calls": [*before_it, marked_call]}
        else:
            replaced = {**message, "content": _MARK}
        marked = self.renderer.text([*self.messages[:i], replaced, *self.messages[i + 1 :]], self.tools)
        before, found, after = marked.partition(_MARK)
        if not found or _MARK in after:
            raise RenderError("the chat template leaves out a turn of the assistant")
        header = before.rfind(shape.header)
        start, words_end = header + len(shape.header), len(text) - len(after)
        if header < 0 or words_end < start or not text.endswith(after) or text[:start] != marked[:start]:
            raise RenderError("the place of an answer in the rendered text is not clear")
        if not calls:
            return start, shape.closed(words_end, after)
        # Other special tokens may stand inside a tool call, so here only the turn's own end counts.
        end = text.find(shape.end_of_turn, words_end) if shape.end_of_turn else -1
        return start, end + len(shape.end_of_turn or "") if end >= 0 else words_end


def _check_tools(messages: Sequence[Message], tools: list[Any] | None, text: str) -> None:
    """Raises RenderError where the template has no place for tools, or for calls of them."""
    for tool in tools or ():
        if str(tool.get("function", tool).get("name")) not in text:
            raise RenderError("the chat template does not show tools to the model")
    for message in messages:
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise RenderError("the chat template leaves out calls of tools")
