"""`swift infer` at a prompt: a conversation with history, commands, and answers as they come.

Prompts and answers go to the output, everything else to the log, so that a piped session holds only the talk.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from swift.config.generation import GenerationConfig
from swift.config.option import ConfigError
from swift.infer.engine import Completion, TransformersInferEngine
from swift.template.types import Message, RenderError
from swift.utils.files import append_jsonl
from swift.utils.log import say, warn

BANNER = (
    "Input `exit` or `quit` to exit the conversation.",
    "Input `multi-line` to switch to multi-line input mode.",
    "Input `reset-system` to reset the system and clear the history.",
    "Input `clear` to clear the history.",
)
COMMANDS = ("clear", "reset-system", "default-system", "multi-line", "single-line", "exit", "quit")
RULE = "-" * 50
END_OF_ENTRY = "#"  # closes an entry in multi-line mode
TOOL = "tool:"  # an entry that starts so is a tool's answer


@dataclass(slots=True)
class Chat:
    """One session. `read` shows a prompt and returns a line, as `input` does; EOFError is the end."""

    engine: TransformersInferEngine
    sampling: GenerationConfig
    read: Callable[[str], str]
    output: TextIO
    result_path: Path | None = None
    system: str | None = None  # None = the one that the run was started with
    messages: list[Message] = field(default_factory=list)
    num_answers: int = 0
    multi_line: bool = False
    wants_system: bool = False  # the next entry is a system prompt

    def run(self) -> None:
        """Until `exit`, `quit`, the end of the input, or Ctrl-C at the prompt."""
        for line in BANNER:
            say(line)
        while True:
            try:
                entry = self._read_entry()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")  # the shell's prompt starts on a line of its own
                return
            command = entry.strip().lower()
            if command in ("exit", "quit"):
                return
            if command in COMMANDS:
                self._obey(command)
            elif self.wants_system:
                self._set_system(entry, "system prompt set")
            elif command:
                self._answer(entry)

    def _read_entry(self) -> str:
        """One line, or in multi-line mode all lines up to one that ends with `#`.

        A command alone on the first line needs no `#`: whoever forgot the mode can still leave it.
        """
        mode = ("M" if self.multi_line else "") + ("S" if self.wants_system else "")
        line = self.read(f"<<<[{mode}] " if mode else "<<< ")
        if not self.multi_line or line.strip().lower() in COMMANDS:
            return line
        lines: list[str] = []
        while not line.rstrip().endswith(END_OF_ENTRY):
            lines.append(line)
            try:
                line = self.read("")
            except EOFError:
                if not any(text.strip() for text in lines):
                    raise
                return "\n".join(lines)  # the end of a piped file; the next read ends the session
        return "\n".join([*lines, line.rstrip().removesuffix(END_OF_ENTRY)])

    def _obey(self, command: str) -> None:
        if command == "clear":
            self.messages = []
            say("history cleared")
        elif command == "reset-system":
            self.wants_system = True
            say("The next input is the new system prompt; `default-system` restores the first one.")
        elif command == "default-system":
            self._set_system(None, "default system prompt restored")
        else:
            self.multi_line = command == "multi-line"
            if self.multi_line:
                say("End the input with a line that ends with `#`; `single-line` switches back.")

    def _set_system(self, text: str | None, done: str) -> None:
        self.system, self.messages, self.wants_system = text, [], False
        say(f"{done}, history cleared")

    def _write(self, text: str) -> None:
        self.output.write(text)
        self.output.flush()

    def _answer(self, entry: str) -> None:
        """One turn. What cannot be answered leaves the history as it was."""
        is_tool = entry.startswith(TOOL)
        question: Message = {
            "role": "tool" if is_tool else "user",
            "content": entry.removeprefix(TOOL).strip() if is_tool else entry,
        }
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        sampling = replace(self.sampling, seed=self.sampling.seed + self.num_answers)
        try:
            text, completion = self._generate([*system, *self.messages, question], sampling)
        except (ConfigError, RenderError) as error:
            hint = error.hint if isinstance(error, ConfigError) and error.hint else None
            warn(f"{error} ({hint})" if hint else str(error))
            return
        self.num_answers += 1
        self._write(("" if text.endswith("\n") else "\n") + RULE + "\n")
        if not completion:
            say("answer stopped")
        elif completion.finish_reason == "length":
            say(f"answer cut after {completion.num_generated_tokens} tokens")
        if completion or text:
            self.messages += [question, {"role": "assistant", "content": text}]
        if completion and self.result_path:  # an interrupted answer is no data
            row = {"response": text, "messages": [*system, *self.messages]}
            append_jsonl(self.result_path, [row | {"images": [], "audios": [], "videos": []}])

    def _generate(self, messages: list[Message], sampling: GenerationConfig) -> tuple[str, Completion | None]:
        """The text that was shown, and the completion unless Ctrl-C stopped it."""
        pieces: list[str] = []
        streams = sampling.stream is not False
        with closing(self.engine.stream(messages, sampling)) as stream:
            try:
                while True:
                    pieces.append(next(stream))
                    if streams:
                        self._write(pieces[-1])
            except StopIteration as end:
                completion: Completion | None = end.value
            except KeyboardInterrupt:
                completion = None
        text = "".join(pieces)
        if not streams:
            self._write(text)
        return text, completion
