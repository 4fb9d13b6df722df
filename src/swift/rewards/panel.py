"""The rewards of a run: found by name, handed what they ask for, run side by side, their answers checked.

Functions run in threads: rewards wait for servers and sandboxes more than they compute, and they hold and
change what no other process could take over. The first of the user's own, and each whose file imports
signal or math-verify, has the main thread, where alone these work. Coroutines share one event loop that
stays, because clients belong to the loop that they were made in.
"""

import inspect
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from swift.config.option import ConfigError
from swift.config.rewards import RewardConfig
from swift.plugins.calling import LateError, run_here, start_coroutine, start_thread, take_result, tell_error
from swift.plugins.hooks import orms
from swift.rewards.builtin import GymReward
from swift.template.types import Message

NEEDS_MAIN = re.compile(r"^\s*(import|from)\b.*\b(signal|math_verify|latex2sympy\w*)\b", re.MULTILINE)
SEARCH_SECONDS = 10.0  # to find the one row that a reward cannot judge


class RewardError(ConfigError):
    """A reward that raises, is late, or answers with something else than a number for each completion."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is judged."""

    text: str  # with the response prefix, without the token that ended it
    messages: Sequence[Message]  # the conversation, with the answer at its end
    columns: Mapping[str, Any]  # the row's other columns
    token_ids: Sequence[int]
    finish_reason: str  # "stop" or "length"
    prompt_id: str
    request_id: str
    place: str  # "data.jsonl line 3"
    rollout_infos: Mapping[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """A reward that is no function, such as a model; it is run where the panel is called."""

    name: str  # in metrics

    def judge(self, answers: Sequence[Answer]) -> Sequence[float | None]: ...


def build_columns(
    answers: Sequence[Answer], trainer_state: Any = None, expected: Sequence[str] = ()
) -> dict[str, Any]:
    """What rewards get by keyword: columns of the rows as lists, None where a row lacks one, and our own.

    `expected`: columns that are there even if none of these rows has them.
    """
    names = dict.fromkeys([*expected, *(name for answer in answers for name in answer.columns)])
    columns: dict[str, Any] = {name: [a.columns.get(name) for a in answers] for name in names}
    columns.pop("completions", None)
    return columns | {
        "messages": [list(a.messages) for a in answers],
        "prompt_id": [a.prompt_id for a in answers],
        "request_id": [a.request_id for a in answers],
        "finish_reason": [a.finish_reason for a in answers],
        "is_truncated": [a.finish_reason == "length" for a in answers],
        "rollout_infos": [dict(a.rollout_infos) for a in answers],
        "response_token_ids": [list(a.token_ids) for a in answers],
        "trainer_state": trainer_state,
    }


@dataclass(frozen=True, eq=False)
class Function:
    """A reward as it is called, with its name in metrics and the name that it was given by."""

    call: Callable[..., Any]
    name: str
    asked: str  # `--reward_funcs NAME`

    @cached_property
    def is_async(self) -> bool:
        return any(inspect.iscoroutinefunction(f) for f in (self.call, type(self.call).__call__))

    @cached_property
    def file(self) -> str:
        """Where its code stands."""
        try:
            return inspect.getsourcefile(_definition(self.call)) or ""
        except TypeError:  # something built into Python, or typed into a session
            return ""

    @cached_property
    def is_shipped(self) -> bool:
        return _definition(self.call).__module__.startswith("swift.rewards.")

    @cached_property
    def needs_main_thread(self) -> bool:
        file = Path(self.file)
        return not self.is_shipped and file.is_file() and bool(NEEDS_MAIN.search(file.read_text("utf-8")))

    @cached_property
    def parameters(self) -> list[inspect.Parameter]:
        """All but the completions, which come first."""
        return list(inspect.signature(self.call).parameters.values())[1:]

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Raises RewardError when it needs a column that no row has."""
        for parameter in self.parameters:
            is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if is_named and parameter.default is parameter.empty and parameter.name not in columns:
                own = [name for name in columns if name not in build_columns(())]
                raise RewardError(
                    f"{self.asked}: it needs the column {parameter.name}, which the rows do not have",
                    hint=f"they have {', '.join(sorted(own)) or 'no other columns'}",
                )

    def start(self, answers: Sequence[Answer], columns: Mapping[str, Any]) -> Any:
        """Calls it: what it returns, which is a coroutine when it is asynchronous."""
        names = {p.name for p in self.parameters}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in self.parameters)
        wanted = {name: columns[name] for name in columns if takes_all or name in names}
        return self.call([answer.text for answer in answers], **wanted)


def _definition(call: Any) -> Any:
    """The class or function that a reward was made from."""
    call = call.func if isinstance(call, partial) else call
    return call if inspect.isfunction(call) or inspect.ismethod(call) else type(call)


def build_function(asked: str, settings: Mapping[str, Any]) -> Function:
    """The reward of a name in `orms`, or at `file.py:name`.

    Of a class an instance is made: its parameters are filled from `settings` by name, `args` has all of them.
    """
    found, flag = orms.find(asked), f"--reward_funcs {asked}"
    if not callable(found):
        raise ConfigError(f"{flag} is a {type(found).__name__}, not a class or a function")
    if not inspect.isclass(found):
        name = found.__name__ if inspect.isroutine(found) else type(found).__name__
        return Function(found, name, flag)
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(found).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "args":
            given[name] = SimpleNamespace(**settings)
        elif name in settings:
            given[name] = settings[name]
        elif parameter.default is parameter.empty:
            raise ConfigError(f"{flag}: {found.__name__} wants {name}, which is no flag of this command")
    try:
        return Function(found(**given), found.__name__, flag)
    except ConfigError:
        raise
    except Exception as error:  # a plugin is a stranger's program
        raise ConfigError(f"{flag}: {tell_error(error, inspect.getsourcefile(found) or '')}") from error


def read_values(asked: str, returned: Any, answers: Sequence[Answer]) -> list[float]:
    """The numbers that a reward returned, NaN for None. Raises RewardError."""
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        raise RewardError(
            f"{asked} returned a {type(returned).__name__}",
            hint="a list with a number for each answer",
        )
    values = list(returned)
    if len(values) != len(answers):
        raise RewardError(f"{asked} returned {len(values)} values for {len(answers)} answers")
    read = []
    for value, answer in zip(values, answers, strict=True):
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if isinstance(value, str | bytes) or not (math.isfinite(number) or value is None):
            raise RewardError(
                f"{asked} returned {value!r} for an answer to {answer.place}",
                hint="a finite number, or None for a row that it does not judge",
            )
        read.append(number)
    return read


class Panel:
    """All rewards of a run, in the order of their weights: functions, the environment's, models."""

    def __init__(
        self, functions: Sequence[Function], *, weights: Sequence[float] | None, timeout_seconds: float
    ) -> None:
        self.functions, self.timeout_seconds = list(functions), timeout_seconds
        self.models: list[Judge] = []
        self._columns: tuple[str, ...] = ()
        self._weights = weights
        plain = [f for f in self.functions if not f.is_async]
        bound = [f for f in plain if f.needs_main_thread]
        self._bound = bound or [f for f in plain if not f.is_shipped][:1]

    @classmethod
    def build(
        cls, config: RewardConfig, *, settings: Mapping[str, Any], has_environment: bool = False
    ) -> "Panel":
        """Needs no model. `settings`: all flags of the run, and `tokenizer`, for classes that name them."""
        longest = settings["max_completion_length"]
        filled = {
            **settings,
            "cosine_max_len": config.cosine_max_len or longest,
            "soft_max_length": config.soft_max_length or longest,
        }
        functions = [build_function(name, filled) for name in config.reward_funcs]
        if has_environment:
            functions.append(Function(GymReward(), "gym_reward", "--use_gym_env true"))
        return cls(functions, weights=config.reward_weights, timeout_seconds=config.reward_timeout)

    def add_models(self, models: Iterable[Judge]) -> None:
        """Reward models, once they are loaded; they come after the functions."""
        self.models += models

    @property
    def names(self) -> list[str]:
        """[F] names in metrics, none twice."""
        names = [member.name for member in (*self.functions, *self.models)]
        return [f"{n}_{i}" if n in names[: i - 1] else n for i, n in enumerate(names, start=1)]

    @property
    def weights(self) -> np.ndarray:
        """[F] float64."""
        weights = self._weights or [1.0] * len(self.names)
        assert len(weights) == len(self.names), (self.names, weights)
        return np.asarray(weights, dtype=np.float64)

    def check_columns(self, names: Iterable[str]) -> None:
        """The columns that some row of the run has. Raises RewardError when a reward needs another."""
        self._columns = tuple(names)
        columns = build_columns((), None, self._columns)
        for function in self.functions:
            function.check_columns(columns)

    def judge(self, answers: Sequence[Answer], *, trainer_state: Any = None) -> np.ndarray:
        """[N, F] float64, NaN where a reward does not judge a row. Raises RewardError."""
        if not answers:
            return np.zeros((0, len(self.names)))
        columns = build_columns(answers, trainer_state, self._columns)
        for function in self.functions:
            function.check_columns(columns)
        calls = {f: partial(f.start, answers, columns) for f in self.functions}
        started = {
            f: start_coroutine(call) if f.is_async else start_thread(call)
            for f, call in calls.items()
            if f not in self._bound
        }
        end = time.monotonic() + self.timeout_seconds
        takers = {f: partial(run_here, calls[f], self.timeout_seconds) for f in self._bound}
        values = {f: self._take(f, answers, takers[f], trainer_state) for f in self._bound}
        judged = [[math.nan if v is None else v for v in m.judge(answers)] for m in self.models]
        for f, future in started.items():
            taker = partial(take_result, future, end - time.monotonic())
            values[f] = self._take(f, answers, taker, trainer_state)
        return np.array([*(values[f] for f in self.functions), *judged], dtype=np.float64).T

    def _take(
        self, function: Function, answers: Sequence[Answer], take: Callable[[], Any], trainer_state: Any
    ) -> list[float]:
        """The numbers of one reward, by calling it or by waiting for it."""
        try:
            returned = take()
        except LateError:
            raise RewardError(
                f"{function.asked} was not done with {len(answers)} answers after {self.timeout_seconds:g} s",
                hint="raise --reward_timeout, or let it wait for less",
            ) from None
        except Exception as error:  # a plugin is a stranger's program
            place = self._find_row(function, answers, type(error), trainer_state)
            raise RewardError(f"{function.asked}: {place}: {tell_error(error, function.file)}") from error
        return read_values(function.asked, returned, answers)

    def _find_row(
        self, function: Function, answers: Sequence[Answer], kind: type[Exception], trainer_state: Any
    ) -> str:
        """The first row that raises the error when it is judged alone; all of them if none does."""
        end = time.monotonic() + SEARCH_SECONDS
        for answer in answers:
            call = partial(function.start, [answer], build_columns([answer], trainer_state, self._columns))
            seconds = end - time.monotonic()
            if seconds <= 0:
                break
            try:
                if function.is_async:
                    take_result(start_coroutine(call), seconds)
                else:
                    run_here(call, seconds)
            except kind:
                return answer.place
            except (Exception, LateError):
                continue
        return f"{answers[0].place} to {answers[-1].place}"
