"""`swift rlhf --rlhf_type gkd` on tiny models: the student comes closer to a larger teacher."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_sft import only_run, read_log
from transformers import AutoModelForCausalLM


def write_chats(path: Path) -> Path:
    rows = [{"query": f"Who are you? ({i})", "response": f"I am swift-robot number {i}."} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(student: Path, teacher: Path | None, data: Path, output: Path, *flags: str) -> list[str]:
    return [
        "rlhf", "--rlhf_type", "gkd", "--model", str(student), "--dataset", str(data),
        *(("--teacher_model", str(teacher)) if teacher else ()),
        "--train_type", "full", "--learning_rate", "5e-3", "--lr_scheduler_type", "constant",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--max_steps", "12",
        "--max_completion_length", "16", "--temperature", "1", "--split_dataset_ratio", "0.2",
        "--eval_on_start", "true", "--eval_steps", "12", "--logging_steps", "1", "--report_to", "none",
        "--output_dir", str(output), *flags,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags", [("--lmbda", "0.5"), ("--lmbda", "1", "--train_type", "lora", "--beta", "1")]
)
def test_the_student_comes_closer(workers, tiny_llama_dir, make_tiny_model_dir, tmp_path, flags):
    """Measured on answers of the data that nothing was trained on."""
    teacher = make_tiny_model_dir(tmp_path / "teacher", "qwen3", seed=3, hidden_size=96, num_hidden_layers=3)
    data = write_chats(tmp_path / "chats.jsonl")
    result = workers.run(command(tiny_llama_dir, teacher, data, tmp_path / "out", *flags))
    assert result.code == 0, result.stderr[-3000:]
    before, after = (row["eval_loss"] for row in read_log(only_run(tmp_path / "out")) if "eval_loss" in row)
    assert after < 0.8 * before


def test_the_data_s_own_answers_can_weigh_too(workers, tiny_llama_dir, make_tiny_model_dir, tmp_path):
    teacher = make_tiny_model_dir(tmp_path / "teacher", "llama", seed=3)
    data = write_chats(tmp_path / "chats.jsonl")
    flags = ("--lmbda", "0.5", "--sft_alpha", "0.3", "--gkd_logits_topk", "20", "--max_steps", "4")
    result = workers.run(command(tiny_llama_dir, teacher, data, tmp_path / "out", *flags), 2)
    assert result.code == 0, result.stderr[-3000:]
    rows = [row for row in read_log(only_run(tmp_path / "out")) if "divergence" in row]
    assert len(rows) == 4 and any("nll_loss" in row for row in rows)


def telling(model: Path, most: int) -> Callable[[str, dict], tuple[int, object]]:
    """vLLM's answers of its form, with the numbers of a model; the prompt's own token is always told."""
    teacher = AutoModelForCausalLM.from_pretrained(model).eval()

    def answer(path: str, body: dict) -> tuple[int, object]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "big", "max_model_len": 512}]}
        count, ids = body["prompt_logprobs"], torch.tensor(body["prompt"])
        assert (path, body["model"], body["max_tokens"]) == ("/v1/completions", "big", 1)
        if count > most:
            return 400, {"error": {"message": f"Requested prompt logprobs of {count}, max allowed: {most}"}}
        with torch.no_grad():
            logps = teacher(ids[None]).logits[0].log_softmax(-1)
        told: list[dict | None] = [None]
        for place, token in zip(logps, ids[1:].tolist(), strict=False):
            chosen = {*place.topk(count).indices.tolist(), token}
            told.append({str(i): {"logprob": float(place[i]), "decoded_token": "x"} for i in sorted(chosen)})
        return 200, {"choices": [{"index": 0, "text": "x", "prompt_logprobs": told}]}

    return answer


def test_a_teacher_behind_a_port_teaches_the_same(
    workers, serve, tiny_llama_dir, make_tiny_model_dir, tmp_path
):
    """As the same teacher beside the model, where as many of its tokens are compared."""
    teacher = make_tiny_model_dir(tmp_path / "teacher", "qwen3", seed=3)
    data = write_chats(tmp_path / "chats.jsonl")
    flags = ("--gkd_logits_topk", "12", "--max_steps", "4", "--eval_steps", "4")
    far = ("--teacher_model_server", serve(telling(teacher, 12)))
    logs = []
    for name, given in (("near", ()), ("far", far)):
        beside = None if given else teacher
        result = workers.run(command(tiny_llama_dir, beside, data, tmp_path / name, *flags, *given))
        assert result.code == 0, result.stderr[-3000:]
        rows = read_log(only_run(tmp_path / name))
        logs.append([row.get("loss", row.get("eval_loss")) for row in rows if "epoch" in row])
    assert len(logs[0]) == 6 and logs[1] == pytest.approx(logs[0], rel=1e-4)
    refused = command(tiny_llama_dir, None, data, tmp_path / "out", *far, "--gkd_logits_topk", "13")
    result = workers.run(refused)
    assert result.code == 2 and "refused /v1/completions while the teacher was asked: Requested prompt" in (
        result.stderr
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--rlhf_type gkd needs --teacher_model"),
        (("--teacher_model_server", "http://127.0.0.1:9"), "--teacher_model_server needs --gkd_logits_topk"),
        (("--teacher_model_server", "[{}]"), "--teacher_model_server [{}] is no http://HOST:PORT"),
        (("--teacher_model_server", "http://127.0.0.1:9", "--gkd_logits_topk", "4"),
         "the teacher server 127.0.0.1:9 was lost at the start"),
        (("--teacher_model", "MODEL", "--teacher_model_server", "http://127.0.0.1:9"), "name two"),
        (("--teacher_model", "MODEL", "--beta", "2"), "--beta must be from 0 to 1 with --rlhf_type gkd"),
        (("--teacher_model", "MODEL", "--num_generations", "4"), "--num_generations has no effect"),
        (("--teacher_model", "MODEL", "--streaming", "true"), "does not go with --lmbda above 0 yet"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(workers, tiny_llama_dir, tmp_path, flags, message):
    data = write_chats(tmp_path / "chats.jsonl")
    given = [str(tiny_llama_dir) if flag == "MODEL" else flag for flag in flags]
    arguments = command(tiny_llama_dir, None, data, tmp_path / "out", *given)
    if "--streaming" in flags:
        i = arguments.index("--split_dataset_ratio")
        del (
            arguments[i : i + 2],
            arguments[arguments.index("--eval_on_start") : arguments.index("--eval_steps") + 2],
        )
    result = workers.run(arguments)
    assert result.code == 2 and message in result.stderr, result.stderr[-3000:]
