"""What a chat template does with a plain conversation, learnt once by rendering made-up words.

Owns: the end-of-turn token, the assistant's header, the fixed text between turns, and what the template
cannot do.
Not here: real rows (turns.py), which never rely on this alone: every use is checked against the rendered
text.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from swift.config.option import ConfigError
from swift.template.jinja import Renderer
from swift.template.types import Message, RenderError

# Words that no template treats specially and no special token contains.
_SYSTEM, _USER, _ANSWER, _USER_2, _ANSWER_2 = "zqsystem", "zquser", "zqanswer", "zqmore", "zqend"
_SAID_BY = {_SYSTEM: "system", _USER: "user", _USER_2: "user"}
_REASON = "zqreason"


@dataclass(frozen=True, slots=True)
class Joints:
    """The fixed text around the words of a conversation of user and assistant in turns."""

    opening: str  # before the first user's words where there is no system message
    before_system: str
    after_system: str  # from the system's words to the first user's
    to_answer: str  # from a user's words to an answer that is not the last
    to_last_answer: str
    to_user: str  # from an answer to the next user's words
    answer_start: int  # characters of to_answer that a prompt for this answer ends with
    last_answer_start: int  # the same for to_last_answer


@dataclass(frozen=True, slots=True)
class Shape:
    """Facts about one template with one tokenizer."""

    special: re.Pattern[str]  # any special token
    eos: str | None
    header: str  # what stands between a user's turn and an answer: "<|im_start|>assistant\n"
    closing: str  # what stands after the last answer: "<|im_end|>\n"
    end_of_turn: str | None  # the first special token in `closing`; none = answers end with nothing
    folds_system: bool  # no system messages here: their text goes before the first user's
    keeps_reasoning: bool  # shows <think>...</think> of the last answer
    joints: Joints | None  # none = the template is not a plain row of turns

    @property
    def default_system(self) -> str:
        """The system prompt that the template adds by itself, as Qwen2.5's does."""
        joints = self.joints
        if joints is None or not joints.opening.startswith(joints.before_system):
            return ""
        words = joints.opening[len(joints.before_system) :]
        return words.removesuffix(joints.after_system) if words.endswith(joints.after_system) else ""

    def closed(self, position: int, tail: str) -> int:
        """The end of a turn whose words end at `position`, before `tail`: after its end-of-turn token."""
        match = self.special.search(tail) if self.end_of_turn else None
        return position + (match.end() if match else 0)


def learn_shape(renderer: Renderer, special_tokens: Iterable[str], eos: str | None) -> Shape:
    """Renders a few made-up conversations. Raises ConfigError where the plainest one fails."""
    special = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or "(?!)")
    try:
        single = renderer.text(_chat(_USER, _ANSWER))
        double = renderer.text(_chat(_USER, _ANSWER, _USER_2))
        lone = renderer.text(_chat(_USER))
    except RenderError as error:
        raise ConfigError(
            f"the model's chat template fails on a plain question and answer: {error}"
        ) from error
    if _ANSWER not in single or _ANSWER not in double:
        raise ConfigError("the model's chat template does not show the assistant's words")
    before_answer = double[: double.index(_ANSWER)]
    words_end = before_answer.index(_USER) + len(_USER)
    header = before_answer[len(lone) :] if before_answer.startswith(lone) else before_answer[words_end:]
    closing = single[single.index(_ANSWER) + len(_ANSWER) :]
    match = special.search(closing)
    return Shape(
        special=special,
        eos=eos,
        header=header,
        closing=closing,
        end_of_turn=match.group() if match else None,
        folds_system=_SYSTEM not in _try(renderer, _chat(_SYSTEM, _USER)),
        keeps_reasoning=_REASON in _try(renderer, _chat(_USER, f"<think>\n{_REASON}\n</think>\n\nyes")),
        joints=_learn_joints(renderer, closing),
    )


def _learn_joints(renderer: Renderer, closing: str) -> Joints | None:
    words = (_USER, _ANSWER, _USER_2, _ANSWER_2)
    plain = _cut(_try(renderer, _chat(*words)), *words)
    with_system = _cut(_try(renderer, _chat(_SYSTEM, *words)), _SYSTEM, *words)
    prompt = _cut(_try(renderer, _chat(_USER), add_generation_prompt=True), _USER)
    if plain is None or with_system is None or prompt is None:
        return None
    opening, to_answer, to_user, to_last_answer, end = plain
    if with_system[2:] != plain[1:] or end != closing or prompt[0] != opening:
        return None
    starts = [_common_start(prompt[1], joint) for joint in (to_answer, to_last_answer)]
    if None in starts:
        return None
    return Joints(opening, with_system[0], with_system[1], to_answer, to_last_answer, to_user, *starts)


def _common_start(prompt: str, joint: str) -> int | None:
    """Where the answer starts in `joint`: after the prompt, or at its end where the prompt goes on."""
    if joint.startswith(prompt):
        return len(prompt)
    return len(joint) if prompt.startswith(joint) else None


def _cut(text: str, *words: str) -> list[str] | None:
    """The pieces of `text` between the words; none where a word is missing, repeated or out of order."""
    pieces = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _try(renderer: Renderer, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
    try:
        return renderer.text(messages, add_generation_prompt=add_generation_prompt)
    except RenderError:
        return ""


def _chat(*words: str) -> list[Message]:
    return [{"role": _SAID_BY.get(text, "assistant"), "content": text} for text in words]
