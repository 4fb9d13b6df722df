"""`swift rlhf` and the scoring tasks of `swift sft` as a user runs them, on a tiny model."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sft import losses, only_run, read_log
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from swift.cli.main import run as run_command
from swift.data.shapes import JUDGE, SHAPES
from swift.data.types import Row

GOOD, BAD = "Thank you for asking.", "Now go away."


def pair(i: int) -> dict:
    return {"query": f"What about {i}?", "response": f"It is {i}. {GOOD}", "rejected_response": f"{i}. {BAD}"}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_pairs(path: Path, count: int = 16) -> Path:
    return write(path, [pair(i) for i in range(count)])


def write_liked(path: Path, count: int = 16) -> Path:
    rows = [
        {
            "query": f"What about {i}?",
            "response": f"It is {i}. {GOOD if i % 2 else BAD}",
            "label": bool(i % 2),
        }
        for i in range(count)
    ]
    return write(path, rows)


SFT_TASKS = ("seq_cls", "embedding", "reranker", "generative_reranker")


def command(kind: str, model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    name = ["sft", "--task_type", kind] if kind in SFT_TASKS else None
    return [
        *(name or ["rlhf", "--rlhf_type", kind]), "--model", str(model), "--dataset", str(data),
        "--output_dir", str(output), "--per_device_train_batch_size", "4", 
        "--gradient_accumulation_steps", "2", "--learning_rate", "5e-3", "--logging_steps", "1",
        "--num_train_epochs", "3", "--report_to", "none", *flags,
    ]  # fmt: skip


def train(*arguments, **keywords) -> Path:
    assert run_command(command(*arguments, **keywords)) == 0
    return only_run(arguments[3])


def read_samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def steps_of(run: Path, name: str) -> list[float]:
    return [row[name] for row in read_log(run) if "loss" in row]


def test_dpo_starts_at_ln_2_learns_and_goes_on_to_the_bit(tiny_llama_dir, tmp_path, capsys):
    data = write_pairs(tmp_path / "pairs.jsonl", 20)
    flags = ("--split_dataset_ratio", "0.2", "--save_steps", "2", "--report_to", "tensorboard")
    run = train("dpo", tiny_llama_dir, data, tmp_path / "out", *flags)
    told = capsys.readouterr().err
    assert GOOD in told and BAD in told  # both answers of the row that is shown
    first, *_, last = [row for row in read_log(run) if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {first[f"rewards/{n}"] for n in ("chosen", "rejected", "margins", "accuracies")} == {0.0}
    assert last["loss"] < 0.3 and last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert {"logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"} <= last.keys()
    evaluated = next(row for row in reversed(read_log(run)) if "eval_loss" in row)
    assert evaluated["eval_rewards/accuracies"] == 1.0
    curve, before = losses(run), load_file(run / "last" / "adapter_model.safetensors")
    shown = read_samples(run)
    assert run_command(["rlhf", "--resume_from_checkpoint", str(run / "checkpoint-2")]) == 0
    assert losses(run) == curve and read_samples(run) == shown
    after = load_file(run / "last" / "adapter_model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)
    last_shown = shown[-4:]  # all held-out pairs, so their mean is the metric's
    assert [row["chosen"].endswith(GOOD) and row["rejected"].endswith(BAD) for row in last_shown] == [
        True
    ] * 4
    assert all(row["prompt"].startswith("user\nWhat about") for row in last_shown)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        mean = sum(row[name] for row in last_shown) / 4
        assert mean == pytest.approx(evaluated[f"eval_{name}"], abs=1e-6), name
    events = EventAccumulator(str(run / "runs"))
    events.Reload()
    tables = events.Tensors("eval/samples/text_summary")
    assert {table.step for table in tables} == {2, 4, 6}  # of text its reader purges nothing
    told = tables[-1].tensor_proto.string_val[0].decode()
    assert told.startswith("| prompt | chosen | rejected | rewards/") and told.count(GOOD) == 4


def test_the_curve_knows_nothing_of_layouts(tiny_llama_dir, tmp_path):
    """Micro-batches, packs, and a reference that was run beforehand, with all weights trained."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    flags = (
        "--train_type",
        "full",
        "--save_strategy",
        "no",
        "--learning_rate",
        "1e-3",
        "--num_train_epochs",
        "2",
    )
    layouts = {
        "plain": (),
        "one": ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"),
        "before": ("--precompute_ref_log_probs", "true"),
        "cached": ("--precompute_ref_log_probs", "true", "--padding_free", "false"),
    }
    curves = {
        name: [row[1:] for row in losses(train("dpo", tiny_llama_dir, data, tmp_path / name, *flags, *more))]
        for name, more in layouts.items()
    }
    for name in layouts:
        assert sum(curves[name], ()) == pytest.approx(sum(curves["plain"], ()), rel=2e-5), name
    whole = ("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1")
    packed = ("--packing", "true", "--packing_length", "200")
    curves = [
        losses(train("dpo", tiny_llama_dir, data, tmp_path / name, *flags, *whole, *more))
        for name, more in (("packed", packed), ("rows", ()))
    ]
    assert [row[1] for row in curves[0]] == pytest.approx([row[1] for row in curves[1]], rel=2e-5)


def test_another_reference_model(tiny_llama_dir, make_tiny_model_dir, tmp_path):
    """The first loss is that of the margin between the two models, computed from their own losses."""
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    other = make_tiny_model_dir(tmp_path, seed=5)
    flags = ("--train_type", "full", "--save_strategy", "no", "--max_steps", "1", "--ref_model", str(other))
    run = train("dpo", tiny_llama_dir, data, tmp_path / "out", *flags)
    (row,) = (row for row in read_log(run) if "loss" in row)
    assert abs(row["loss"] - math.log(2)) > 1e-3
    assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)


def test_a_reference_that_follows_the_model(tiny_llama_dir, make_tiny_model_dir, tmp_path, capsys):
    """Every second step it takes 60 % of the model; a run that goes on has the one of its checkpoint."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    flags = ("--train_type", "full", "--learning_rate", "1e-3", "--sync_ref_model", "true")
    flags = (*flags, "--ref_model_sync_steps", "2")
    run = train("dpo", tiny_llama_dir, data, tmp_path / "out", *flags, "--save_steps", "2")
    curve = losses(run)
    start = load_file(tiny_llama_dir / "model.safetensors")
    trained = load_file(run / "checkpoint-2" / "model.safetensors")
    kept = load_file(run / "checkpoint-2" / "reference" / "model.safetensors")
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, 0.4 * start[name] + 0.6 * trained[name], rtol=2e-7, atol=1e-8)
    last = load_file(run / "last" / "model.safetensors")
    for step in ("2", "4"):
        assert run_command(["rlhf", "--resume_from_checkpoint", str(run / f"checkpoint-{step}")]) == 0
        assert losses(run) == curve
        assert all((last[k] == v).all() for k, v in load_file(run / "last" / "model.safetensors").items())
    equal = ("--ref_model_mixup_alpha", "1", "--save_strategy", "no")
    again = losses(train("dpo", tiny_llama_dir, data, tmp_path / "one", *flags, *equal))
    assert [row[1] == pytest.approx(math.log(2), abs=1e-6) for row in again] == [True, False] * 3
    other = make_tiny_model_dir(tmp_path, num_hidden_layers=1)
    capsys.readouterr()
    mistake = ("--ref_model", str(other), "--max_drop_ratio", "1")
    assert run_command(command("dpo", tiny_llama_dir, data, tmp_path / "no", *flags, *mistake)) == 2
    assert "the num_hidden_layers of --model and --ref_model are 2 and 1" in capsys.readouterr().err


def test_lists_of_a_step_on_any_processes(workers, tiny_llama_dir, tmp_path):
    """Sorted lists span the step, and a reference that follows the model is sliced like it."""
    data = write_pairs(tmp_path / "pairs.jsonl", 15)  # the last step has seven pairs
    flags = (
        "--loss_type", "aot", "aot_pair", "--train_type", "full", "--learning_rate", "1e-3",
        "--save_strategy", "no", "--sync_ref_model", "true", "--ref_model_sync_steps", "1",
    )  # fmt: skip
    curves = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        cut = ("--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(steps))
        curves.append(losses(train("dpo", tiny_llama_dir, data, tmp_path / f"{size}", *flags, *cut)))
    sliced = ("--fsdp", "fsdp2", "--gradient_accumulation_steps", "1")
    arguments = command("dpo", tiny_llama_dir, data, tmp_path / "sliced", *flags, *sliced)
    result = workers.run(arguments, processes=2)
    assert result.code == 0, result.stderr[-3000:]
    curves.append(losses(only_run(tmp_path / "sliced")))
    assert len(curves[0]) == 6 and curves[0][-1][1] < curves[0][0][1]
    for curve in curves[1:]:
        numbers, expected = ([x for row in rows for x in row[1:]] for rows in (curve, curves[0]))
        assert numbers == pytest.approx(expected, rel=3e-5)


@pytest.mark.parametrize("kind", ["orpo", "simpo", "cpo"])
def test_methods_without_a_reference_learn(kind, tiny_llama_dir, tmp_path):
    run = train(
        kind, tiny_llama_dir, write_pairs(tmp_path / "p.jsonl"), tmp_path / "out", "--save_strategy", "no"
    )
    assert steps_of(run, "loss")[-1] < steps_of(run, "loss")[0] - 0.3
    assert steps_of(run, "rewards/margins")[-1] > steps_of(run, "rewards/margins")[0]


@pytest.mark.parametrize("losses_named", [("bco_pair",), ("aot", "sigmoid"), ("apo_zero", "sft")])
def test_losses_that_need_more_than_a_pair(losses_named, tiny_llama_dir, tmp_path):
    flags = ("--loss_type", *losses_named, "--save_steps", "2")
    run = train("dpo", tiny_llama_dir, write_pairs(tmp_path / "p.jsonl"), tmp_path / "out", *flags)
    curve = losses(run)
    assert curve[-1][1] < curve[0][1] - 0.1
    assert run_command(["rlhf", "--resume_from_checkpoint", str(run / "checkpoint-2")]) == 0
    assert losses(run) == curve  # running means are part of a checkpoint


def test_kto_learns_from_single_answers_in_any_layout(tiny_llama_dir, tmp_path):
    data = write_liked(tmp_path / "liked.jsonl")
    held_out = write_liked(tmp_path / "held_out.jsonl", 4)
    flags = (
        "--save_strategy",
        "no",
        "--lora_dropout",
        "0",
        "--eval_steps",
        "6",
        "--val_dataset",
        str(held_out),
    )
    run = train("kto", tiny_llama_dir, data, tmp_path / "out", *flags)
    log = [row for row in read_log(run) if "loss" in row]
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-6) and log[0]["kl"] == 0
    evaluated = read_log(run)[-2]
    assert log[0]["rewards/accuracies"] == 0 and log[-1]["rewards/accuracies"] > 0.8
    assert evaluated["eval_rewards/margins"] > 0.3 and evaluated["eval_kl"] >= 0
    margins = evaluated["eval_rewards/chosen"] - evaluated["eval_rewards/rejected"]
    assert evaluated["eval_rewards/margins"] == pytest.approx(margins)
    one = read_samples(run)[-1]  # of a row that is liked
    assert one["answer"].endswith(GOOD) and "rewards/rejected" not in one and one["rewards/chosen"] > 0
    small = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8")
    again = train("kto", tiny_llama_dir, data, tmp_path / "one", *flags, *small)
    for name in ("loss", "grad_norm", "kl"):
        assert steps_of(again, name) == pytest.approx(steps_of(run, name), rel=3e-5, abs=1e-7), name


def test_kto_needs_its_reference_also_after_it_was_run_beforehand(tiny_llama_dir, tmp_path):
    """Its estimate asks about answers to other prompts, which change with every step."""
    data = write_liked(tmp_path / "liked.jsonl")
    flags = ("--train_type", "full", "--learning_rate", "1e-3", "--max_steps", "3", "--save_strategy", "no")
    plain = train("kto", tiny_llama_dir, data, tmp_path / "plain", *flags)
    before = train("kto", tiny_llama_dir, data, tmp_path / "b", *flags, "--precompute_ref_log_probs", "true")
    for name in ("loss", "kl", "grad_norm"):
        assert steps_of(before, name) == pytest.approx(steps_of(plain, name), rel=2e-5, abs=1e-7), name


@pytest.mark.parametrize("kind", ["dpo", "kto", "rm"])
def test_a_stream_trains_as_the_rows_themselves_do(kind, tiny_llama_dir, tmp_path):
    """Over the ends of two passes; a run that goes on is the unbroken one."""
    write_them = write_liked if kind == "kto" else write_pairs
    data = write_them(tmp_path / "rows.jsonl", 12)
    flags = ("--train_dataloader_shuffle", "false", "--max_steps", "6", "--save_steps", "3")
    rows = losses(train(kind, tiny_llama_dir, data, tmp_path / "rows", *flags))
    packing = ("--packing", "true", "--packing_length", "128") if kind == "dpo" else ()
    for name, more in (("stream", ()), ("packed", (*packing, "--shuffle_buffer_size", "5"))):
        run = train(kind, tiny_llama_dir, data, tmp_path / name, *flags, "--streaming", "true", *more)
        curve = losses(run)
        assert name == "packed" or curve == rows
        assert run_command(["rlhf", "--resume_from_checkpoint", str(run / "checkpoint-3")]) == 0
        assert losses(run) == curve


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_process_without_rows_waits_for_nobody(kind, workers, tiny_llama_dir, tmp_path):
    """Three rows on two processes: in the last step one has none, whatever was computed beforehand."""
    rows = write_pairs(tmp_path / "p.jsonl", 3) if kind == "dpo" else write_liked(tmp_path / "l.jsonl", 3)
    flags = (
        "--train_type", "full", "--learning_rate", "1e-3", "--num_train_epochs", "1", "--save_strategy", "no",
        "--per_device_train_batch_size", "1", "--gradient_accumulation_steps",
    )  # fmt: skip
    single = train(kind, tiny_llama_dir, rows, tmp_path / "single", *flags, "2")
    for name, more in (("run", ()), ("known", ("--precompute_ref_log_probs", "true"))):
        arguments = command(kind, tiny_llama_dir, rows, tmp_path / name, *flags, "1", *more)
        result = workers.run(arguments, processes=2)
        assert result.code == 0, result.stderr[-3000:]
        ours, theirs = losses(only_run(tmp_path / name)), losses(single)
        assert len(ours) == 2 and [row[1:] for row in ours] == [
            pytest.approx(row[1:], rel=2e-5) for row in theirs
        ]


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_a_reward_model_scores_texts_and_loads_anywhere(train_type, tiny_llama_dir, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    run = train(
        "rm", tiny_llama_dir, data, tmp_path / "out", "--train_type", train_type, "--num_train_epochs", "5"
    )
    assert steps_of(run, "rewards/accuracies")[-1] == 1.0
    texts = [{"query": "What about 3?", "response": f"It is 3. {end}"} for end in (GOOD, BAD)]
    asked, scores = write(tmp_path / "texts.jsonl", texts), tmp_path / "scores.jsonl"
    source, found = run / "last", ["--adapters" if train_type == "lora" else "--model"]
    score = ["infer", "--val_dataset", str(asked), "--max_batch_size", "2", "--result_path"]
    assert run_command([*score, str(scores), *found, str(source)]) == 0
    good, bad = (json.loads(line)["score"] for line in scores.read_text().splitlines())
    assert good > bad + 1
    if train_type == "lora":
        source = tmp_path / "merged"
        merge = ["export", "--merge_lora", "true", "--output_dir", str(source), "--adapters"]
        assert run_command([*merge, str(run / "last")]) == 0
        merged_scores = tmp_path / "merged.jsonl"
        assert run_command([*score, str(merged_scores), "--model", str(source)]) == 0
        merged = [json.loads(line)["score"] for line in merged_scores.read_text().splitlines()]
        assert merged == pytest.approx([good, bad], abs=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    chats = [
        [{"role": "user", "content": t["query"]}, {"role": "assistant", "content": t["response"]}]
        for t in texts
    ]
    ids = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**ids).logits[:, 0].tolist()
    assert theirs == pytest.approx([good, bad], abs=1e-4)


TASKS = {
    "seq_cls": (
        [{"query": f"{'apple' if i % 2 else 'stone'} {i}", "label": i % 2} for i in range(16)],
        ("--num_labels", "2"),
    ),
    "several classes": (
        [
            {
                "query": f"{'apple ' * (i % 2)}{'stone' * (i % 3 == 0)} {i}",
                "label": [0] * (i % 2) + [2] * (i % 3 == 0),
            }
            for i in range(16)
        ],
        ("--num_labels", "3", "--problem_type", "multi_label_classification"),
    ),
    "embedding": (
        [
            {"query": f"text {i}", "response": f"{i} {GOOD if i % 2 else BAD}", "label": i % 2}
            for i in range(16)
        ],
        (),
    ),
    "infonce": (
        [
            {
                "messages": [{"role": "user", "content": f"text {i}"}],
                "positive_messages": [[{"role": "user", "content": f"{i} again"}]],
                "negative_messages": [[{"role": "user", "content": f"other {i + j}"}] for j in (1, 2)],
            }
            for i in range(16)
        ],
        ("--loss_type", "infonce"),
    ),
    "reranker": (
        [
            {
                "messages": [{"role": "user", "content": f"find {i}"}],
                "positive_messages": [[{"role": "assistant", "content": f"{i}. {GOOD}"}]],
                "negative_messages": [[{"role": "assistant", "content": f"{i}. {BAD}"}]],
            }
            for i in range(16)
        ],
        ("--loss_type", "listwise_reranker"),
    ),
}
TASKS["generative_reranker"] = (TASKS["reranker"][0], ("--loss_type", "generative_reranker"))


@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_of_whole_texts_learn_in_any_layout(name, tiny_llama_dir, tmp_path, monkeypatch):
    rows, flags = TASKS[name]
    for kind, token in {"POSITIVE": "y", "NEGATIVE": "n"}.items():
        monkeypatch.setenv(f"GENERATIVE_RERANKER_{kind}_TOKEN", token)
    data = write(tmp_path / "rows.jsonl", rows)
    kind = {"infonce": "embedding", "several classes": "seq_cls"}.get(name, name)
    flags = (
        *flags,
        "--train_type",
        "full",
        "--learning_rate",
        "2e-3",
        "--save_strategy",
        "no",
        "--num_train_epochs",
        "5",
    )
    curve = losses(train(kind, tiny_llama_dir, data, tmp_path / "out", *flags))
    learned = 0.99 if name == "generative_reranker" else 0.7  # all of its texts end alike
    assert curve[-1][1] < learned * curve[0][1]
    if name != "infonce":  # whose candidates are those of the micro-batch
        flags = (
            *flags,
            "--per_device_train_batch_size",
            "2",
            "--gradient_accumulation_steps",
            "4",
            "--padding_free",
            "false",
        )
        again = losses(train(kind, tiny_llama_dir, data, tmp_path / "cut", *flags))
        assert [row[1] for row in again] == pytest.approx([row[1] for row in curve], rel=1e-4)


def test_several_classes_are_read_off_a_checkpoint(tiny_llama_dir, tmp_path, capfd):
    rows, flags = TASKS["several classes"]
    data, scores = write(tmp_path / "rows.jsonl", rows), tmp_path / "scores.jsonl"
    run = train("seq_cls", tiny_llama_dir, data, tmp_path / "out", *flags, "--num_train_epochs", "12")
    assert steps_of(run, "acc")[-1] > steps_of(run, "acc")[0]
    found = ["--adapters", str(run / "last"), "--max_batch_size", "4", "--result_path", str(scores)]
    assert run_command(["infer", "--val_dataset", str(data), *found]) == 0
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    for line in lines:
        assert json.loads(line["response"]) == [i for i, p in enumerate(line["probabilities"]) if p > 0.5]
    right = [json.loads(line["response"]) == line["labels"] for line in lines]
    assert sum(right) >= 12
    capfd.readouterr()
    for label, shown in (([0, 3], "[0, 3]"), (1, "1"), ("one", "one")):
        write(data, [*rows[:2], {"query": "x", "label": label}])
        assert run_command(command("seq_cls", tiny_llama_dir, data, tmp_path / "no", *flags)) == 2
        said = " ".join(capfd.readouterr().err.split())
        assert (
            f"rows.jsonl line 3: label {shown} is not a list of classes from 0 to 2 (--num_labels 3)" in said
        )


MISTAKES = {
    "no rejected answer": (
        "dpo",
        [pair(0), {"query": "q", "response": "a"}],
        (),
        ["rows.jsonl:2", "no rejected answer"],
    ),
    "equal answers": (
        "dpo",
        [{**pair(0), "rejected_response": pair(0)["response"]}],
        (),
        ["chosen and rejected are the same", "rows.jsonl:1"],
    ),
    "one kind of label": (
        "kto",
        [{"query": "q", "response": "a", "label": True}] * 4,
        (),
        ["all 4 training rows are liked", "--rlhf_type kto"],
    ),
    "no label": ("kto", [{"query": "q", "response": "a"}], (), ["no label", "rows.jsonl:1"]),
    "a step of one row": (
        "kto",
        [{"query": "q", "response": "a", "label": i % 2} for i in range(4)],
        ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"),
        ["a step has one row", "--gradient_accumulation_steps"],
    ),
    "reference with adapters": (
        "dpo",
        [pair(0)],
        ("--ref_model", "x"),
        ["--ref_model", "--train_type lora", "leave --ref_model out"],
    ),
    "flag of another method": (
        "kto",
        [pair(0)],
        ("--rpo_alpha", "1"),
        ["--rpo_alpha has no effect with --rlhf_type kto"],
    ),
    "a stream scored beforehand": (
        "dpo",
        [pair(0)],
        ("--streaming", "true", "--max_steps", "1", "--precompute_ref_log_probs", "true"),
        ["--streaming true does not go with --precompute_ref_log_probs"],
    ),
    "unknown loss": (
        "dpo",
        [pair(0)],
        ("--loss_type", "sigmoide"),
        ["--loss_type sigmoide is not a loss of --rlhf_type dpo"],
    ),
    "weights": (
        "dpo",
        [pair(0)],
        ("--loss_type", "sigmoid", "sft", "--loss_weights", "1"),
        ["--loss_weights has 1 values for 2"],
    ),
    "no moving reference": (
        "dpo",
        [pair(0)],
        ("--sync_ref_model", "true"),
        ["--sync_ref_model true cannot be combined with --train_type lora", "--train_type full"],
    ),
    "adapters out of the weights": (
        "dpo",
        [pair(0)],
        ("--init_weights", "pissa"),
        ["--init_weights pissa changes the weights"],
    ),
    "class out of range": (
        "seq_cls",
        [{"query": "q", "label": 3}],
        ("--num_labels", "2"),
        ["rows.jsonl line 1", "label 3 is not a class from 0 to 1"],
    ),
    "number of classes": (
        "seq_cls",
        [{"query": "q", "label": 1}],
        (),
        ["--task_type seq_cls needs --num_labels"],
    ),
    "no partner": ("embedding", [{"query": "q", "label": 1}], (), ["no positive_messages", "rows.jsonl:1"]),
}


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes_are_told_before_weights_load(name, tiny_llama_dir, tmp_path, capfd):
    kind, rows, flags, expected = MISTAKES[name]
    data = write(tmp_path / "rows.jsonl", rows)
    flags = (*flags, "--max_drop_ratio", "0.2")
    assert run_command(command(kind, tiny_llama_dir, data, tmp_path / "out", *flags)) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert all(part in said.replace(" line ", ":") or part in said for part in expected), said
    assert "parameters" not in said and not (tmp_path / "out").exists()


def test_a_language_model_is_no_reward_model(tiny_llama_dir, tmp_path, capfd):
    """Adapters of one kind on the other, and a head that is not there."""
    data = write_pairs(tmp_path / "pairs.jsonl", 8)
    run = train("rm", tiny_llama_dir, data, tmp_path / "out", "--max_steps", "1")
    assert run_command(["infer", "--adapters", str(run / "last")]) == 2
    assert "gives scores, not answers" in capfd.readouterr().err


def test_a_verdict_has_to_be_a_token(tiny_llama_dir, tmp_path, capfd):
    data = write(tmp_path / "rows.jsonl", TASKS["reranker"][0])
    assert run_command(command("generative_reranker", tiny_llama_dir, data, tmp_path / "out")) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "error: --task_type generative_reranker: the tokenizer has no token 'yes'" in said
    assert "name another one with GENERATIVE_RERANKER_POSITIVE_TOKEN" in said


def test_a_pair_is_judged_as_its_model_card_says() -> None:
    columns = {"messages": [{"role": "system", "content": "Find it."}, {"role": "user", "content": "Where?"}],
               "positive_messages": ["Here."], "negative_messages": ["There."]}  # fmt: skip
    samples = SHAPES["judged"].read(Row(columns, "f", 1)).samples
    texts = [[message["content"] for message in sample.messages] for sample in samples]
    assert [text[1] for text in texts] == [
        f"<Instruct>: Find it.\n<Query>: Where?\n<Document>: {place}." for place in ("Here", "There")
    ]
    assert {text[0] for text in texts} == {JUDGE}
