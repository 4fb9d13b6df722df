"""Answers that are answered: conversations of several turns as one row of tokens each.

Tokens are only ever appended: what the model said stays as it was sampled, and what it is told comes behind
it, as its chat template writes it there. So one forward pass trains all turns of a conversation, on exactly
what the model saw; templates that drop earlier thoughts from a history do not drop them here. Not here: what
comes next (plugins/turns.py), log-probabilities of the trainer.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from swift.config.option import ConfigError
from swift.config.turns import TurnConfig
from swift.plugins.calling import LateError, call_all, tell_error
from swift.plugins.turns import MultiTurnScheduler, TurnChoice, TurnMessage, TurnRequest, multi_turns
from swift.rollout.protocol import RolloutEngine
from swift.rollout.types import Completion, Request, Sampling, join_requests
from swift.template.chat import ChatTemplate
from swift.template.types import Message

MARK = "@@ANSWER@@"  # stands for an answer while its surroundings are written
SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of two turns


@dataclass(frozen=True, slots=True)
class Start:
    """A conversation that the model is to answer. Answer `number` draws from (`seed`, `number`)."""

    messages: Sequence[Message]
    columns: Mapping[str, Any]
    request_id: str
    place: str
    seed: int
    number: int
    tools: list[Any] | None = None


@dataclass(slots=True)
class Trajectory:
    """A conversation as tokens, prompt first. The lists beside `token_ids` are as long as it is."""

    prompt_ids: list[int]
    messages: list[Message]  # with the last answer at the end
    token_ids: list[int] = field(default_factory=list)  # what follows: answers, and what they were told
    loss_mask: list[int] = field(default_factory=list)  # 1 = sampled by the model
    logps: list[float] = field(default_factory=list)  # of the sampler; 0 where it did not sample
    finish_reason: str = "length"  # of the last answer
    num_turns: int = 0
    infos: dict[str, Any] = field(default_factory=dict)  # rollout_infos for the rewards

    @property
    def text(self) -> str:
        """The last answer, which rewards read; none was given where the prompt left no room."""
        return self.messages[-1]["content"] if self.num_turns else ""

    def append(self, token_ids: Sequence[int], logps: Sequence[float] | None = None) -> None:
        """Tokens of the model, with their `logps`, or of somebody else."""
        assert logps is None or len(logps) == len(token_ids), (len(token_ids), len(logps or ()))
        self.token_ids += token_ids
        self.loss_mask += [int(logps is not None)] * len(token_ids)
        self.logps += [0.0] * len(token_ids) if logps is None else logps

    def cut(self, length: int) -> None:
        """Forgets the tokens behind the first `length` after the prompt."""
        for values in (self.token_ids, self.loss_mask, self.logps):
            del values[length:]


def build_scheduler(config: TurnConfig, **settings: Any) -> MultiTurnScheduler:
    """The scheduler of --multi_turn_scheduler or --use_gym_env. Raises ConfigError."""
    assert config.scheduler is not None
    found = multi_turns.find(config.scheduler)
    if not inspect.isclass(found):
        raise ConfigError(
            f"--multi_turn_scheduler {config.scheduler} is no class", hint="subclass MultiTurnScheduler"
        )
    return found(max_turns=config.max_turns, gym_env=config.gym_env, **settings)


class Talk:
    """One conversation under way."""

    def __init__(
        self, start: Start, template: ChatTemplate, number: int, context: int, most_sampled: float
    ) -> None:
        """`number` tells apart conversations of one call, which may have the same row twice.

        `context`: tokens that there may be; `most_sampled`: tokens of all answers together.
        """
        self.start, self.template, self.context, self.most_sampled = start, template, context, most_sampled
        name = f"{start.request_id}/{number}"
        self.request = TurnRequest(
            copy.deepcopy(list(start.messages)), dict(start.columns), name, start.tools
        )
        self.is_open = True
        self.answer_start = 0  # where the tokens of the last assistant message begin
        self.done: list[Message] = []  # the messages as they were after the last answer, and the tokens
        self.tokens: tuple[list[int], list[int], list[float]] = ([], [], [])

    def begin(self) -> None:
        """The prompt, once the scheduler has had its say about the messages."""
        text = self.template.prompt(self.request.messages, tools=self.request.tools)
        self.trajectory = Trajectory(self._encode(text), self.request.messages)

    def room(self) -> int:
        """Tokens that an answer may have behind what there is."""
        free = self.context - len(self.trajectory.prompt_ids) - len(self.trajectory.token_ids)
        return int(min(free, self.most_sampled - sum(self.trajectory.loss_mask)))

    def take(self, completion: Completion) -> TurnChoice:
        """Adds an answer, to a message of its own or to the one that it goes on with."""
        messages, trajectory = self.request.messages, self.trajectory
        if messages[-1]["role"] != "assistant":
            self.answer_start = len(trajectory.token_ids)
            messages.append({"role": "assistant", "content": self.template.response_prefix})
        messages[-1] = {**messages[-1], "content": messages[-1]["content"] + completion.text}
        trajectory.append(completion.token_ids, completion.logps)
        trajectory.finish_reason = completion.finish_reason
        trajectory.num_turns += 1
        self.done = copy.deepcopy(messages)
        self.tokens = (trajectory.token_ids[:], trajectory.loss_mask[:], trajectory.logps[:])
        return TurnChoice(TurnMessage(completion.text), completion.finish_reason, list(completion.token_ids))

    def close_if_full(self) -> None:
        """Ends it where no answer fits behind what it was told, which is then taken back."""
        if not self.is_open or self.room() > 0:
            return
        self.is_open = False
        if self.done:
            trajectory = self.trajectory
            trajectory.messages, trajectory.finish_reason = self.done, "length"
            trajectory.token_ids, trajectory.loss_mask, trajectory.logps = self.tokens

    def go_on(self, stepped: Any) -> str | None:
        """Appends what the scheduler made of the messages; why that cannot be, if it cannot."""
        if isinstance(stepped, dict):
            unknown = stepped.keys() - {"infer_request", "rollout_infos"}
            if unknown:
                return f"step gave {', '.join(sorted(unknown))}: tokens and masks are kept here"
            self.request = stepped.get("infer_request", self.request)
        messages, done = self.request.messages, self.done
        last = len(done) - 1
        self.trajectory.messages = messages
        if messages[:last] != done[:last] or len(messages) <= last:
            return "step changed an earlier message, which the model has already read"
        if messages[last] != done[last]:
            if len(messages) > len(done) or messages[last]["role"] != "assistant":
                return "step changed the answer and added messages behind it"
            return self._replace_end(messages[last]["content"])
        if messages[-1]["role"] == "assistant":
            return "step added no message for the model to answer"
        return self._append_messages(last)

    def _append_messages(self, last: int) -> str | None:
        """The text from the end of the last answer to the beginning of the next."""
        shown = [*self.request.messages]
        shown[last] = {"role": "assistant", "content": MARK}
        text = self.template.prompt(shown, tools=self.request.tools)
        _, found, behind = text.rpartition(MARK)
        if not found:
            return "the model's chat template does not show an earlier answer"
        ended = self.trajectory.token_ids[-1:]
        if ended and ended[0] in self.template.stop_token_ids:
            behind = behind.removeprefix(self.template.tokenizer.decode(ended, skip_special_tokens=False))
        self.trajectory.append(self._encode(behind))
        return None

    def _replace_end(self, content: str) -> str | None:
        """Cuts the last answer where `content` leaves it, and appends the rest of `content`."""
        given = content.removeprefix(self.template.response_prefix)
        tokens = self.trajectory.token_ids[self.answer_start :]
        kept, text = len(tokens), ""
        while kept:  # the longest part of its tokens that `content` begins with
            text = self.template.tokenizer.decode(tokens[:kept], skip_special_tokens=True)
            if given.startswith(text) and "\N{REPLACEMENT CHARACTER}" not in text:
                break
            kept -= 1
        self.trajectory.cut(self.answer_start + kept)
        self.trajectory.append(self._encode(given[len(text) if kept else 0 :]))
        return None

    def _encode(self, text: str) -> list[int]:
        return self.template.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class Turns:
    """How conversations go on after an answer; methods of the scheduler are called for many at once."""

    scheduler: MultiTurnScheduler
    name: str  # of the scheduler, in messages
    template: ChatTemplate
    context: int  # tokens that a conversation may have
    timeout_seconds: float  # for all conversations' calls of one method
    limits_all: bool = False  # the longest answer is that of all turns together

    def call(self, hook: str, arguments: Sequence[tuple[Any, ...]], talks: Sequence[Talk]) -> list[Any]:
        """What the method `hook` gives for each tuple of arguments. Raises ConfigError."""
        method = getattr(self.scheduler, hook)
        place = f"{talks[0].start.place} to {talks[-1].start.place}" if talks else "no rows"
        where = f"--multi_turn_scheduler {self.name}: {hook}, {place}"
        try:
            return call_all([partial(method, *given) for given in arguments], self.timeout_seconds)
        except LateError:
            raise ConfigError(f"{where}: not done after {self.timeout_seconds:g} s") from None
        except ConfigError:
            raise
        except Exception as error:  # a plugin is a stranger's program
            file = inspect.getsourcefile(type(self.scheduler)) or ""
            raise ConfigError(f"{where}: {tell_error(error, file)}") from error


def run_turns(
    engine: RolloutEngine,
    starts: Sequence[Start],
    turns: Turns,
    *,
    sampling: Sampling,
    collect: Callable[[Any], list[Any]] = lambda value: [value],
) -> list[Trajectory]:
    """Conversations to their ends, in order. Every rank calls it, with starts of its own or none.

    `collect`: the value of every rank. Raises ConfigError, on all ranks when a scheduler fails on one: there
    the others are told where they ask whether to go on, or where next they look for errors of others.
    """
    most = sampling.max_tokens if turns.limits_all else math.inf
    talks = [Talk(start, turns.template, number, turns.context, most) for number, start in enumerate(starts)]
    told: list[ConfigError] = []

    def any_rank(here: bool) -> bool:
        found = collect(here)
        told.extend(value for value in found if isinstance(value, ConfigError))
        if told:
            raise told[0]
        return any(found)

    try:
        _run(engine, talks, turns, sampling, any_rank)
    except ConfigError as error:
        if not told:
            collect(error)
        raise
    return [talk.trajectory for talk in talks]


def _run(
    engine: RolloutEngine,
    talks: Sequence[Talk],
    turns: Turns,
    sampling: Sampling,
    any_rank: Callable[[bool], bool],
) -> None:
    everything = [([talk.request for talk in talks],)] if talks else []
    turns.call("on_trajectory_start", everything, talks)
    for talk in talks:
        talk.begin()
        talk.close_if_full()
    turn = 0
    while any_rank(any(talk.is_open for talk in talks)):
        turn += 1
        going = [talk for talk in talks if talk.is_open]
        answers = engine.generate(list_requests(going, sampling, turn))
        flat = [answer for many in answers for answer in many]
        choices = [talk.take(answer) for talk, answer in zip(going, flat, strict=True)]
        _continue(turns, going, choices, turn)
        for talk in going:
            talk.close_if_full()
    turns.call("on_trajectory_end", everything, talks)
    for talk in talks:
        talk.trajectory.infos["num_turns"] = talk.trajectory.num_turns


def list_requests(talks: Sequence[Talk], sampling: Sampling, turn: int) -> list[Request]:
    requests = []
    for talk in talks:
        ids = talk.trajectory.prompt_ids + talk.trajectory.token_ids
        asked = replace(
            sampling,
            seed=(talk.start.seed + (turn - 1) * SEED_STEP) % 2**63,
            max_tokens=min(sampling.max_tokens, talk.room()),
        )
        requests.append(Request(ids, asked, first=talk.start.number))
    return join_requests(requests)


def _continue(turns: Turns, talks: Sequence[Talk], choices: Sequence[TurnChoice], turn: int) -> None:
    """Asks the scheduler what becomes of each conversation, and does it."""
    arguments = [(talk.request, choice, turn) for talk, choice in zip(talks, choices, strict=True)]
    ended = [result or {} for result in turns.call("on_turn_end", arguments, talks)]
    finished = turns.call("check_finished", arguments, talks)
    limit = turns.scheduler.max_turns
    for talk, result, is_finished in zip(talks, ended, finished, strict=True):
        talk.trajectory.infos |= result.get("rollout_infos") or {}
        talk.is_open = not (result.get("done") or is_finished or (limit is not None and turn >= limit))
    going = [i for i, talk in enumerate(talks) if talk.is_open]
    stepped = turns.call("step", [arguments[i] for i in going], [talks[i] for i in going])
    for i, result in zip(going, stepped, strict=True):
        talk = talks[i]
        if isinstance(result, dict):
            talk.trajectory.infos |= result.get("rollout_infos") or {}
        problem = talk.go_on(result)
        if problem:
            raise ConfigError(f"--multi_turn_scheduler {turns.name}: {talk.start.place}: {problem}")
