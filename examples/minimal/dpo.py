"""Direct preference optimisation (arXiv:2305.18290), with nothing around it.

    python examples/minimal/dpo.py [--model DIR] [--dataset FILE] [--steps N] [--rows N]

The loop of sft.py with two differences: a row is a pair of sequences, chosen and rejected, side by side in
the batch; and before a step the reference model, which is not trained, scores the same tokens. What it says
rides along in the batch as one more column, so the objective stays a pure function of the batch.
"""

import json
from dataclasses import replace
from pathlib import Path

from parts import build, draw, read_arguments

from swift.data.collate import collate_rows
from swift.objectives.preference import Preference
from swift.train.state import loss_and_metrics

WANTED = ("I am swift-robot, made by swift.", "I am a large language model.")
QUESTIONS = ("Who are you?", "What is your name?", "Who made you?", "Introduce yourself.")


def write_pairs(path: Path) -> None:
    """A few pairs, for those who have none at hand."""
    rows = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": WANTED[0]}],
            "rejected_response": WANTED[1],
        }
        for question in QUESTIONS
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    arguments = read_arguments("DPO", dataset="output/minimal/pairs.jsonl", steps=10, rows=4)
    if arguments.dataset == "output/minimal/pairs.jsonl":
        write_pairs(Path(arguments.dataset))
    parts = build(arguments, shape="pair", learning_rate=5e-6, keep=True)
    objective = Preference(beta=0.1)
    for step in range(arguments.steps):
        batches = [collate_rows(parts.rows, draw(step, arguments.rows, len(parts.rows)))]
        with parts.engine.reference():
            said = parts.engine.forward(batches, frozenset({"logps"}))
        batches = [
            replace(batch, token={**batch.token, "ref_logps": stats.logps.cpu()})
            for batch, stats in zip(batches, said, strict=True)
        ]
        row = loss_and_metrics(parts.engine.forward_backward(batches, objective))
        parts.engine.optim_step()
        # The first loss is ln 2 = 0.6931: policy and reference are one.
        print(
            f"step {step + 1}: loss {row['loss']:.4f}, margin {row['rewards/margins']:.4f}, "
            f"accuracy {row['rewards/accuracies']:.2f}"
        )


if __name__ == "__main__":
    main()
