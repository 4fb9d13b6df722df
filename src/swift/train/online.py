"""Rows that do not exist before the run: what one rollout is, and how optimizer steps learn from it.

Owns: rollouts in the order of steps, the columns that the objective reads, sampling again, what a checkpoint
keeps of a rollout. Not here: one answer and its rewards (answers.py), the steps (loop.py).
Shapes: P = prompts of a rollout, G = answers to each, N = P * G, T = tokens of a batch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swift.batch import Batch
from swift.config.online import RolloutPlan
from swift.data.feed import describe_lengths
from swift.data.loader import StepPlan
from swift.engines.protocol import Sums
from swift.objectives.advantages import Advantages
from swift.objectives.policy import drop_idle, entropy_threshold
from swift.objectives.reduce import segment_sum
from swift.rollout.local import LocalRollout
from swift.train.ahead import Ahead
from swift.train.answers import Answered, Judged, Sampler, collate_answers
from swift.train.scoring import OLD_LOGPS, add_logps, add_reference, distance_from_reference

ENTROPY = frozenset({"entropy"})
RESAMPLED = 1_000_003  # added to the seed of the order from which groups are drawn again


@dataclass(frozen=True)
class Held:
    """A rollout ready to be learnt from."""

    number: int
    parts: list[list[Batch]]  # micro-batches of this rank, for each optimizer step


class RolloutFeed:
    """What the loop trains on: as StoredFeed, but a step's rows are answers of the model as it is then."""

    def __init__(
        self,
        sampler: Sampler,
        order: StepPlan,
        plan: RolloutPlan,
        *,
        micro_batch_size: int,
        beta: float,
        held: list[dict[str, Any]] | None = None,
        ahead: Ahead | None = None,
        foresee: Callable[[list[Batch], Tensor], list[Batch]] | None = None,
    ) -> None:
        """`order`: its steps are rollouts. `held`: the rollout in which a checkpoint was written. `ahead`:
        who answers for the next one meanwhile.

        `foresee`: batches and the reward of each answer, [n], to batches with advantages; without it an
        answer has one advantage over its group.
        """
        self.sampler, self.order, self.plan = sampler, order, plan
        self.engine, self.config, self.ranks = sampler.engine, sampler.config, sampler.ranks
        self.micro_batch_size, self.beta, self.ahead, self.foresee = micro_batch_size, beta, ahead, foresee
        self.moves_weights = self.config.offload_model and not isinstance(sampler.rollout, LocalRollout)
        self.sums = Sums()
        self.answers: list[dict[str, Any]] = []  # of this rank, in the rollout that is learnt from
        self.told: list[dict[str, Any]] = []  # of all ranks, on the first one, until they are taken
        self.held: Held | None = None
        self._restored = held
        self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch * self.plan.updates

    def batches(self, step: int, _data_rank: int, /) -> list[Batch]:
        number, update = divmod(step, self.plan.updates)
        self.step = step + 1
        if self.held is None or self.held.number != number:
            self.held = None  # frees the batches before the model answers
            self.held = self._restore(number) if self._restored else self._roll_out(number, step)
        return self.held.parts[update % self.plan.parts]

    def mismatched(self, _step: int, _data_rank: int, /) -> list[Batch]:
        raise AssertionError("answers have no strangers' prompts")

    def epoch(self, step: int, /) -> float:
        return step / self.steps_per_epoch

    def rows_until(self, step: int, /) -> float:
        return step * self.plan.answers / self.plan.updates

    def progress(self) -> dict[str, int]:
        return {}

    def describe(self) -> str:
        return describe_lengths(self.sampler.rows)

    def position(self) -> dict[str, Any] | None:
        """What is held of answers that later steps learn from; None where the next step has new ones."""
        found = {}
        if self.step % self.plan.updates:
            found["answers"] = self._collect(self.answers)
        begun = self._begun()
        if begun is not None:
            found["ahead"] = [asdict(answer) for answer in self._collect(begun)]
        return found or None

    def close(self) -> None:
        self.sampler.rollout.close()
        if self.ahead:
            self.ahead.close()

    def observe(self, update_seconds: float) -> Sums:
        """What is known of the rollout, with the first step that learns from it."""
        sums, self.sums = self.sums, Sums()
        sums.add("time/update", update_seconds, 1)
        return sums

    def take_answers(self) -> tuple[dict[str, Any], ...]:
        """A rollout with its rewards, on the first rank with the first step that learns from it."""
        told, self.told = tuple(self.told), []
        return told

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.sums.add(f"time/{phase}", time.perf_counter() - started, 1)

    def _collect(self, values: list[Any]) -> list[Any]:
        """The lists of every data rank, one after the other, on every rank."""
        found = self.ranks.collect(values)
        return list(chain.from_iterable(found[speaker] for speaker in self.ranks.speakers))

    def _groups(self, every: list[Answered]) -> list[list[Answered]]:
        """The answers to each prompt."""
        size = self.plan.generations
        return [every[i : i + size] for i in range(0, len(every), size)]

    def _roll_out(self, number: int, step: int) -> Held:
        sampler, rollout, ahead = self.sampler, self.sampler.rollout, self.ahead
        if ahead and number:
            with self._timed("rollout"):
                ahead.wait()
        with self._timed("sync"):
            rollout.wake()
            rollout.update_weights(self.engine.weights(), version=step)
        with self.engine.set_aside(weights=self.moves_weights, moments=self.config.offload_optimizer):
            judged = self._sample(number, step)
            rollout.sleep()
        with self._timed("score"):
            order = np.random.RandomState([self.order.seed % 2**32, number]).permutation(len(judged.mine))
            order = order if self.plan.updates > 1 else np.arange(len(judged.mine))
            mine = [judged.mine[i] for i in order]
            parts = self._cut(mine)
            flat = list(chain.from_iterable(parts))
            if self.beta:
                flat = add_reference(self.engine, flat)
            if self.plan.updates > 1 or self.config.kl_in_reward or self.foresee:
                flat = add_logps(self.engine, flat, OLD_LOGPS)
            if self.config.top_entropy_quantile < 1:
                flat = self._mark_uncertain(flat)
            distance = self._distance(flat, order) if self.config.kl_in_reward else None
        found = sampler.weigh(judged, self.plan.generations, beta=self.beta, distance=distance)
        self.sums.merge(sampler.describe(judged, found))
        own = slice(judged.first, judged.first + len(mine))
        if self.foresee:
            with self._timed("score"):
                flat = self.foresee(flat, found.rewards.nan_to_num(nan=0.0)[own][torch.from_numpy(order)])
        else:
            flat = add_scores(flat, found.advantages[own][torch.from_numpy(order)])
        if self.config.log_completions:
            self._tell(judged, found)
        self.answers = self._describe(mine, flat) if self.plan.updates > 1 else []
        batches = iter(flat)
        return Held(number, [self._spare([next(batches) for _ in part]) for part in parts])

    def _spare(self, part: list[Batch]) -> list[Batch]:
        """What of an optimizer step's batches has to be run; a value model learns from every answer."""
        if self.foresee:
            return part
        return drop_idle(part, rows_each=self.micro_batch_size, is_pulled=bool(self.beta))

    def _sample(self, number: int, step: int) -> Judged:
        """Answers of one rollout; with --dynamic_sample groups that teach nothing are drawn again."""
        rows = self.order.step_rows(number)
        mine = self._begun()
        if self.ahead:
            self.ahead.start(number + 1)
        judged = self._ask(rows, number, step, mine)
        if not self.config.dynamic_sample:
            return judged
        kept = self._useful(judged)
        spare = self._groups(self._collect(judged.mine))
        for attempt in range(1, self.config.max_resample_times + 1):
            if len(kept) >= len(rows):
                break
            order = replace(self.order, seed=self.order.seed + RESAMPLED * attempt)
            again = self._ask(order.step_rows(number), number + (attempt << 32), step)
            kept += self._useful(again)
        self.sums.add("dynamic_sample/kept", min(len(kept), len(rows)) / len(rows), 1)
        if len(kept) < len(rows):  # the first groups fill up what is missing
            known = {(a.row, a.place, tuple(a.token_ids)) for group in kept for a in group}
            kept += [g for g in spare if (g[0].row, g[0].place, tuple(g[0].token_ids)) not in known]
        chosen = list(chain.from_iterable(kept[: len(rows)]))
        share = np.array_split(np.arange(len(chosen)), self.engine.data_world)[self.engine.data_rank]
        with self._timed("reward"):
            return self.sampler.judge([chosen[i] for i in share], step)

    def _ask(self, rows: np.ndarray, number: int, step: int, mine: list[Answered] | None = None) -> Judged:
        """Answers with their rewards; `mine`: those of this rank, where they are there already."""
        if mine is None:
            with self._timed("rollout"):
                mine = self.sampler.answer(rows, self.plan.generations, number)
        with self._timed("reward"):
            return self.sampler.judge(mine, step)

    def _begun(self) -> list[Answered] | None:
        """This rank's answers that somebody has begun with meanwhile."""
        return self.ahead.share(self.engine.data_rank, self.engine.data_world) if self.ahead else None

    def _useful(self, judged: Judged) -> list[list[Answered]]:
        """Groups whose rewards differ, of all ranks."""
        groups = self._groups(self._collect(judged.mine))
        spread = self.sampler.weigh(judged, self.plan.generations).std
        return [group for group, std in zip(groups, spread.tolist(), strict=True) if std > 0]

    def _cut(self, mine: Sequence[Answered]) -> list[list[Batch]]:
        """Micro-batches of each optimizer step."""
        shares = np.array_split(np.arange(len(mine)), self.plan.parts)
        return [self._cut_part([mine[i] for i in share]) for share in shares]

    def _cut_part(self, mine: Sequence[Answered]) -> list[Batch]:
        size, drops_cut = self.micro_batch_size, self.config.overlong_filter
        return [collate_answers(mine[i : i + size], drops_cut) for i in range(0, len(mine), size)]

    def _mark_uncertain(self, batches: list[Batch]) -> list[Batch]:
        """token["entropy_kept"] [T]: 1 for the most uncertain tokens of the rollout, of all ranks."""
        found = [stats.entropy for stats in self.engine.forward(batches, ENTROPY)]
        entropies = [e.cpu() for e in found if e is not None]
        trained = [e[b.trained] for e, b in zip(entropies, batches, strict=True)]
        every, _ = self.engine.gather(torch.cat([torch.zeros(0), *trained]))
        least = entropy_threshold(every, self.config.top_entropy_quantile)
        return [
            replace(batch, token={**batch.token, "entropy_kept": (entropy >= least).float()})
            for batch, entropy in zip(batches, entropies, strict=True)
        ]

    def _distance(self, batches: Sequence[Batch], order: np.ndarray) -> Tensor:
        """[N] sum of log(policy / reference) over each answer, of all ranks."""
        sums = [segment_sum(distance_from_reference(b), b) for b in batches]
        mine = torch.zeros(len(order), dtype=torch.float64)
        mine[torch.from_numpy(order)] = torch.cat(sums).double() if sums else mine
        return self.engine.gather(mine)[0]

    def _tell(self, judged: Judged, found: Advantages) -> None:
        """Every answer, its rewards and its advantage."""
        rows = self.sampler.rows
        mine = [
            (a.messages[:-1] if a.messages else rows.samples[a.row].messages, a.text, a.finish_reason)
            for a in judged.mine
        ]
        texts = self._collect(mine)
        if not self.ranks.is_main:
            return
        names = self.sampler.panel.names
        self.told = [
            {
                "prompt": list(messages),
                "completion": text,
                "finish_reason": reason,
                **{name: None if isnan(value) else value for name, value in zip(names, facts, strict=False)},
                "advantages": advantage,
            }
            for (messages, text, reason), facts, advantage in zip(
                texts, judged.facts.tolist(), found.advantages.tolist(), strict=True
            )
        ]

    def _describe(self, mine: Sequence[Answered], batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """This rank's answers with their columns, as a checkpoint keeps them."""
        names = sorted({name for batch in batches for name in batch.token})
        spans = [
            {name: batch.token[name][batch.segment_ids == s].tolist() for name in names}
            for batch in batches
            for s in range(batch.num_segments)
        ]
        shares = np.array_split(np.arange(len(mine)), self.plan.parts)
        part_of = [part for part, share in enumerate(shares) for _ in share]
        return [
            {"answer": asdict(replace(answer, infos={})), "token": columns, "part": part}
            for answer, columns, part in zip(mine, spans, part_of, strict=True)
        ]

    def _restore(self, number: int) -> Held:
        """The rollout of a checkpoint, shared out among the ranks there are now."""
        assert self._restored is not None
        every, self._restored = self._restored, None
        parts, self.answers = [], []
        for part in range(self.plan.parts):
            kept = [one for one in every if one["part"] == part]
            share = np.array_split(np.arange(len(kept)), self.engine.data_world)[self.engine.data_rank]
            mine = [kept[i] for i in share]
            self.answers += mine
            columns = iter(one["token"] for one in mine)
            filled = []
            for batch in self._cut_part([Answered(**one["answer"]) for one in mine]):
                rows = [next(columns) for _ in range(batch.num_segments)]
                joined = {name: list(chain.from_iterable(row[name] for row in rows)) for name in rows[0]}
                filled.append(replace(batch, token={name: torch.tensor(v) for name, v in joined.items()}))
            parts.append(self._spare(filled))
        return Held(number, parts)


def add_scores(batches: Sequence[Batch], scores: Tensor) -> list[Batch]:
    """token["advantages"] [T] from one number a segment, in the order of the batches."""
    parts = scores.float().split([batch.num_segments for batch in batches])
    return [
        replace(batch, token={**batch.token, "advantages": score_S[batch.segment_ids]})
        for batch, score_S in zip(batches, parts, strict=True)
    ]
