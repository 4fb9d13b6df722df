"""Rows per second from columns to token ids with labels.

    taskset -c 0 python benchmarks/encode_rows.py MODEL_DIR [--rows 5000] [--passes 8] [--num-proc 1]

Prints one JSON line. Loading of the tokenizer and of the rows is not counted; the rows are short chats like
those of an instruction set (about 10 words asked, 25 answered). Every pass encodes all rows. The best pass by
processor time is what one core does when little else runs on it; the median by the clock is what was seen.
"""

import argparse
import json
import os
import random
import statistics
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core for one process

from transformers import AutoTokenizer

from swift.config.data import DataConfig
from swift.config.template import TemplateConfig
from swift.data.encode import Encoder, encode_rows
from swift.data.types import Row
from swift.template.chat import ChatTemplate

WORDS = """
the of and to in is that it was for on are as with his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some
capital answer question model language France twelve because however together science history simple explain
"""


def synthetic_rows(count: int) -> list[Row]:
    """The same rows every time."""
    draw, vocabulary = random.Random(0), WORDS.split()

    def words(low: int, high: int) -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(low, high))).capitalize()

    def messages() -> list[dict[str, str]]:
        question, answer = words(6, 14) + "?", words(15, 35) + "."
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    return [Row({"messages": messages()}, "synthetic", number) for number in range(1, count + 1)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--num-proc", type=int, default=1)
    options = parser.parse_args()
    data_config = DataConfig(dataset_num_proc=options.num_proc)
    template = ChatTemplate(AutoTokenizer.from_pretrained(options.model), TemplateConfig())
    rows = synthetic_rows(options.rows)
    wall, processor = [], []
    for _ in range(options.passes):
        start = time.perf_counter(), time.process_time()
        dataset, _ = encode_rows(rows, Encoder(template, 2048), data_config)
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    result = {
        "rows": len(rows),
        "tokens_per_row": round(dataset.num_tokens / len(rows), 1),
        "processes": options.num_proc,
        "best_rows_per_processor_second": round(len(rows) / min(processor)),
        "median_rows_per_second": round(len(rows) / statistics.median(wall)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
