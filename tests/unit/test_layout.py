"""Layouts: what is possible, what is said where it is not, and that every suggestion is possible."""

import dataclasses
import itertools
import random

import pytest

from swift.config.layout import (
    DEGREES,
    LayoutConfig,
    ModelSizes,
    choose_layout,
    describe,
    find_faults,
    keeps_layout,
    micro_batches,
    model_sizes,
    stage_layers,
    suggest,
)
from swift.config.megatron import MegatronConfig
from swift.config.megatron_runs import MegatronSftRun
from swift.config.option import ConfigError, build, flatten

SMOLLM2 = ModelSizes(layers=30, heads=9, kv_heads=3, ffn=1536, vocab=49152)
QWEN3_8B = ModelSizes(layers=36, heads=32, kv_heads=8, ffn=12288, vocab=151936)
QWEN3_30B_A3B = ModelSizes(48, 32, 4, 6144, 151936, experts=128, expert_ffn=768)
SHORT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "piece": "num_layers_per_virtual_pipeline_stage",
    "first": "decoder_first_pipeline_num_layers",
    "last": "decoder_last_pipeline_num_layers",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "sp": "sequence_parallel",
    "kind": "cp_comm_type",
}


def config_of(**short: object) -> LayoutConfig:
    return LayoutConfig(**{SHORT[name]: value for name, value in short.items()})


def refusal(world: int, sizes: ModelSizes, **short: object) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        choose_layout(config_of(**short), world=world, sizes=sizes)
    return caught.value.message, caught.value.hint or ""


def test_degrees_of_the_usual_layouts() -> None:
    layout = choose_layout(config_of(tp=2, sp=True, pp=2, vpp=3, cp=2), world=16, sizes=QWEN3_8B)
    assert (layout.data, layout.virtual, layout.sequence, layout.layers) == (2, 3, True, (18, 18))
    moe = choose_layout(config_of(pp=2, ep=8), world=16, sizes=QWEN3_30B_A3B)
    assert (moe.data, moe.expert_data, moe.virtual) == (
        8,
        1,
        None,
    )  # experts are shared out inside data parallel
    assert choose_layout(config_of(sp=True), world=4, sizes=QWEN3_8B).sequence is False
    assert choose_layout(config_of(pp=2, piece=6), world=2, sizes=QWEN3_8B).virtual == 3
    assert choose_layout(config_of(pp=2, vpp=1), world=2, sizes=QWEN3_8B).virtual is None


@pytest.mark.parametrize(
    ("world", "sizes", "short", "message", "hint"),
    [
        (
            2, SMOLLM2, {"tp": 2},
            "{tp} 2 does not divide the model's 9 attention heads (it can be 1, 3)",
            "with 2 process(es) this works: {pp} 2 or every process with the whole "
            "model (leave these flags out)",
        ),
        (
            16, QWEN3_8B, {"tp": 16},
            "{tp} 16 does not divide the model's 8 key-value heads (it can be 1, 2, 4, 8)",
            "{tp} 8 {pp} 2",
        ),
        (
            4, QWEN3_8B, {"tp": 2, "pp": 4},
            "{tp} 2 x {pp} 4 does not divide the 4 process(es)",
            "{tp} 2 {pp} 2",
        ),
        (8, SMOLLM2, {"pp": 4}, "{pp} 4 does not divide the model's 30 layers", ""),
        (
            4, SMOLLM2, {"pp": 4, "first": 6, "last": 6},
            None, "",
        ),
        (
            4, SMOLLM2, {"pp": 4, "last": 7},
            "{pp} 4 with {last} 7 does not divide the "
            "model's 30 layers", "",
        ),
        (1, SMOLLM2, {"vpp": 2}, "{vpp} 2 needs {pp} above 1", ""),
        (
            2, SMOLLM2, {"pp": 2, "vpp": 4},
            "{vpp} 4 does not divide the 15 layers of a pipeline process",
            "with 2 process(es) this works: {pp} 2 or ",
        ),
        (
            2, SMOLLM2, {"pp": 2, "vpp": 3, "piece": 5},
            "{vpp} and {piece} say the same "
            "thing twice", "",
        ),
        (
            8, QWEN3_8B, {"tp": 4, "cp": 2, "kind": "a2a"},
            None, "",
        ),
        (
            8, QWEN3_8B, {"tp": 4, "cp": 4, "kind": "a2a"},
            "{tp} 4 x {cp} 4 does not divide the 8 process(es)", "",
        ),
        (
            16, QWEN3_8B, {"tp": 4, "cp": 4, "kind": "a2a"},
            "{cp} 4 x {tp} 4 does not divide the model's 8 key-value "
            "heads, as --cp_comm_type a2a needs", "",
        ),
        (4, QWEN3_8B, {"ep": 4}, "{ep} 4: the model has no experts", ""),
        (
            6, QWEN3_30B_A3B, {"ep": 6},
            "{ep} 6 does not divide the model's 128 experts", "{ep} 2",
        ),
        (
            8, QWEN3_30B_A3B, {"pp": 2, "ep": 8},
            "{ep} 8 does not divide the 4 process(es) of a pipeline stage",
            "{pp} 2 {ep} 4",
        ),
        (
            8, QWEN3_30B_A3B, {"tp": 2, "ep": 8},
            "{tp} 2 with a mixture of experts needs {sp} true",
            "{tp} 2 {sp} true {ep} 8",
        ),
    ],
)  # fmt: skip
def test_what_is_said(
    world: int, sizes: ModelSizes, short: dict[str, object], message: str | None, hint: str
) -> None:
    if message is None:
        assert choose_layout(config_of(**short), world=world, sizes=sizes).world == world
        return
    flags = {name: f"--{flag}" for name, flag in SHORT.items()}
    found, found_hint = refusal(world, sizes, **short)
    assert found == message.format(**flags)
    assert hint.format(**flags) in found_hint


def test_every_suggestion_is_possible_and_every_chosen_layout_fits_together() -> None:
    """Over many combinations: a layout is consistent, or refused with a suggestion that is consistent."""
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    for sizes, world in itertools.product((SMOLLM2, QWEN3_8B, QWEN3_30B_A3B), (1, 2, 3, 4, 6, 8, 12, 16, 64)):
        for _ in range(12):
            ones = [1] * 5
            config = config_of(
                tp=draw.choice((*ones, 2, 3, 4, 8)), pp=draw.choice((*ones, 2, 3)), cp=draw.choice((1, 1, 2)),
                ep=draw.choice((*ones, 2, 8)), etp=draw.choice((*ones, 2)), sp=draw.random() < 0.7,
                vpp=draw.choice((*[None] * 5, 2, 3)), first=draw.choice((*[None] * 5, 6)),
                kind=draw.choice(("all_gather", "a2a")),
            )  # fmt: skip
            possible = next(find_faults(config, world, sizes), None) is None
            outcomes[possible] += 1
            if not possible:
                suggestions = suggest(config, world, sizes)
                assert suggestions and not [f for s in suggestions for f in find_faults(s, world, sizes)]
                config = suggestions[0]
            layout = choose_layout(config, world=world, sizes=sizes)
            assert layout.tensor * layout.pipeline * layout.context * layout.data == world
            assert layout.expert * layout.expert_tensor * layout.pipeline * layout.expert_data == world
            assert sum(layout.layers) == sizes.layers and len(layout.layers) == layout.pipeline
            assert all(count % (layout.virtual or 1) == 0 for count in layout.layers)
            assert sizes.heads % layout.tensor == sizes.kv_heads % layout.tensor == 0
            assert not (sizes.experts and layout.tensor > 1) or layout.sequence
    assert min(outcomes.values()) > 40


def test_a_possible_layout_is_its_own_nearest() -> None:
    for values in itertools.product((1, 2), (1, 2), (1, 2)):
        config = LayoutConfig(**dict(zip(DEGREES, values, strict=False)))
        assert suggest(config, 8, QWEN3_8B)[0] == config


def test_layers_of_uneven_stages() -> None:
    assert stage_layers(config_of(pp=4, first=6, last=6), 30) == (6, 9, 9, 6)
    assert stage_layers(config_of(pp=2, first=10), 30) == (10, 20)
    assert stage_layers(config_of(pp=2, first=10, last=20), 30) == (10, 20)
    assert stage_layers(config_of(pp=2, first=10, last=10), 30) is None
    assert stage_layers(config_of(pp=2, first=30), 30) is None


def test_rows_of_a_step() -> None:
    layout = choose_layout(config_of(tp=2), world=8, sizes=QWEN3_8B)
    assert micro_batches(layout, global_batch_size=16, micro_batch_size=2) == 2
    with pytest.raises(ConfigError) as caught:
        micro_batches(layout, global_batch_size=20, micro_batch_size=2)
    assert caught.value.message == (
        "--global_batch_size 20 is not a multiple of --micro_batch_size 2 x 4 data parallel processes = 8"
    )
    assert caught.value.hint == "--global_batch_size 16 or 24"
    with pytest.raises(ConfigError) as caught:
        micro_batches(layout, global_batch_size=4, micro_batch_size=2)
    assert caught.value.hint == "--global_batch_size 8"
    pieces = choose_layout(config_of(pp=4, vpp=3), world=4, sizes=QWEN3_8B)
    assert micro_batches(pieces, global_batch_size=16, micro_batch_size=2) == 8
    with pytest.raises(
        ConfigError, match="is 6 micro-batches a process: pieces of layers need a multiple of"
    ):
        micro_batches(pieces, global_batch_size=6, micro_batch_size=1)


def test_numbers_of_a_config() -> None:
    dense = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 500}
    assert model_sizes(dense) == ModelSizes(2, 4, 4, 128, 500)
    moe = dense | {"num_key_value_heads": 2, "num_experts": 8, "moe_intermediate_size": 32}
    assert model_sizes({"text_config": moe}) == ModelSizes(2, 4, 2, 128, 500, experts=8, expert_ffn=32)
    assert model_sizes(dense | {"num_local_experts": 8}).expert_ffn == 128
    assert model_sizes(moe | {"kv_lora_rank": 16}).kv_heads == 4  # each head has keys of its own


def test_a_layout_goes_on_as_a_whole_or_not_at_all() -> None:
    saved = dataclasses.asdict(config_of(tp=2, sp=True))
    kept = [world for world in range(1, 7) if keeps_layout({"lr"}, saved, world)]
    assert kept == [2, 4, 6]
    assert not keeps_layout({"pipeline_model_parallel_size"}, saved, 2)
    assert keeps_layout({"sequence_parallel"}, saved, 2)
    typed = {"tensor_model_parallel_size": 1}  # which is the default, and another layout than before
    run = build(MegatronSftRun, typed)
    assert run.megatron == MegatronConfig() and "given" not in flatten(run)
    assert not keeps_layout(run.given, saved, 2)
    assert describe(MegatronConfig(global_batch_size=4, pipeline_model_parallel_size=2)) == (
        "--pipeline_model_parallel_size 2"
    )


def test_layers_that_are_recomputed_together() -> None:
    def check(chunk: int, **short: object) -> None:
        layout = choose_layout(config_of(**short), world=4, sizes=QWEN3_8B)
        flags = {"recompute_granularity": "full", "recompute_method": "uniform"}
        MegatronConfig(recompute_num_layers=chunk, **flags).check_layers(layout)

    for chunk, short in ((36, {}), (3, {"pp": 4}), (3, {"pp": 4, "vpp": 3}), (2, {"pp": 2, "first": 16})):
        check(chunk, **short)
    for chunk, short, count, fitting in (
        (5, {}, 36, "1, 2, 3, 4, 6, 9, 12, 18, 36"),
        (9, {"pp": 4, "vpp": 3}, 3, "1, 3"),
        (3, {"pp": 2, "first": 16}, 4, "1, 2, 4"),
    ):
        with pytest.raises(ConfigError, match=f"_num_layers {chunk} does not divide the {count} ") as told:
            check(chunk, **short)
        assert told.value.message.endswith(f"(it can be {fitting})")


def test_columns_of_experts_that_products_cannot_take() -> None:
    sizes = dataclasses.replace(QWEN3_30B_A3B, expert_ffn=24, grain=8)
    assert choose_layout(config_of(ep=2), world=2, sizes=sizes).expert == 2
    message, hint = refusal(2, sizes, etp=2)
    assert message == (
        "--expert_tensor_parallel_size 2 leaves 12 columns of an expert to a process: products of experts in "
        "this precision need a multiple of 8"
    )
    assert hint.endswith(" or --expert_model_parallel_size 2")
    message, hint = refusal(2, dataclasses.replace(sizes, expert_ffn=20), ep=2)
    assert message.startswith("the model has 20 columns of an expert to a process: ")
    assert hint == "use swift sft"
