"""Answers to prompts, what they are worth, and how they become rows to train on.

Owns: which process answers which prompt, what a reward is told, what the log tells of answers. Not here:
sampling (rollout/), judging (rewards/), when it is done (online.py).
Shapes: N = answers of all ranks, n = those of this one, F = rewards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.batch import IGNORED, Batch
from swift.config.online import OnlineConfig
from swift.config.option import ConfigError
from swift.data.collate import collate
from swift.data.encode import EncodedDataset
from swift.data.feed import describe_lengths
from swift.data.types import place
from swift.engines.protocol import Engine, Sums
from swift.engines.ranks import Ranks
from swift.objectives.advantages import Advantages, compute_advantages
from swift.rewards.panel import Answer, Panel
from swift.rollout.multi_turn import Start, Turns, run_turns
from swift.rollout.protocol import RolloutEngine
from swift.rollout.types import Request, Sampling, join_requests
from swift.template.tokenize import Encoded
from swift.template.types import Message
from swift.train.evaluation import Found
from swift.train.state import TrainState

HELD_OUT = 2**31  # stands for the number of the rollout where held-out prompts are answered


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer to one prompt, in tokens."""

    row: int  # of the prompts
    place: int  # among the answers to it
    prompt: list[int]
    token_ids: list[int]
    logps: list[float]  # the sampler's
    finish_reason: str
    text: str
    mask: list[int] | None = None  # of conversations: 1 = the model's own token
    messages: list[Message] | None = None  # of conversations: all of it
    infos: dict[str, Any] = field(default_factory=dict)  # what environments told

    @property
    def is_cut(self) -> bool:
        return self.finish_reason == "length"

    @property
    def said(self) -> list[int]:
        """The model's own tokens."""
        if self.mask is None:
            return self.token_ids
        return [token for token, own in zip(self.token_ids, self.mask, strict=True) if own]


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers of all ranks, in the order of prompts, with what this rank has of them."""

    mine: list[Answered]  # [n]
    first: int  # where they begin among all
    facts: Tensor  # [N, F + 2] float64: rewards (NaN = not judged), tokens, whether it was cut


@dataclass(frozen=True)
class Sampler:
    """Answers to prompts, and what they are worth."""

    engine: Engine
    rollout: RolloutEngine
    panel: Panel
    rows: EncodedDataset
    config: OnlineConfig
    seed: int
    prefix: str = ""  # text of every answer that the prompt already holds
    turns: Turns | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def answer(self, rows: np.ndarray, generations: int, number: int) -> list[Answered]:
        """[n] of this rank: an even share of all, a group may be spread over ranks."""
        pairs = [(slot, int(row), place) for slot, row in enumerate(rows) for place in range(generations)]
        mine = np.array_split(np.arange(len(pairs)), self.engine.data_world)[self.engine.data_rank]
        draws = np.random.SeedSequence([self.seed % 2**32, number]).generate_state(len(rows))
        asked = [(*pairs[i][1:], int(draws[pairs[i][0]])) for i in mine]
        return self._talk(asked) if self.turns else self._answer_once(asked)

    def _answer_once(self, asked: list[tuple[int, int, int]]) -> list[Answered]:
        """`asked`: row, place and seed of each answer; those of one prompt are neighbours."""
        requests = [
            Request(self.rows[row].input_ids.tolist(), sampling_of(self.config, seed), first=number)
            for row, number, seed in asked
        ]
        answers = chain.from_iterable(self.rollout.generate(join_requests(requests)))
        return [
            Answered(
                row, number, request.token_ids,
                found.token_ids, found.logps, found.finish_reason, self.prefix + found.text,
            )
            for (row, number, _), request, found in zip(asked, requests, answers, strict=True)
        ]  # fmt: skip

    def _talk(self, asked: list[tuple[int, int, int]]) -> list[Answered]:
        """As `_answer_once`, of conversations that go on as --multi_turn_scheduler says."""
        assert self.turns is not None
        starts = []
        for row, number, seed in asked:
            sample = self.rows.samples[row]
            where = place(*self.rows.places[row])
            starts.append(
                Start(sample.messages, sample.extra, f"{row}-{number}", where, seed, number, sample.tools)
            )
        sampling, collect = sampling_of(self.config, 0), self.ranks.collect
        trajectories = run_turns(self.rollout, starts, self.turns, sampling=sampling, collect=collect)
        return [
            Answered(
                row, number, t.prompt_ids, t.token_ids, t.logps, t.finish_reason, t.text,
                t.loss_mask, t.messages, t.infos,
            )
            for (row, number, _), t in zip(asked, trajectories, strict=True)
        ]  # fmt: skip

    def judge(self, mine: list[Answered], step: int) -> Judged:
        """The rewards of all answers, on every rank. A reward that fails on one rank stops all of them.

        Ranks with the same rows leave the judging to one of them.
        """
        answers = []
        heard = mine if self.ranks.rank in self.ranks.speakers else []
        for found in heard:
            sample = self.rows.samples[found.row]
            said: Message = {"role": "assistant", "content": found.text}
            answers.append(
                Answer(
                    text=found.text,
                    messages=found.messages or [*sample.messages, said],
                    columns=sample.extra,
                    prompt_id=str(found.row),
                    request_id=f"{found.row}-{found.place}",
                    token_ids=found.said,
                    finish_reason=found.finish_reason,
                    place=place(*self.rows.places[found.row]),
                    rollout_infos=found.infos,
                )
            )
        rewards, fault = np.zeros((0, len(self.panel.names))), None
        try:
            rewards = self.panel.judge(answers, trainer_state=SimpleNamespace(global_step=step))
        except ConfigError as error:
            fault = error
        faults = [one for one in self.ranks.collect(fault) if one is not None]
        if faults:
            raise faults[0]
        rest = [(len(found.said), float(found.is_cut)) for found in heard]
        other = torch.tensor(rest, dtype=torch.float64).view(-1, 2)
        facts, first = self.engine.gather(torch.cat([torch.from_numpy(rewards), other], 1))
        return Judged(mine, first, facts)

    def weigh(
        self, judged: Judged, generations: int, *, beta: float = 0.0, distance: Tensor | None = None
    ) -> Advantages:
        """What each answer was worth beyond the others; `distance`, [N], costs `beta` of its reward."""
        return compute_advantages(
            judged.facts[:, :-2],
            torch.arange(len(judged.facts)) // generations,
            weights=torch.from_numpy(self.panel.weights),
            estimator=self.config.advantage_estimator,
            scale=self.config.scaling,
            penalty_N=None if distance is None else beta * distance,
        )

    def describe(self, judged: Judged, found: Advantages) -> Sums:
        """What the log tells of a rollout, the same on every rank."""
        lengths, cut = judged.facts[:, -2], judged.facts[:, -1]
        given = found.rewards[~found.rewards.isnan()]
        sums = Sums()
        sums.add("reward", float(given.sum()), len(given))
        if len(found.std) < len(found.rewards):  # there are groups
            sums.add("reward_std", float(found.std.mean()), 1)
            sums.add("frac_reward_zero_std", found.frac_reward_zero_std, 1)
        for name, mean, std in zip(self.panel.names, found.function_mean, found.function_std, strict=True):
            judges = not bool(mean.isnan())
            sums.add(f"rewards/{name}/mean", float(mean) if judges else 0.0, judges)
            sums.add(f"rewards/{name}/std", float(std) if judges else 0.0, judges)
        moments = {"mean_length": lengths.mean(), "min_length": lengths.min(), "max_length": lengths.max()}
        for name, value in (moments | {"clipped_ratio": cut.mean()}).items():
            sums.add(f"completions/{name}", float(value), 1)
        return sums


@dataclass(frozen=True)
class RolloutEvaluation:
    """Rewards of answers to held-out prompts; every evaluation draws from the same numbers."""

    sampler: Sampler  # over the held-out prompts
    generations: int
    limit: int | None = None
    wait: Callable[[], None] = lambda: None  # until weights may change

    def measure(self, state: TrainState) -> Found:
        sampler, rollout = self.sampler, self.sampler.rollout
        count = min(len(sampler.rows), self.limit or len(sampler.rows))
        self.wait()
        rollout.wake()
        rollout.update_weights(sampler.engine.weights(), version=state.step)
        mine = sampler.answer(np.arange(count), self.generations, HELD_OUT)
        judged = sampler.judge(mine, state.step)
        rollout.sleep()
        found = sampler.weigh(judged, self.generations)
        return Found(sampler.describe(judged, found), count, 1)

    def describe(self) -> str:
        return describe_lengths(self.sampler.rows)


def sampling_of(config: OnlineConfig, seed: int) -> Sampling:
    """How an answer is drawn while a model is trained."""
    return Sampling(
        config.max_completion_length, config.temperature, config.top_p, max(config.top_k, 0),
        repetition_penalty=config.repetition_penalty, seed=seed,
    )  # fmt: skip


def collate_answers(answers: Sequence[Answered], overlong_filter: bool) -> Batch:
    """One micro-batch. Of a cut answer nothing is trained with `overlong_filter`; it still is a segment."""
    rows, logps = [], []
    for found in answers:
        ids = np.array([*found.prompt, *found.token_ids], dtype=np.int32)
        labels = ids.copy()
        labels[: len(found.prompt)] = IGNORED
        if found.mask is not None:
            labels[len(found.prompt) :][np.array(found.mask) == 0] = IGNORED
        if overlong_filter and found.is_cut:
            labels[:] = IGNORED
        rows.append(Encoded(ids, labels, None))
        logps.append(np.array([*[0.0] * (len(found.prompt) - 1), *found.logps, 0.0], dtype=np.float32))
    batch = collate(rows)
    return replace(batch, token={"rollout_logps": torch.from_numpy(np.concatenate(logps))})
