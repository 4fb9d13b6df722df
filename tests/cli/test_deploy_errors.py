"""`swift deploy` with flags that cannot work: one line each, before any weight is loaded."""

import itertools
import json
import sys
from pathlib import Path

import pytest

from swift.cli.main import run
from swift.config.option import ConfigError, build
from swift.config.runs import DeployRun
from swift.infer.server_models import Plan, Source
from swift.infer.server_vllm import build_command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """As far as anything is read before weights are: none of these commands may get to them."""
    path = tmp_path / "tiny"
    path.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer.json").write_text("{}")
    return path


def adapter(path: Path, base: str, **config: object) -> Path:
    path.mkdir()
    settings = {"base_model_name_or_path": base, "peft_type": "LORA", **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    (path / "adapter_model.safetensors").write_bytes(b"")
    return path


def deploy(capsys: pytest.CaptureFixture[str], *flags: object) -> list[str]:
    assert run(["deploy", "--port", "0", *map(str, flags)]) == 2
    return capsys.readouterr().err.splitlines()


def test_flags_that_contradict_each_other(capsys, model) -> None:
    assert deploy(capsys)[0] == "error: --model or --adapters is missing"
    for flags, message in (
        ("--adapters a b", "--adapters a b: several need a name each"),
        ("--adapters x=a x=b", "--adapters x=a x=b: several need a name each"),
        ("--adapters x=a b", "--adapters x=a b: several need a name each"),
        ("--adapters x=a --served_model_name x", "--served_model_name x is also a name in --adapters"),
        ("--ssl_keyfile key.pem", "--ssl_keyfile needs --ssl_certfile"),
        ("--ssl_certfile cert.pem", "--ssl_certfile needs --ssl_keyfile"),
        ("--stream true", "--stream has no effect on swift deploy: each request says whether it streams"),
        ("--port 70000", "--port must be from 0 to 65535, got 70000"),
        ("--infer_backend lmdeploy", "--infer_backend lmdeploy is not supported: use transformers or vllm"),
        ("--val_dataset a.jsonl", "--val_dataset is not supported: swift infer answers the rows of a file"),
        ("--top_k -2", "--top_k must be at least -1, got -2"),
        ("--merge_lora true --adapters x=a", "--merge_lora takes one checkpoint without a name"),
        ("--attn_impl sdpa", "--attn_impl has no effect on swift deploy, which has an attention of its own"),
        ("--host 300.1.1.1", "--host 300.1.1.1: "),
        ("--host 192.0.2.1", "--host 192.0.2.1 --port 0: Cannot assign requested address"),
        ("--ssl_certfile a --ssl_keyfile b", "--ssl_certfile a is no file"),
    ):
        assert deploy(capsys, "--model", model, *flags.split())[0].startswith(f"error: {message}")


def test_a_certificate_that_is_none(capsys, model, tmp_path) -> None:
    for name in ("cert", "key"):
        (tmp_path / name).write_text("nonsense")
    flags = ("--ssl_certfile", tmp_path / "cert", "--ssl_keyfile", tmp_path / "key")
    told = deploy(capsys, "--model", model, *flags)
    assert told[0].startswith(f"error: --ssl_certfile {tmp_path}/cert and --ssl_keyfile {tmp_path}/key: ")
    assert told[1] == "hint: a certificate and its private key, both PEM"


def test_adapters_that_do_not_go_together(capsys, model, tmp_path) -> None:
    first, second = adapter(tmp_path / "a", str(model)), adapter(tmp_path / "b", "other/model")
    told = deploy(capsys, "--adapters", f"x={first}", f"y={second}")
    assert told == [
        f"error: --adapters are of different models: {first} of {model}, {second} of other/model",
        "hint: name theirs with --model",
    ]
    told = deploy(capsys, "--adapters", f"tiny={first}")
    assert told[0] == "error: --adapters tiny=... has the name of the model"


def test_what_gives_scores_is_not_served(capsys, model) -> None:
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    assert deploy(capsys, "--model", model)[0] == f"error: {model} gives scores, not answers"


def test_a_model_that_cannot_answer_many_at_once(capsys, model) -> None:
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    told = deploy(capsys, "--model", model)
    assert told[0] == f"error: {model} cannot be served, because its attention cannot be replaced"


def test_packages_that_are_missing_are_named(capsys, model, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert deploy(capsys, "--model", model) == [
        "error: swift deploy needs the package uvicorn",
        "hint: pip install 'swiftune[serve]'",
    ]


def plan_of(flags: str, model: Path, adapters: dict[str, Path | None] | None = None) -> Plan:
    values = dict(zip(*[iter(flags.split())] * 2, strict=True))
    values = {name: json.loads(text) if text[0] in "0123456789t" else text for name, text in values.items()}
    run = build(DeployRun, {"model": str(model), "infer_backend": "vllm", **values})
    places = adapters or {"tiny": None}
    return Plan(run, model, tuple(Source(name, path, run.template) for name, path in places.items()))


def test_vllm_is_told_everything_that_was_typed(model, tmp_path) -> None:
    first, second = adapter(tmp_path / "a", str(model), r=4), adapter(tmp_path / "b", str(model), r=48)
    flags = "temperature 0.5 max_new_tokens 9 host ::1 port 8001 api_key sesame torch_dtype float32"
    words = build_command(plan_of(flags, model, {"tiny": None, "x": first, "y": second}))
    assert words[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert words[-3:] == ["--lora-modules", f"x={first}", f"y={second}"]
    pairs = dict(itertools.pairwise(words))
    expected = {
        "model": str(model), "host": "::1", "port": "8001", "served-model-name": "tiny", "dtype": "float32",
        "max-lora-rank": "64", "max-loras": "2", "seed": "42",
        "override-generation-config": '{"temperature": 0.5, "max_new_tokens": 9}',
    }  # fmt: skip
    assert {name: pairs[f"--{name}"] for name in expected} == expected
    assert "--enable-lora" in words
    assert "sesame" not in " ".join(words)
    # A checkpoint without a name is the model; the weights below it need another name.
    words = build_command(plan_of("port 8001", model, {"tiny": first}))
    assert words[words.index("--served-model-name") + 1] == "tiny-base"
    assert words[-1] == f"tiny={first}"


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        ("max_batch_size 5", "--vllm_max_num_seqs"),
        ("system Hi", "each request says it"),
        ("result_path a", "leave it out"),
        ("max_length 5", "--vllm_max_model_len"),
    ],
)
def test_what_vllm_has_no_word_for_is_refused(model, flags, hint) -> None:
    with pytest.raises(ConfigError) as caught:
        build_command(plan_of(flags, model))
    assert caught.value.message == f"--{flags} has no effect with --infer_backend vllm"
    assert caught.value.hint.startswith(hint)
