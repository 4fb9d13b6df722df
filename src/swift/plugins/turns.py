"""Conversations that a plugin continues: what it may decide after each answer, and environments that do.

Names and arguments are those of earlier tools, so that their plugins run. Importing this costs nothing. Not
here: tokens, masks, who is asked (rollout/multi_turn.py).
"""

import asyncio
import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from swift.config.option import ConfigError
from swift.plugins.registry import Registry


@dataclass
class TurnRequest:
    """A conversation under way. A scheduler appends to `messages`, or changes the end of its last answer."""

    messages: list[dict[str, Any]]
    data_dict: dict[str, Any]  # the row's other columns
    uuid: str
    tools: list[Any] | None = None


@dataclass(frozen=True)
class TurnMessage:
    content: str
    role: str = "assistant"


@dataclass(frozen=True)
class TurnChoice:
    """An answer to one turn. `message.content` has what was answered now."""

    message: TurnMessage
    finish_reason: str  # "stop" or "length"
    token_ids: list[int] = field(default_factory=list)


class MultiTurnScheduler:
    """Decides whether a conversation goes on, and with what. Every method may be a coroutine.

    For each answer `on_turn_end`, then `check_finished`, then `step` is called, with the answer at the end of
    the request's messages; turns count from 1.
    """

    def __init__(
        self,
        infer_engine: Any = None,
        max_turns: int | None = None,
        *,
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        """`infer_engine` is None: the answers of all conversations are drawn together, elsewhere."""
        self.infer_engine, self.max_turns, self.tokenizer = infer_engine, max_turns, tokenizer
        self.settings = settings

    def on_trajectory_start(self, requests: Sequence[TurnRequest]) -> Any:
        """Before the first answers, for all of them; may change their messages as it likes."""

    def on_turn_end(self, request: TurnRequest, choice: TurnChoice, turn: int) -> Any:
        """{"done": True} ends it; {"rollout_infos": {...}} goes to the rewards. Either may be left out."""

    def check_finished(self, _request: TurnRequest, choice: TurnChoice, turn: int) -> Any:
        """Whether this was the last answer."""
        limit = self.max_turns is not None and turn >= self.max_turns
        return limit or choice.finish_reason == "length"

    def step(self, request: TurnRequest, choice: TurnChoice, turn: int) -> Any:
        """Continues the messages, and gives {"infer_request": request}, or rollout_infos as well."""
        raise NotImplementedError

    def on_trajectory_end(self, requests: Sequence[TurnRequest]) -> Any:
        """After the last answer of all of them."""


class Env:
    """Something that is acted on by messages. Every method may be a coroutine."""

    def __init__(self, env_config: dict[str, Any]) -> None:
        self.env_config = env_config

    def reset(self, config: TurnRequest) -> Any:
        """(first observation or None for the row's own messages, anything, system prompt or None)."""
        raise NotImplementedError

    def step(self, action: list[dict[str, Any]]) -> Any:
        """(observation, reward, whether it is over, {...}) after the last of these messages."""
        raise NotImplementedError

    def close(self) -> Any:
        """Called once, at the end."""


class GymScheduler(MultiTurnScheduler):
    """One environment a conversation, of the row's `env_config["name"]` or --gym_env."""

    def __init__(self, *arguments: Any, gym_env: str | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.gym_env = gym_env
        self.envs: dict[str, Any] = {}
        self.rewards: dict[str, list[float]] = {}
        self.observed: dict[str, str] = {}

    async def on_trajectory_start(self, requests: Sequence[TurnRequest]) -> None:
        await asyncio.gather(*map(self._reset, requests))

    async def _reset(self, request: TurnRequest) -> None:
        config = request.data_dict.get("env_config") or {}
        name = config.get("name") or self.gym_env
        if name is None:
            raise ConfigError(
                "no environment is named", hint='--gym_env NAME, or a column env_config: {"name": ...}'
            )
        env = self.envs[request.uuid] = envs.find(name)(config)
        self.rewards[request.uuid] = []
        observation, _, system = await settle(env.reset(request))
        if observation is not None:
            first = [{"role": "system", "content": system}] if system else []
            request.messages[:] = [*first, {"role": "user", "content": observation}]

    async def on_turn_end(self, request: TurnRequest, _choice: TurnChoice, _turn: int) -> Any:
        env, rewards = self.envs[request.uuid], self.rewards[request.uuid]
        messages = copy.deepcopy(request.messages)
        self.observed[request.uuid], reward, done, info = await settle(env.step(messages))
        rewards.append(float(reward))
        infos = {"total_reward": sum(rewards), "step_rewards": list(rewards), "trajectory_info": info}
        return {"done": done, "rollout_infos": infos}

    def step(self, request: TurnRequest, _choice: TurnChoice, _turn: int) -> Any:
        request.messages.append({"role": "user", "content": self.observed[request.uuid]})
        return {"infer_request": request}

    async def on_trajectory_end(self, _requests: Sequence[TurnRequest]) -> None:
        for memory in (self.rewards, self.observed):
            memory.clear()
        closed, self.envs = list(self.envs.values()), {}
        await asyncio.gather(*(settle(env.close()) for env in closed))


async def settle(value: Any) -> Any:
    """What a function gives, or its coroutine."""
    return await value if inspect.isawaitable(value) else value


envs: Registry[Any] = Registry("environment")
multi_turns: Registry[Any] = Registry(
    "multi-turn scheduler",
    {"gym_scheduler": GymScheduler, "math_tip_trick": "swift.rewards.tips:MathTips"},
)
