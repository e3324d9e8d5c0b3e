"""What Ray costs: rows a second of a local cluster's workers against one process, as a ratio, in one run.

    make .venv-ray/ready && .venv-ray/bin/python benchmarks/cluster.py [--rows 1280] [--workers 2] [--rounds 2] [--json FILE]

The mock engine takes a tenth of a second a call, drawn lognormal, and 16 rows are in flight in each worker: so what is
measured is how well workers are kept busy, not how fast this machine is. Each time is that of twice the rows less that of the
rows, which leaves out how long everything takes to start; that is told too, and does not grow with the work. `--rows` is a
multiple of 640 times the workers, so that each has as many shards.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOCK = ("--engine", "mock", "-E", "latency=0.1", "-E", "spread=0.5", "--concurrency", "16")
SHARDS = (160, 640)


def write(path: Path, rows: int) -> Path:
    row = {"response_a": "The first answer [q=1]", "response_b": "The second answer [q=0]"}
    path.write_text("".join(json.dumps({"prompt": f"Question {n}?", **row}) + "\n" for n in range(rows)))
    return path


def seconds(data: Path, *options: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "rlaif.cli", "label", str(data), "-o", f"{folder}/o.jsonl", *MOCK, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1280)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    spread = ("--ray", "local", "--workers", str(given.workers), "--shard-rows")
    ways = {"one process": (), **{f"{given.workers} workers, shards of {n}": (*spread, str(n)) for n in SHARDS}}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        once, twice = (write(Path(folder) / f"{n}.jsonl", n * given.rows) for n in (1, 2))
        for _ in range(given.rounds):
            for name, options in ways.items():
                times[name].append((seconds(once, *options), seconds(twice, *options)))
    found = {}
    for name, pairs in times.items():
        rate = given.rows / statistics.median(long - short for short, long in pairs)
        start = statistics.median(2 * short - long for short, long in pairs)
        found[name] = {"rows_per_second": round(rate, 1), "start_seconds": round(start, 1)}
    base = found["one process"]["rows_per_second"]
    for name, one in found.items():
        one["ratio"] = round(one["rows_per_second"] / base, 2)
        print(f"{name:32} {one['rows_per_second']:8.1f} rows/s  ×{one['ratio']:.2f}   {one['start_seconds']:5.1f} s to start")
    if given.json:
        given.json.write_text(json.dumps({"settings": {**vars(given), "json": None}, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
