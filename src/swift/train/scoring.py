"""What an objective reads beside the model's own answer: computed by forward passes, handed over as columns.

Owns: reference log-probabilities, the distance estimate of KTO, ranks of pairs. Not here: any loss.
Shapes: T = tokens of a batch, S = its segments, N = tokens of a data set.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from swift.batch import Batch
from swift.data.collate import collate_rows
from swift.data.encode import EncodedDataset
from swift.engines.protocol import Engine, Sums
from swift.engines.ranks import Ranks
from swift.objectives.distance import Distance
from swift.objectives.preference import RANKED, Preference, match_ranks
from swift.utils import env
from swift.utils.log import console

LOGPS = frozenset({"logps"})
REF_LOGPS = "ref_logps"
OLD_LOGPS = "old_logps"


@dataclass(frozen=True)
class Step:
    """The rows of one step, or of an evaluation, on this rank."""

    batches: list[Batch]
    mismatched: list[Batch]  # the same prompts with answers to others, where the method asks for them
    running: Sums  # sums of the whole run so far; a scorer may add to them


# Gives the batches with more columns. Called by every rank, also by one without batches.
Scorer = Callable[[Engine, Step], list[Batch]]


def score_nothing(_engine: Engine, step: Step) -> list[Batch]:
    """For objectives that read the model's own answer alone."""
    return step.batches


def score_reference(engine: Engine, step: Step) -> list[Batch]:
    """For objectives that compare with the model as it was before training."""
    return add_reference(engine, step.batches)


def add_reference(engine: Engine, batches: list[Batch]) -> list[Batch]:
    """token["ref_logps"] [T]: what the model answered before training."""
    with engine.reference():
        return add_logps(engine, batches, REF_LOGPS)


def add_logps(engine: Engine, batches: list[Batch], name: str) -> list[Batch]:
    """token[name] [T]: what the model answers now, by the trainer's own arithmetic."""
    return [
        replace(batch, token={**batch.token, name: found.logps})
        for batch, found in zip(batches, engine.forward(batches, LOGPS), strict=True)
        if found.logps is not None
    ]


def distance_from_reference(batch: Batch) -> Tensor:
    """[T] log(policy / reference) on the CPU, of the policy that answered."""
    return (batch.token[OLD_LOGPS] - batch.token[REF_LOGPS]).cpu()


def score_kto(score: Scorer, engine: Engine, step: Step) -> list[Batch]:
    """As `score`, and segment["kl"] [S]: how far the policy is from the reference, one number.

    Estimated on answers to other prompts, over the whole step and at least 0: arXiv:2402.01306 section 4.1.
    """
    sums = engine.measure(add_reference(engine, step.mismatched), Distance())
    kl = max(sums.means()["kl"], 0.0)
    return with_constant(score(engine, step), "kl", kl)


def score_bco(score: Scorer, beta: float, engine: Engine, step: Step) -> list[Batch]:
    """As `score`, and segment["bco_delta"] [S]: the mean reward of all answers up to this step.

    arXiv:2404.04656 section 3.2; the mean counts every answer once.
    """
    batches = score(engine, step)
    total, count = engine.measure(batches, Distance()).pairs["kl"]
    step.running.add("reward", beta * total, count)
    return with_constant(batches, "bco_delta", step.running.means()["reward"])


def score_ranked(score: Scorer, objective: Preference, engine: Engine, step: Step) -> list[Batch]:
    """As `score`, and segment["<loss>_partner"] [S] of the losses in RANKED, over the whole step."""
    batches = score(engine, step)
    pairs = [
        objective.score(stats, batch.to(stats.logps.device))
        for stats, batch in zip(engine.forward(batches, LOGPS), batches, strict=True)
        if stats.logps is not None
    ]
    for name in RANKED.intersection(objective.loss_type):
        lists = [torch.stack(pair.ranked_values(name), dim=1) for pair in pairs]
        mine = torch.cat([torch.zeros(0, 2), *(values.cpu() for values in lists)])
        values, first = engine.gather(mine)
        partners = match_ranks(values[:, 0], values[:, 1])[first : first + len(mine)].flatten()
        columns = partners.split([batch.num_segments for batch in batches])
        batches = [
            replace(batch, segment={**batch.segment, f"{name}_partner": column})
            for batch, column in zip(batches, columns, strict=True)
        ]
    return batches


def with_constant(batches: Sequence[Batch], name: str, value: float) -> list[Batch]:
    """The batches with the same number beside every segment."""
    return [
        replace(batch, segment={**batch.segment, name: torch.full((batch.num_segments,), value)})
        for batch in batches
    ]


def precompute_reference(
    engine: Engine, dataset: EncodedDataset, *, batch_size: int, ranks: Ranks, key: str
) -> None:
    """Reference log-probabilities of all rows, in `dataset.tokens` from now on; kept in the cache.

    Each rank scores its share. `key` names the reference model.
    """
    digest = hashlib.sha256(f"{key}\n{dataset.fingerprint}".encode()).hexdigest()[:32]
    file = env.cache_root() / "reference" / f"{digest}.npy"
    if not ranks.share(file.exists()):
        logps_N = _score_rows(engine, dataset, batch_size)
        logps_N = np.sum([ranks.share(logps_N, rank) for rank in ranks.speakers], axis=0)
        if ranks.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.with_suffix(".tmp").open("wb") as handle:
                np.save(handle, logps_N)
            file.with_suffix(".tmp").replace(file)
    ranks.barrier()
    dataset.tokens[REF_LOGPS] = np.load(file, mmap_mode="r") if file.exists() else logps_N


def _score_rows(engine: Engine, dataset: EncodedDataset, batch_size: int) -> np.ndarray:
    """[N] reference log-probabilities of the rows of this rank, 0 at the others."""
    logps_N = np.zeros(dataset.num_tokens, dtype=np.float32)
    stride = batch_size * engine.data_world
    with engine.reference():
        for start in track(
            range(0, len(dataset), stride), "reference model", console=console(), transient=True
        ):
            first = min(start + engine.data_rank * batch_size, len(dataset))
            rows = range(first, min(first + batch_size, len(dataset)))
            batches = [collate_rows(dataset, rows)] if rows else []
            for stats in engine.forward(batches, LOGPS):
                assert stats.logps is not None
                span = slice(dataset.offsets[rows[0]], dataset.offsets[rows[-1] + 1])
                logps_N[span] = stats.logps.float().cpu().numpy()
    return logps_N
