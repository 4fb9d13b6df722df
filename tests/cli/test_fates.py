"""Every flag that users of earlier tools may type has one fate in every command where they may type it.

upstream_flags.tsv lists their flags: the class that declares each, and the versions that have it.
"""

import re
from pathlib import Path

import pytest

from swift.cli.commands import COMMANDS, Command, find_command, load
from swift.cli.fates import Fate, load_fates
from swift.cli.flags import knobs_of
from swift.cli.main import run
from swift.cli.values import EXPECTED, kind_of
from swift.config.megatron import MegatronConfig
from swift.config.option import iterate_knobs

TRAIN = ("pt", "sft", "rlhf")
SERVE = ("infer", "deploy", "rollout", "eval", "app")
PLAIN = {
    c.title for c in COMMANDS if c.name not in ("web-ui", "merge-lora", "dataset", "launch", "plan")
}  # two are ours
MEGATRON = {c.title for c in COMMANDS if c.program == "megatron"}
INNER = {"TeacherServerConfig", "TeacherOutput", "DataCache"}  # not parsed from a command line


def titles(program: str, *names: str) -> set[str]:
    return {f"{program} {name}" for name in names}


# which commands parse the flags of a class, by a pattern of its name; the first that matches counts
COMMANDS_OF = (
    (r"MegatronTrainArguments|MegatronSftArguments", titles("megatron", *TRAIN)),
    (r"MegatronPretrainArguments", titles("megatron", "pt")),
    (r"MegatronRLHFArguments|RLHFMegatronArgumentsMixin", titles("megatron", "rlhf")),
    (r"MegatronExportArguments", titles("megatron", "export")),
    (r".*Megatron.*", MEGATRON),
    (r"(Base|Compat|Data|Generation|Model|Quantize|Template)Arguments", PLAIN),
    (r"(Reward|Teacher|PPO|GRPO|RLHF|Rollout.*Mixin|DPO|GKD).*", titles("swift", "rlhf")),
    (
        r"(Seq2Seq|Swanlab|TrainArguments|SftArguments|Tuner|SwiftArguments).*",
        titles("swift", *TRAIN),
    ),
    (r"PretrainArguments", titles("swift", "pt")),
    (r"AppArguments", titles("swift", "app")),
    (r"DeployArguments", titles("swift", "deploy", "rollout", "eval", "app")),
    (r"RolloutArguments", titles("swift", "rollout")),
    (r"EvalArguments", titles("swift", "eval")),
    (r"SamplingArguments", titles("swift", "sample")),
    (r"ExportArguments", titles("swift", "export", "merge-lora")),
    (r"MergeArguments", titles("swift", "export", *SERVE)),
    (r"VllmArguments", titles("swift", "rlhf", *SERVE)),
    (r"(Lmdeploy|Sglang|Infer)Arguments", titles("swift", *SERVE)),
    (r"WebUIArguments", titles("swift", "app", "web-ui")),
)


def read_upstream() -> list[tuple[str, str]]:
    """(class, flag) pairs."""
    lines = Path(__file__).with_name("upstream_flags.tsv").read_text(encoding="utf-8").splitlines()
    return [(owner, flag) for owner, flag, _ in (line.split("\t") for line in lines[1:])]


def rows_of(command: Command, flag: str) -> list[Fate]:
    return [row for row in load_fates() if row.flag == flag and row.scope & command.scopes]


def commands_of_class(owner: str) -> set[str]:
    return next(found for pattern, found in COMMANDS_OF if re.fullmatch(pattern, owner))


def test_upstream_flags_are_all_here() -> None:
    pairs = read_upstream()
    assert len(pairs) == 1165
    assert len({flag for _, flag in pairs}) > 800
    assert {"train_type", "tuner_type", "recompute_granularity", "neftune_noise_alpha"} <= {
        f for _, f in pairs
    }


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.title)
def test_every_upstream_flag_of_a_command_has_a_fate(command: Command) -> None:
    knobs = knobs_of(command)
    pairs = [(c, f) for c, f in read_upstream() if c not in INNER and command.title in commands_of_class(c)]
    assert [pair for pair in pairs if pair[1] not in knobs and not rows_of(command, pair[1])] == []


def test_inner_fields_have_a_fate_too() -> None:
    command = find_command("swift", "sft")
    inner = [flag for owner, flag in read_upstream() if owner in INNER]
    assert len(inner) == 7
    assert {rows_of(command, flag)[0].fate for flag in inner} == {"refused"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.title)
def test_no_flag_has_two_fates_in_a_command(command: Command) -> None:
    names = [row.flag for row in load_fates() if row.scope & command.scopes]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_every_row_reaches_a_command() -> None:
    """A row that a new config field has overtaken everywhere is to be deleted."""
    knobs = {command: knobs_of(command) for command in COMMANDS}
    dead = [
        row.flag
        for row in load_fates()
        if not any(row.scope & c.scopes and row.flag not in knobs[c] for c in COMMANDS)
    ]
    assert dead == []


def test_rows_for_megatron_alone_overrule_what_it_inherits_and_nothing_else() -> None:
    own = {knob.name for knob in iterate_knobs(MegatronConfig)}
    for command in (c for c in COMMANDS if c.title in titles("megatron", *TRAIN)):
        assert own <= set(knobs_of(command)), command.title
        inherited = {knob.name for knob in iterate_knobs(load(command.config))} - set(knobs_of(command))
        assert {"fsdp", "attn_impl", "quant_method", "optim"} <= inherited
        assert {rows_of(command, name)[0].fate for name in inherited} == {"alias", "later", "refused"}


def test_values_with_a_fate_belong_to_fields() -> None:
    """A row NAME=VALUE is about a supported flag, and a value with a field's own meaning needs no row."""
    for row in (row for row in load_fates() if "=" in row.flag):
        name, value = row.flag.split("=")
        found = [knobs_of(c)[name] for c in COMMANDS if row.scope & c.scopes and name in knobs_of(c)]
        assert found, row.flag
        assert value not in found[0].choices, row.flag
        assert row.fate != "alias" or row.target in found[0].choices


def test_rows_are_well_formed() -> None:
    words = {"both", "swift", "megatron", "train", "serve"} | {c.name for c in COMMANDS}
    for row in load_fates():
        assert row.fate in ("alias", "later", "unneeded", "refused"), row
        assert all(set(token.split(":")) <= words for token in row.scope), row
        assert row.note != "-" or row.fate == "later", row
        if row.fate in ("later", "refused") and "=" not in row.flag:
            assert row.kind in EXPECTED, row
            row.default_value  # noqa: B018 - it parses, or ConfigError fails the test
    names = [row.flag.lower() for row in load_fates()]
    assert names == sorted(names)


def test_aliases_lead_to_a_flag_of_the_same_command() -> None:
    for row in (row for row in load_fates() if row.fate == "alias" and "=" not in row.flag):
        for command in (c for c in COMMANDS if row.scope & c.scopes and c.name != "web-ui"):
            if row.flag in knobs_of(command):
                continue
            targets = rows_of(command, row.target)
            assert row.target in knobs_of(command) or targets, (row.flag, command.title)
            assert not targets or targets[0].fate != "alias" or row.target in knobs_of(command)


def test_every_field_of_a_config_can_be_typed() -> None:
    for command in COMMANDS:
        for name, knob in knobs_of(command).items():
            assert kind_of(knob) in EXPECTED
            assert knob.help, name
            assert re.fullmatch(r"[a-z][a-z0-9_]*", name)


def test_refused_flag_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "--use_galore", "true", "--vera_rank", "8", "--print_config"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: --use_galore is not supported: GaLore is not here; use --train_type lora or full",
        "error: --vera_rank is not supported: VeRA is not here; use --train_type lora or full",
    ]


def test_refused_flag_at_its_default_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "--use_galore", "false", "--tuner_backend", "peft", "--print_config"]) == 0
    assert capsys.readouterr().err == ""


def test_refused_and_later_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "--train_type", "longlora", "--print_config"]) == 2
    assert "--train_type longlora is not supported: use lora or full" in capsys.readouterr().err
    assert run(["sft", "--report_to", "wandb", "tensorboard", "--print_config"]) == 0
    assert "report_to: [wandb, tensorboard]\n" in capsys.readouterr().out
    assert run(["sft", "--report_to", "paper", "--print_config"]) == 2
    assert (
        "--report_to must be one of tensorboard, wandb, swanlab, mlflow, all, none, got paper"
        in capsys.readouterr().err
    )


def test_unneeded_flag_has_no_effect_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "--print_config"]) == 0
    plain = capsys.readouterr().out
    assert run(["sft", "--model_type", "qwen3", "--check_model", "false", "--print_config"]) == 0
    captured = capsys.readouterr()
    assert captured.out == plain
    assert captured.err.splitlines() == [
        "note: --model_type has no effect: the model's own config.json says what it is",
        "note: --check_model has no effect: a local model is never looked up in a hub",
    ]


def test_variable_without_effect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_LM_PATH", "/data/Megatron-LM")
    assert run(["sft", "--print_config"], program="megatron") == 0
    assert capsys.readouterr().err.startswith("note: MEGATRON_LM_PATH has no effect: ")


def test_alias_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["sft", "--tuner-type", "full", "--tuner-type", "lora", "--dtype", "bf16", "--print_config"]) == 0
    )
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "note: --tuner-type is --train_type here",
        "note: --dtype is --torch_dtype here",
        "warning: --tuner-type is given 2 times; the last one counts",
    ]
    assert "train_type: lora\n" in captured.out and "torch_dtype: bfloat16\n" in captured.out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--no_gradient_accumulation_fusion", "true"], "gradient_accumulation_fusion: false"),
        (["--no_gradient_accumulation_fusion"], "gradient_accumulation_fusion: false"),
        (["--no_gradient_accumulation_fusion", "0"], "gradient_accumulation_fusion: true"),
        (["--load", "DIR"], "mcore_model: DIR"),
        (["--save", "DIR"], "output_dir: DIR"),
    ],
)
def test_megatron_spellings(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", *words, "--print_config"], program="megatron") == 0
    assert f"\n{line}\n" in capsys.readouterr().out


def test_alias_of_a_switch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sft", "--use_cpu", "--print_config"]) == 0
    assert "\ndevice: cpu\n" in capsys.readouterr().out
    assert run(["sft", "--device", "cuda:1", "--use_cpu", "false", "--print_config"]) == 0
    assert "\ndevice: cuda:1\n" in capsys.readouterr().out
