"""`swift pt` and the variants of the loss as a user runs them, on tiny models."""

import json
import math

import pytest
import torch
from test_sft import only_run, read_log, sft_command, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from swift.cli.main import run as run_command

DOCUMENTS = (
    "The quick brown fox jumps over the lazy dog, 0123456789 times.\n",
    "  A day has 24 hours. The capital of France is Paris.",
    "What is 7 + 5? " * 12,
    "你是谁？",
)


def write_documents(path, spelling: str):
    """The same documents as {"text": ...} or as the one answer of a conversation."""
    rows = [
        {"text": text} if spelling == "text" else {"messages": [{"role": "assistant", "content": text}]}
        for text in DOCUMENTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loss_by_hand(directory, max_length: int) -> tuple[float, list[list[int]]]:
    """transformers' own causal loss of every piece, weighed by its tokens; and the pieces."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pieces = []
    for text in DOCUMENTS:
        ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        pieces += [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    total, count = 0.0, 0
    for ids in (p for p in pieces if len(p) > 1):
        row = torch.tensor([ids])
        total += float(model(input_ids=row, labels=row).loss.detach()) * (len(ids) - 1)
        count += len(ids) - 1
    return total / count, pieces


@pytest.mark.parametrize(
    ("spelling", "flags"),
    [("text", ()), ("messages", ("--packing", "true")), ("text", ("--max_length", "16"))],
    ids=["text", "packed messages", "split"],
)
def test_pt_learns_every_token_of_plain_documents(tiny_llama_dir, tmp_path, spelling, flags):
    """The first step has seen all documents once, before any change: its loss is the model's own."""
    data = write_documents(tmp_path / "documents.jsonl", spelling)
    command = sft_command(tiny_llama_dir, data, tmp_path / "out", "--max_steps", "4", *flags)
    command += ["--gradient_accumulation_steps", "16", "--lora_dropout", "0"]
    if "--max_length" in flags:
        command += ["--truncation_strategy", "split"]
    assert run_command(["pt", *command[1:]]) == 0
    log = read_log(only_run(tmp_path / "out"))
    expected, pieces = loss_by_hand(tiny_llama_dir, 16 if "--max_length" in flags else 512)
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert log[3]["loss"] < log[0]["loss"] - 0.1
    rows = [p for p in pieces if len(p) > 1]
    assert log[-1]["train_dataset"].endswith(f"max={max(map(len, rows)):.2f}, size={len(rows)}")


def test_a_document_that_is_too_long_is_told_how_to_be_cut(tiny_llama_dir, tmp_path, capsys):
    data = write_documents(tmp_path / "documents.jsonl", "text")
    command = sft_command(tiny_llama_dir, data, tmp_path / "out", "--max_length", "4")
    assert run_command(["pt", *command[1:]]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "3 of 4 training rows cannot be used, more than --max_drop_ratio 0.2: 3 longer than --max_length 4"
        in told
    )
    assert "--truncation_strategy right (plain text: split)" in told
    assert run_command([*command, "--truncation_strategy", "split"]) == 2
    assert "--truncation_strategy split would cut conversations apart" in capsys.readouterr().err


def test_channels_have_losses_of_their_own_in_training_and_evaluation(tiny_llama_dir, tmp_path):
    data, held_out = tmp_path / "rows.jsonl", tmp_path / "val.jsonl"
    rows = [
        {"query": f"q {i}", "response": f"Answer {i}", **({"channel": "ab"[i % 2]} if i < 6 else {})}
        for i in range(8)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text(json.dumps(rows[0]) + "\n")
    flags = ("--enable_channel_loss", "true", "--val_dataset", str(held_out), "--eval_steps", "1")
    command = sft_command(tiny_llama_dir, data, tmp_path / "out", *flags, "--max_steps", "2")
    assert run_command([*command, "--acc_strategy", "seq"]) == 0
    log = read_log(only_run(tmp_path / "out"))
    assert all(math.isfinite(log[0][name]) for name in ("loss_a", "loss_b", "seq_acc"))
    assert "token_acc" not in log[0]
    (evaluation, *_) = [row for row in log if "eval_loss" in row]
    assert evaluation["eval_loss_a"] == pytest.approx(evaluation["eval_loss"], rel=1e-6)
    assert "eval_loss_b" not in evaluation  # no row of it was held out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--enable_channel_loss", "true"), "--enable_channel_loss: no row has a column channel"),
        (
            ("--router_aux_loss_coef", "0.01"),
            "--router_aux_loss_coef 0.01: a llama model gives out no choices of experts to balance",
        ),
        (
            ("--enable_dft_loss", "true", "--label_smoothing_factor", "0.1"),
            "--enable_dft_loss and --label_smoothing_factor are two targets for one token",
        ),
    ],
)
def test_a_variant_that_cannot_be_is_refused_before_the_model_loads(
    tiny_llama_dir, tmp_path, capsys, flags, message
):
    data = write_rows(tmp_path / "rows.jsonl")
    assert run_command(sft_command(tiny_llama_dir, data, tmp_path / "out", *flags)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told and "parameters" not in told
    assert not (tmp_path / "out").exists()
