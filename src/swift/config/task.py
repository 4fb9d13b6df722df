"""What a model is trained to give: text, a class, a number, an embedding."""

from dataclasses import dataclass

from swift.config.option import ConfigError, option, refuse

TASKS = ("causal_lm", "seq_cls", "embedding", "reranker", "generative_reranker")
RERANKING = ("pointwise_reranker", "listwise_reranker")
# Losses of a task, its default first.
TASK_LOSSES: dict[str, tuple[str, ...]] = {
    "embedding": ("cosine_similarity", "contrastive", "online_contrastive", "infonce"),
    "reranker": RERANKING,
    "generative_reranker": RERANKING,
}
MULTI_LABEL = "multi_label_classification"
PROBLEMS = ("single_label_classification", "regression", MULTI_LABEL)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    task_type: str = option(
        "causal_lm",
        "what the model learns to give: text, a class or number (seq_cls), an embedding, or how well a "
        "document answers a query, by a head (reranker) or by yes and no (generative_reranker)",
        choices=TASKS,
    )
    num_labels: int | None = option(None, "classes of seq_cls; 1 = a number", min=1)
    problem_type: str | None = option(
        None, "kind of --task_type seq_cls; none = one class a row, a number with one label", choices=PROBLEMS
    )
    loss_type: str | None = option(
        None,
        "loss of embeddings and rerankers; none = cosine_similarity, pointwise_reranker",
        choices=tuple(dict.fromkeys(name for names in TASK_LOSSES.values() for name in names)),
    )

    @property
    def loss(self) -> str:
        """The loss of an embedding or reranking task."""
        return self.loss_type or TASK_LOSSES[self.task_type][0]

    @property
    def problem(self) -> str:
        return self.problem_type or PROBLEMS[self.num_labels == 1]

    def check(self) -> None:
        if self.task_type == "seq_cls" and self.num_labels is None:
            raise ConfigError("--task_type seq_cls needs --num_labels", hint="how many classes the rows have")
        if self.task_type != "seq_cls":
            refuse(self, ("num_labels", "problem_type"), "without --task_type seq_cls")
        if self.loss_type is not None and self.loss_type not in TASK_LOSSES.get(self.task_type, ()):
            known = ", ".join(TASK_LOSSES.get(self.task_type, ("none",)))
            raise ConfigError(
                f"--loss_type {self.loss_type} is not a loss of --task_type {self.task_type} (its: {known})"
            )
        if self.problem == "regression" and self.num_labels not in (None, 1):
            raise ConfigError("--problem_type regression has --num_labels 1")
