"""The numbers of a decoder that its cost depends on: from a config.json, or from a table of known names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swift.config.layout import model_sizes
from swift.config.option import ConfigError

TABLE = Path(__file__).with_name("shapes.tsv")  # columns are fields of config.json
VARIANTS = ("-instruct", "-base", "-chat", "-2507", "-thinking", "-it")


@dataclass(frozen=True, slots=True)
class Shape:
    """Parameters (without biases and norms of heads), columns and heads; of a layer: the mean over all."""

    config: Mapping[str, Any]
    hidden: int
    layers: int
    vocabulary: int
    ends: int  # parameters outside the layers
    plain: float  # of a layer, routed experts left out
    routed: float  # of all routed experts of a layer
    chosen: float  # of those that a token goes through
    columns: float  # of a layer that a token goes through between its feed-forward matrices
    copies: float  # of a token that experts are sent
    heads: int  # query heads x (width of a key + of a value)
    groups: int  # key-value heads x the same
    lora: float  # parameters of adapters on all linear layers for each of their rank (arXiv:2106.09685)

    @property
    def parameters(self) -> float:
        return self.ends + self.layers * (self.plain + self.routed)

    @property
    def active(self) -> float:
        """Those that a token is multiplied with."""
        return self.hidden * self.vocabulary + self.layers * (self.plain + self.chosen)

    @property
    def cache(self) -> float:
        """Bytes of keys and values of a token."""
        return 2 * self.layers * self.groups

    def flops(self, length: float, *, full: bool) -> float:
        """Of a trained token in a row of `length`, recomputation not counted.

        6 for each active parameter, 4 where most weights get no gradient, and causal attention. Source:
        arXiv:2204.02311, appendix B.
        """
        return (6 if full else 4) * self.active + 3 * self.layers * self.heads * length

    @property
    def kept(self) -> tuple[float, float]:
        """Numbers that a layer keeps of a token for its backward pass: of width `hidden`, and the others.

        Inputs and outputs of both norms; queries, keys, values, what attention gives; what experts are sent,
        what goes into and out of the activation.
        """
        return 4 * self.hidden, self.heads + self.groups + self.copies * self.hidden + 3 * self.columns


def shape_of(config: Mapping[str, Any]) -> Shape:
    """From the contents of a config.json; low-rank attention as in arXiv:2405.04434."""
    sizes = model_sizes(config)
    read: dict[str, int] = {
        name: value or 0 for name, value in config.items() if isinstance(value, int | None)
    }
    hidden, heads = read["hidden_size"], sizes.heads
    width = value = read.get("head_dim") or hidden // heads
    groups, latent, low = sizes.kv_heads, read.get("kv_lora_rank", 0), read.get("q_lora_rank", 0)
    if latent:
        rope, value, groups = read["qk_rope_head_dim"], read["v_head_dim"], heads
        width = read["qk_nope_head_dim"] + rope
        queries = (hidden + heads * width) * low if low else hidden * heads * width
        keys = hidden * (latent + rope) + latent * heads * (width - rope + value)
        attention = queries + keys + heads * value * hidden
    else:
        attention = 2 * hidden * width * (heads + groups)
    sparse = 1 - read.get("first_k_dense_replace", 0) / sizes.layers if sizes.experts else 0.0
    times, expert = read.get("num_experts_per_tok", 1), sizes.expert_ffn
    shared = read.get("shared_expert_intermediate_size", 0) or read.get("n_shared_experts", 0) * expert
    common = (1 - sparse) * sizes.ffn + sparse * shared
    return Shape(
        config=config,
        hidden=hidden,
        layers=sizes.layers,
        vocabulary=sizes.vocab,
        ends=hidden * sizes.vocab * (1 if config.get("tie_word_embeddings") else 2),
        plain=attention + hidden * (2 + 3 * common + sparse * sizes.experts),
        routed=sparse * sizes.experts * 3 * hidden * expert,
        chosen=sparse * times * 3 * hidden * expert,
        columns=common + sparse * times * expert,
        copies=sparse * times,
        heads=heads * (width + value),
        groups=groups * (width + value),
        lora=4 * hidden
        + 2 * width * (heads + groups)
        + 3 * ((1 - sparse) * (hidden + sizes.ffn) + sparse * sizes.experts * (hidden + expert)),
    )


def find_shape(model: str) -> Shape:
    """Of a local directory, or of a known name. ConfigError for others: nothing is downloaded."""
    path = Path(model).expanduser() / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        return shape_of(config.get("text_config") or config)
    head, *rows = (line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines())
    wanted = model.rstrip("/").rpartition("/")[2].lower()
    while wanted.endswith(VARIANTS):
        wanted = wanted.rpartition("-")[0]
    for name, *values in rows:
        if name.lower() == wanted:
            return shape_of({key: json.loads(value) for key, value in zip(head[1:], values, strict=True)})
    raise ConfigError(
        f"{model} is no directory with a config.json, and its sizes are not known by name",
        hint=f"name a directory, or one of {', '.join(row[0] for row in rows)}",
    )
