"""JSONL of 100,000 chats to token ids with labels, ours and a peer's, one after the other.

    python benchmarks/encode_100k.py MODEL_DIR [--peer-python PYTHON] [--rows 100000] [--processes 2]

Prints one JSON line a side: rows per second from opening the file to the end (imports and the tokenizer not
counted, starting worker processes counted), and the peak of the resident memory of the process and its
children together, sampled ten times a second. A second line of ours is the start from the cache. PYTHON is an
interpreter in which ms-swift is installed; encode_100k_peer.py runs there. Word frequencies are Zipf's, over
30,000 made-up words, with numbers, punctuation and line ends; about 1.4 kB and one to three rounds a row.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer

from swift.config.data import DataConfig
from swift.config.template import TemplateConfig
from swift.data.cache import encode_cached
from swift.data.encode import Encoder
from swift.data.sources import open_rows
from swift.template.chat import ChatTemplate

SYLLABLES = """
ba ce di fo gu la me ni po ru sa te vi xo zu tra ple sto cri ment ing er tion al
""".split()  # noqa: SIM905
MAX_LENGTH = 2048


def write_rows(path: Path, count: int) -> None:
    """The same rows every time."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(30_000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(low: int, high: int) -> str:
        chosen = draw.choices(words, cum_weights=weights, k=draw.randint(low, high))
        for _ in range(len(chosen) // 12):
            place = draw.randrange(len(chosen))
            word, number = chosen[place], str(draw.randrange(2000))
            chosen[place] = draw.choice((f"{word}.", f"{word},", number, "-"))
        return " ".join(chosen).capitalize().replace(" - ", "\n- ")

    with path.open("w", encoding="utf-8") as handle:
        for _ in range(count):
            messages = []
            for _ in range(draw.choice((1, 1, 2, 3))):
                messages.append({"role": "user", "content": text(8, 40) + "?"})
                messages.append({"role": "assistant", "content": text(30, 160) + "."})
            handle.write(json.dumps({"messages": messages}) + "\n")


def encode_ours(model: str, data: str, processes: int) -> None:
    template = ChatTemplate(AutoTokenizer.from_pretrained(model), TemplateConfig())
    for what in ("encoded", "from the cache"):
        start = time.perf_counter()
        rows = open_rows([data], seed=42, shuffle=False, columns={})
        config = DataConfig(dataset_num_proc=processes)
        dataset, _ = encode_cached(rows, Encoder(template, MAX_LENGTH), config)
        seconds = time.perf_counter() - start
        figures = {"rows": len(dataset), "tokens": dataset.num_tokens, "trained": dataset.num_trained}
        print(json.dumps({"what": what, "seconds": round(seconds, 2), **figures}), flush=True)


def tree_memory_bytes(root: int) -> int:
    """Resident memory of a process and all below it."""
    parents, resident = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)], resident[int(entry.name)] = int(fields[1]), int(fields[21])
    wanted, total = [root], 0
    while wanted:
        process = wanted.pop()
        total += resident.get(process, 0)
        wanted += [child for child, parent in parents.items() if parent == process]
    return total * os.sysconf("SC_PAGE_SIZE")


def measure(side: str, command: list[str], cache: str) -> None:
    process = subprocess.Popen(
        command,
        env={**os.environ, "SWIFT_CACHE": cache, "HF_DATASETS_CACHE": cache, "MODELSCOPE_CACHE": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory_bytes(process.pid))
        time.sleep(0.1)
    assert process.stdout is not None
    for line in process.stdout.read().splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            found["rows_per_second"] = round(found["rows"] / found["seconds"])
            print(json.dumps({"side": side, **found, "peak_memory_mib": peak >> 20}), flush=True)
    if process.returncode:
        print(json.dumps({"side": side, "failed": process.returncode}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--peer-python")
    parser.add_argument("--only", help="encode this file, in this process")
    options = parser.parse_args()
    if options.only:
        encode_ours(options.model, options.only, options.processes)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chats.jsonl"
        write_rows(data, options.rows)
        print(json.dumps({"megabytes": round(data.stat().st_size / 1e6, 1)}), flush=True)
        given = [options.model, "--only", str(data), "--processes", str(options.processes)]
        measure("swift", [sys.executable, __file__, *given], folder)
        if options.peer_python:
            peer = Path(__file__).with_name("encode_100k_peer.py")
            measure("ms-swift", [options.peer_python, str(peer), *given], folder)


if __name__ == "__main__":
    main()
