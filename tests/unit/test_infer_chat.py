"""The chat: a scripted keyboard against an engine that repeats what it was asked."""

import io
import json
from collections.abc import Callable, Iterator

import pytest

from swift.config.generation import GenerationConfig
from swift.infer import chat as chat_module
from swift.infer.chat import BANNER, Chat
from swift.infer.engine import Completion, PromptTooLong

RULE = "-" * 50


class Parrot:
    """Answers `re: <question>` in pieces and remembers what it was asked."""

    def __init__(self, finish_reason: str = "stop") -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.seeds: list[int] = []
        self.finish_reason = finish_reason

    def stream(self, messages, sampling) -> Iterator[str]:
        self.asked.append([(m["role"], m["content"]) for m in messages])
        self.seeds.append(sampling.seed)
        if messages[-1]["content"] == "too long":
            raise PromptTooLong("the conversation has 9 tokens, the context holds 8", hint="clear")
        return self._pieces(messages[-1]["content"])

    def _pieces(self, question: str) -> Iterator[str]:
        yield "re: "
        if question == "interrupt":
            raise KeyboardInterrupt
        yield question
        return Completion(f"re: {question}", [1, 2], self.finish_reason, 3, [])


class Session:
    """Runs a chat on `lines`; an exception among them is raised by the keyboard."""

    def __init__(self, *lines, engine: Parrot | None = None, **options) -> None:
        self.prompts: list[str] = []
        self.notices: list[str] = []
        self.engine = engine or Parrot()
        self.output = io.StringIO()
        self.lines = iter(lines)
        sampling = GenerationConfig(stream=options.pop("stream", None), seed=7)
        self.chat = Chat(self.engine, sampling, read=self.read, output=self.output, **options)
        self.chat.run()
        self.left = list(self.lines)

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self.lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def notices(monkeypatch) -> list[str]:
    seen: list[str] = []
    for name in ("say", "warn"):
        monkeypatch.setattr(chat_module, name, seen.append)
    return seen


def test_a_turn_shows_the_answer_and_a_rule(notices) -> None:
    session = Session("hello", "exit", "never read")
    assert session.output.getvalue() == f"re: hello\n{RULE}\n"
    assert session.prompts == ["<<< ", "<<< "]
    assert session.left == ["never read"]
    assert notices == list(BANNER)


def test_history_grows_and_every_turn_has_its_own_seed(notices) -> None:
    session = Session("one", "two", "quit")
    history = [("user", "one"), ("assistant", "re: one")]
    assert session.engine.asked == [history[:1], [*history, ("user", "two")]]
    assert session.engine.seeds == [7, 8]


def test_clear_forgets_and_blank_lines_are_no_question(notices) -> None:
    session = Session("one", "", "   ", "CLEAR ", "two", "Exit")
    assert session.engine.asked == [[("user", "one")], [("user", "two")]]


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_the_end_of_the_input_ends_politely(notices, end) -> None:
    assert Session("one", end).output.getvalue() == f"re: one\n{RULE}\n\n"


def test_reset_system_takes_the_next_input_and_default_system_restores(notices) -> None:
    session = Session("one", "reset-system", "Be brief.", "two", "reset-system", "default-system", "three")
    assert session.prompts == ["<<< ", "<<< ", "<<<[S] ", "<<< ", "<<< ", "<<<[S] ", "<<< ", "<<< "]
    assert session.engine.asked == [
        [("user", "one")],
        [("system", "Be brief."), ("user", "two")],
        [("user", "three")],
    ]


def test_multi_line_entries_end_with_a_hash(notices) -> None:
    session = Session(
        "multi-line", "a", "", "b#", "reset-system", "Be", "brief. #", "#", "c #", "single-line", "d"
    )
    assert session.prompts == [
        "<<< ", "<<<[M] ", "", "", "<<<[M] ", "<<<[MS] ", "", "<<<[M] ", "<<<[M] ", "<<<[M] ", "<<< ", "<<< ",
    ]  # fmt: skip
    assert [asked[-1] for asked in session.engine.asked] == [
        ("user", "a\n\nb"),
        ("user", "c "),
        ("user", "d"),
    ]
    assert session.engine.asked[1][0] == ("system", "Be\nbrief. ")


@pytest.mark.parametrize("command", ["quit", "exit", "quit#", "QUIT"])
def test_multi_line_mode_can_be_left_without_a_hash(notices, command) -> None:
    session = Session("multi-line", command, "never read")
    assert session.left == ["never read"]
    assert session.engine.asked == []


def test_a_command_inside_a_multi_line_entry_is_text(notices) -> None:
    session = Session("multi-line", "run this:", "exit", "#", "quit")
    assert session.engine.asked == [[("user", "run this:\nexit\n")]]


def test_the_end_of_the_input_closes_an_open_entry(notices) -> None:
    assert Session("multi-line", "a", "b").engine.asked == [[("user", "a\nb")]]


def test_a_tool_answers_as_a_tool(notices) -> None:
    session = Session("weather?", 'tool: {"c": 20}')
    assert session.engine.asked[1][-1] == ("tool", '{"c": 20}')


def test_no_think_is_the_models_business(notices) -> None:
    assert Session("hi /no_think").engine.asked == [[("user", "hi /no_think")]]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(notices, tmp_path) -> None:
    path = tmp_path / "result.jsonl"
    session = Session("interrupt", "on", result_path=path)
    assert session.output.getvalue() == f"re: \n{RULE}\nre: on\n{RULE}\n\n"
    assert session.engine.asked[1] == [("user", "interrupt"), ("assistant", "re: "), ("user", "on")]
    assert "answer stopped" in notices
    assert [json.loads(line)["response"] for line in path.read_text().splitlines()] == ["re: on"]


def test_a_question_that_cannot_be_asked_leaves_the_history_alone(notices) -> None:
    session = Session("one", "too long", "two")
    assert session.engine.asked[2] == [("user", "one"), ("assistant", "re: one"), ("user", "two")]
    assert notices[-1] == "the conversation has 9 tokens, the context holds 8 (clear)"


def test_a_cut_answer_says_so(notices) -> None:
    Session("one", engine=Parrot("length"))
    assert notices[-1] == "answer cut after 2 tokens"


@pytest.mark.parametrize(("stream", "writes"), [(None, 2), (True, 2), (False, 1)])
def test_answers_are_shown_whole_without_stream(
    notices, monkeypatch, stream: bool | None, writes: int
) -> None:
    written: list[str] = []
    record: Callable[[Chat, str], None] = lambda _, text: written.append(text)  # noqa: E731
    monkeypatch.setattr(Chat, "_write", record)
    Session("one", stream=stream)
    assert "".join(written) == f"re: one\n{RULE}\n\n"
    assert len(written) == writes + 2


def test_turns_are_kept_as_rows(notices, tmp_path) -> None:
    path = tmp_path / "result.jsonl"
    Session("reset-system", "Be brief.", "one", "two", result_path=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "re: one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "re: two"},
    ]
    media = {"images": [], "audios": [], "videos": []}
    assert rows == [
        {"response": "re: one", "messages": messages[:3], **media},
        {"response": "re: two", "messages": messages, **media},
    ]
