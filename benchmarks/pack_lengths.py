"""Seconds and fill of packing, beside the `binpacking` package (pip install binpacking) on the same lengths.

    python benchmarks/pack_lengths.py [--rows 1000000] [--capacity 8192] [--whole 10000 30000]

Lengths are log-normal (6.3, 0.9), clipped to [16, 8192], seed 1. `binpacking` looks at every open bin for
every row, so on a million rows at once it would take days: it is run whole on the first `--whole` rows, and
on all of them as trainers use it, in groups of 1,000 rows whose last bin is carried into the next group.
Prints one JSON line a measurement; `times_faster` compares with ours on as many rows.
"""

import argparse
import json
import time
from collections.abc import Callable

import binpacking
import numpy as np

from swift.data.pack import pack_lengths

GROUP = 1_000


def draw_lengths(count: int) -> np.ndarray:
    lengths = np.random.RandomState(1).lognormal(6.3, 0.9, count)
    return np.clip(lengths, 16, 8192).astype(np.int64)


def pack_whole(lengths: np.ndarray, capacity: int) -> int:
    """Packs made by `binpacking` from all lengths at once."""
    return len(binpacking.to_constant_volume(list(enumerate(lengths.tolist())), capacity, weight_pos=1))


def pack_groups(lengths: np.ndarray, capacity: int) -> int:
    """Packs made by `binpacking` from group after group."""
    items = list(enumerate(lengths.tolist()))
    packs, carried = 0, []
    for start in range(0, len(items), GROUP):
        *done, carried = binpacking.to_constant_volume(
            carried + items[start : start + GROUP], capacity, weight_pos=1
        )
        packs += len(done)
    return packs + 1


def measure(name: str, pack: Callable[[], int], lengths: np.ndarray, capacity: int) -> float:
    """Runs once, prints, returns the seconds."""
    started = time.perf_counter()
    packs = pack()
    seconds = time.perf_counter() - started
    fill = 100 * lengths.sum() / (packs * capacity)
    result = {"what": name, "rows": len(lengths), "seconds": round(seconds, 3), "packs": packs}
    print(json.dumps(result | {"fill_percent": round(float(fill), 3)}), flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--whole", type=int, nargs="*", default=[10_000, 30_000])
    options = parser.parse_args()
    lengths, capacity = draw_lengths(options.rows), options.capacity
    theirs = [("binpacking, whole", pack_whole, count) for count in options.whole]
    for name, other, count in [*theirs, ("binpacking, groups", pack_groups, options.rows)]:
        part = lengths[:count]
        ours = measure("ours", lambda part=part: len(pack_lengths(part, capacity)), part, capacity)
        seconds = measure(name, lambda part=part, other=other: other(part, capacity), part, capacity)
        print(json.dumps({"rows": count, "against": name, "times_faster": round(seconds / ours, 1)}))


if __name__ == "__main__":
    main()
