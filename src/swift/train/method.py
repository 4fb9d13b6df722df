"""What one training method is made of, beside what all of them share."""

from dataclasses import dataclass
from functools import partial

from swift.config.runs import RlhfRun, SftRun
from swift.config.task import MULTI_LABEL
from swift.objectives.build import build_objective
from swift.objectives.classification import Classification
from swift.objectives.embedding import EmbeddingPairs, InfoNce, ListwiseReranker, PointwiseReranker
from swift.objectives.preference import RANKED, Preference
from swift.objectives.sft import Sft
from swift.objectives.types import Objective
from swift.train.far_teacher import FarTeacher
from swift.train.scoring import Scorer, score_bco, score_kto, score_nothing, score_ranked, score_reference


@dataclass(frozen=True)
class Method:
    """`objective` over rows of `shape` (data/shapes.py), whose batches `score` has completed."""

    objective: Objective
    shape: str = "chat"
    score: Scorer = score_nothing
    samples: bool = False  # its own answers to prompts
    foresees: bool = False  # a second model learns what answers will be worth
    teaches: bool = False  # the reference, or `score`, is a teacher
    needs_reference: bool = False
    needs_mismatched: bool = False  # `score` also wants prompts with the answers of other rows
    learns_text: bool = True  # the tokens of answers; no = whole texts are scored or embedded
    mix_every: int | None = None  # steps between two updates of the reference; none = it stays
    mix_share: float = 0.0  # of the model in an updated reference
    num_labels: int | None = None  # outputs of a head on the last token; none = the language model itself
    answers_yes: bool = False  # the score of a text is how much likelier than no the next token is yes


def sft_method(run: SftRun) -> Method:
    task = run.task
    if task.task_type == "seq_cls":
        assert task.num_labels is not None, "check_complete has run"
        shape = "classes" if task.problem == MULTI_LABEL else "labelled"
        return Method(Classification(task.problem), shape, num_labels=task.num_labels, learns_text=False)
    if task.task_type == "embedding":
        objective: Objective = InfoNce() if task.loss == "infonce" else EmbeddingPairs(task.loss)
        shape = "anchors" if task.loss == "infonce" else "alike"
        return Method(objective, shape, learns_text=False)
    if task.task_type.endswith("reranker"):
        objective = PointwiseReranker() if task.loss == "pointwise_reranker" else ListwiseReranker()
        if task.task_type == "reranker":
            return Method(objective, "documents", num_labels=1, learns_text=False)
        return Method(objective, "judged", learns_text=False, answers_yes=True)
    return Method(Sft(run.sft))


def rlhf_method(run: RlhfRun) -> Method:
    """The method of `swift rlhf`. Raises ConfigError where flags contradict each other."""
    config, objective = run.rlhf, build_objective(run.rlhf, run.online, run.ppo)
    if config.rlhf_type == "grpo":
        return Method(
            objective, "prompt", samples=True, needs_reference=config.needs_reference,
            mix_every=config.ref_model_sync_steps if config.sync_ref_model else None,
            mix_share=config.ref_model_mixup_alpha,
        )  # fmt: skip
    if config.rlhf_type == "ppo":
        return Method(objective, "prompt", samples=True, needs_reference=True, foresees=True)
    if config.rlhf_type == "gkd":
        if config.teacher_model_server:
            far = FarTeacher(config.teacher_model_server, config.gkd_logits_topk or 0)
            return Method(objective, score=far, teaches=True)
        return Method(objective, needs_reference=True, teaches=True)
    if config.rlhf_type == "rm":
        return Method(objective, "pair", num_labels=1)
    # Rows that bring the reference along do so on every rank, also where a step has no row for it.
    needs_reference = config.needs_reference or "bco_pair" in config.losses
    is_known = config.precompute_ref_log_probs or not needs_reference
    score: Scorer = score_nothing if is_known else score_reference
    if "kto" in config.losses:
        score = partial(score_kto, score)
    if "bco_pair" in config.losses:
        score = partial(score_bco, score, config.beta_value)
    if isinstance(objective, Preference) and not RANKED.isdisjoint(config.losses):
        score = partial(score_ranked, score, objective)
    return Method(
        objective,
        "kto" if config.rlhf_type == "kto" else "pair",
        score,
        needs_reference=needs_reference,
        needs_mismatched="kto" in config.losses,
        mix_every=config.ref_model_sync_steps if config.sync_ref_model else None,
        mix_share=config.ref_model_mixup_alpha,
    )
