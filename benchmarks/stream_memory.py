"""Peak memory of a training run on a large JSONL file, read as a stream or encoded first.

    python benchmarks/stream_memory.py MODEL_DIR [--gigabytes 2] [--steps 20] [--packing]

MODEL_DIR holds a tiny model: what is measured is the way of the rows. Prints one JSON line for each way: some
steps are trained on a stream; the whole stream is encoded and made into batches, by one process beside the
one that reads; the file is encoded before it is trained on. `peak_rss_mib` adds up the resident memory of all
processes and counts what they share (libraries, above all) once for each; `peak_pss_mib` counts it once. Both
are sampled five times a second. Pages of mapped files (the encoded rows) count, though they are given back
when memory is short. The rows are those of encode_100k.py, 20,000 of them again and again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from encode_100k import write_rows
from transformers import AutoTokenizer

from swift.config.data import DataConfig
from swift.config.template import TemplateConfig
from swift.data.encode import Encoder
from swift.data.feed import StreamFeed
from swift.data.stream import EncodedStream, open_stream
from swift.template.chat import ChatTemplate

MAX_LENGTH = 2048


def read_all(model: str, data: str, packing: bool) -> None:
    """Every batch of one pass, made as the training loop has them made."""
    source = open_stream(DataConfig(dataset=(data,), streaming=True), seed=42, use_hf=False, token=None)
    template = ChatTemplate(AutoTokenizer.from_pretrained(model), TemplateConfig())
    encoder = Encoder(template, MAX_LENGTH, "delete", strict=False)
    stream = EncodedStream(source, encoder, capacity=MAX_LENGTH if packing else None)
    feed, step = StreamFeed(stream, micro_batch_size=1, accumulation=16), 0
    while stream.position.epoch == 0:
        feed.batches(step, 0)
        step += 1
    feed.close()


def tree_memory_bytes(root: int) -> tuple[int, int]:
    """Resident and proportional memory of a process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    wanted, sums = [root], {"Rss": 0, "Pss": 0}
    while wanted:
        process = wanted.pop()
        wanted += [child for child, parent in parents.items() if parent == process]
        try:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                name = line.partition(":")[0]
                if name in sums:
                    sums[name] += int(line.split()[1]) * 1024
        except OSError:
            continue
    return sums["Rss"], sums["Pss"]


def measure(what: str, command: list[str], cache: str) -> None:
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "SWIFT_CACHE": cache, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks = (0, 0)
    while process.poll() is None:
        peaks = tuple(map(max, peaks, tree_memory_bytes(process.pid)))
        time.sleep(0.2)
    found = {
        "what": what,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mib": peaks[0] >> 20,
        "peak_pss_mib": peaks[1] >> 20,
    }
    if process.returncode:
        assert process.stderr is not None
        found["failed"] = process.stderr.read()[-500:]
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--ways", nargs="+", default=["trained", "read", "encoded"])
    parser.add_argument("--read", help="read this file as a stream, in this process")
    parser.add_argument("--directory", help="where the file is made; none = the system's temporary directory")
    options = parser.parse_args()
    if options.read:
        read_all(options.model, options.read, options.packing)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        data, part = Path(folder) / "chats.jsonl", Path(folder) / "part.jsonl"
        write_rows(part, 20_000)
        with data.open("wb") as handle:
            while handle.tell() < options.gigabytes * 1e9 - 1e7:
                handle.write(part.read_bytes())
        print(json.dumps({"gigabytes": round(data.stat().st_size / 1e9, 2)}), flush=True)
        flags = [
            "-m", "swift", "sft", "--model", options.model, "--dataset", str(data), "--save_strategy", "no",
            "--max_steps", str(options.steps), "--max_length", str(MAX_LENGTH), "--report_to", "none",
            "--packing", str(options.packing).lower(), "--output_dir", f"{folder}/output",
        ]  # fmt: skip
        ways = {
            "trained": ("steps of a stream", [*flags, "--streaming", "true"]),
            "read": ("stream read to its end", [__file__, options.model, "--read", str(data)]),
            "encoded": ("encoded before training", [*flags, "--dataset_num_proc", "2"]),
        }
        for name in options.ways:
            what, command = ways[name]
            measure(
                what,
                [sys.executable, *command, *(["--packing"] * (name == "read" and options.packing))],
                folder,
            )


if __name__ == "__main__":
    main()
