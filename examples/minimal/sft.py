"""Supervised fine-tuning, with nothing around it.

    python examples/minimal/sft.py [--model DIR] [--dataset FILE] [--steps N] [--rows N]

`swift sft` is this loop, with checkpoints, logs, evaluation, several processes and a command line. A step is

    rows -> Batch (flat tokens, labels already shifted)
         -> the engine runs the model and gets TokenStats (log-probabilities of the labels)
         -> the objective turns those into sums (swift/objectives/sft.py)
         -> the engine divides by the step's own count, differentiates and steps.
"""

from parts import build, draw, read_arguments

from swift.data.collate import collate_rows
from swift.objectives.sft import Sft
from swift.train.state import loss_and_metrics


def main() -> None:
    arguments = read_arguments("supervised fine-tuning", dataset="swift/general", steps=10, rows=8)
    parts = build(arguments, shape="chat", learning_rate=5e-5)
    objective = Sft()
    for step in range(arguments.steps):
        chosen = draw(step, arguments.rows, len(parts.rows))
        # Two micro-batches: how a step is cut changes memory and nothing else.
        batches = [collate_rows(parts.rows, half) for half in (chosen[::2], chosen[1::2]) if half]
        sums = parts.engine.forward_backward(batches, objective)
        info = parts.engine.optim_step()
        row = loss_and_metrics(sums)
        print(
            f"step {step + 1}: loss {row['loss']:.4f}, token_acc {row['token_acc']:.3f}, "
            f"grad_norm {info.grad_norm:.3f}"
        )


if __name__ == "__main__":
    main()
