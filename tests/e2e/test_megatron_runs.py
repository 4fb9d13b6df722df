"""Lines of `megatron` as users type them, with small models, small data and our paths in them."""

import json
import re
from pathlib import Path

import pytest

from user_calls import FOLDER, record_calls
from workers import Finished, Workers

EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
DENSE = (("003_12", 1, 2), ("003_12", 2, 4), ("003_14", 0, 4), ("004_21", 0, 2))  # file, line, processes


def typed(folder: Path, name: str, number: int = 0, **values: object) -> list[str]:
    """A line of a note, with other values for flags that it has.

    Comments behind a backslash, at which a shell ends the line, are left out.
    """
    script = (FOLDER / f"{name}.sh").read_text(encoding="utf-8")
    for pattern, text in ((r"^#.*\n", ""), (r"\\ +#.*", r"\\"), (r"^\s*\\?\s*\n", "")):
        script = re.sub(pattern, text, script, flags=re.MULTILINE)
    scratch = folder / f"{name}-{number}-typed"
    scratch.mkdir(parents=True)
    words = record_calls(script, scratch)[number]
    for flag, value in values.items():
        start = words.index(f"--{flag}") + 1
        end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
        words[start:end] = map(str, value if isinstance(value, tuple) else (value,))
    return words[1:] if words[0] == "swift" else words


def done(result: Finished) -> Finished:
    assert result.code == 0, result.stderr[-4000:]
    return result


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {"query": f"Who are you? ({i})" + " more" * (i % 5), "response": f"I am {path.stem}, number {i}."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(workers: Workers, words: list[str], processes: int, save: Path) -> tuple[Path, list[dict]]:
    """The directory of the run, which has what every run of megatron has, and its log."""
    told = done(workers.run(words, processes)).stderr
    if "--tensor_model_parallel_size" in words:
        assert f" accumulated x {processes // 2} group(s) of 2 processes)" in told
    (run,) = [path.parent for path in save.glob("**/logging.jsonl")]
    log = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    last = log[-1]["global_step"]
    assert (run / "latest_checkpointed_iteration.txt").read_text() == f"{last}\n"
    assert (run / f"iter_{last:07d}/.metadata").is_file()
    assert ("--no_save_optim" in words) != (run / f"checkpoint-{last}/scheduler.pt").is_file()
    return run, log


def export_and_ask(
    megatron_workers: Workers, workers: Workers, model: Path, folder: Path, *flags: str
) -> None:
    """The way out: another format, compared, and a question."""
    back = folder / "vx-xxx-hf"
    words = f"export --mcore_model {model} --to_hf true --test_convert_precision true --output_dir {back}"
    result = done(megatron_workers.run([*words.split(), "--torch_dtype", "bfloat16", *flags]))
    assert "token_diff: 0\n" in result.stderr
    rows, answers = folder / "ask.jsonl", folder / "answers.jsonl"
    rows.write_text('{"query": "Who are you?"}\n')
    ask = typed(folder, "004_23", model=back, max_new_tokens=4)
    done(workers.run([*ask, "--val_dataset", str(rows), "--result_path", str(answers)]))
    assert len(answers.read_text().splitlines()) == 1


@pytest.mark.slow
def test_dense_runs_of_the_notes(megatron_workers, workers, make_tiny_model_dir, tmp_path):
    """Converted; trained on two and on four processes, which take the same steps; converted back; asked."""
    model = make_tiny_model_dir(tmp_path, "qwen3", num_hidden_layers=3, tie_word_embeddings=False)
    mcore = tmp_path / "Qwen3-8B-mcore"
    done(megatron_workers.run(typed(tmp_path, "003_12", model=model, output_dir=mcore)))
    data = (write_rows(tmp_path / "a.jsonl", 14), write_rows(tmp_path / "b.jsonl", 6))
    logs = []
    for name, number, processes in DENSE:
        save = tmp_path / f"{name}-{number}"
        values = {"load": mcore, "dataset": data, "save": save, "max_length": 256}
        run, log = train(megatron_workers, typed(tmp_path, name, number, **values), processes, save)
        logs.append(log)
    two, four, evaluated, large = logs
    assert [log[-1]["global_step"] for log in logs] == [2, 6, 6, 2]
    for key in ("loss", "grad_norm"):
        assert four[0][key] == pytest.approx(two[0][key], rel=1e-6)
        assert [row[key] for row in large[:2]] == pytest.approx([row[key] for row in two[:2]], rel=1e-6)
    assert [row["global_step/max_steps"] for row in evaluated if "eval_loss" in row] == ["6/6"]
    assert four[2]["loss"] < four[0]["loss"]
    export_and_ask(megatron_workers, workers, run, tmp_path)


@pytest.mark.slow
def test_runs_of_a_mixture_of_experts_in_the_notes(megatron_workers, workers, make_tiny_model_dir, tmp_path):
    """Packs; experts over four processes, with TP2, with PP2 and with adapters: they begin alike."""
    model = make_tiny_model_dir(tmp_path, "qwen3_moe", tie_word_embeddings=False, **EXPERTS)
    mcore = tmp_path / "mcore"
    to_mcore = f"export --model {model} --to_mcore true --output_dir {mcore} --torch_dtype bfloat16"
    done(megatron_workers.run(to_mcore.split()))
    data = write_rows(tmp_path / "rows.jsonl", 48)
    logs = []
    for name, values in {
        "001_09": {"expert_model_parallel_size": 4, "train_iters": 4, "eval_interval": 2},
        "004_24": {"expert_model_parallel_size": 2, "max_epochs": 1},
        "004_25": {},
    }.items():
        save = tmp_path / name
        words = typed(tmp_path, name, load=mcore, dataset=data, save=save, max_length=128, **values)
        if name == "004_25":
            words += ["--split_dataset_ratio", "0.01"]
        run, log = train(megatron_workers, words, 4, save)
        logs.append(log)
    first, *others = logs
    assert [row["global_step/max_steps"] for row in first if "eval_loss" in row] == ["2/4", "4/4"]
    for log in others:
        for key in ("loss", "aux_loss", "z_loss"):
            assert log[0][key] == pytest.approx(first[0][key], rel=1e-6)
    assert others[0][0]["grad_norm"] == pytest.approx(first[0]["grad_norm"], rel=1e-5)
    export_and_ask(megatron_workers, workers, mcore, tmp_path, "--mcore_adapters", str(run))
