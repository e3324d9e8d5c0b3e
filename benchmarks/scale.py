"""A million comparisons through the mock engine: memory, time a row, the store's size, and continuing the finished run.

    python benchmarks/scale.py [--rows 1000000] [--out FOLDER] [--json FILE]

One order a row, so one call each, with texts of the sample set. Every tenth of the rows its time and the resident memory are
noted. The store is held against the raw text: that of the rows and of the answers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlaif.data import comparisons
from rlaif.job import Job
from rlaif.labeler import Labeler
from rlaif.progress import Progress

SAMPLES = Path(__file__).parents[1] / "rlaif" / "samples" / "comparisons.jsonl"
PAGE = resource.getpagesize() / 2**20


def memory() -> float:
    """Resident MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def write(path: Path, count: int) -> None:
    kept = ("prompt", "response_a", "response_b")
    known = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            row = {"id": str(n), **{name: f"{known[n % len(known)][name]} {n}" for name in kept}}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Watched(Progress):
    """Notes time and memory at each tenth of the rows."""

    marks: list[dict[str, float]] = []  # noqa: RUF012

    def update(self, done: int, facts: str) -> None:
        if done * 10 // self.total > (done - 1) * 10 // self.total:
            now = {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
            self.marks.append({"rows": done, **now, "rss_mib": memory()})
            print(f"{done:9,} rows {memory():8.1f} MiB  {facts}", flush=True)


def size(path: Path) -> int:
    return sum(own.stat().st_size for own in path.parent.glob(path.name + "*"))


def run(job: Job, labeler: Labeler) -> dict[str, Any]:
    begun = time.perf_counter()
    total = job.check()
    checked = time.perf_counter()
    report = job.run(labeler.make_engine(labeler.pace), labeler.pace, total)
    ended = time.perf_counter()
    return {"report": report, "checked_s": checked - begun, "run_s": ended - checked, "ended": ended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "rlaif-scale")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    source = given.out / "rows.jsonl"
    write(source, given.rows)
    labeler = Labeler(engine="mock", both_orders=False)
    job = Job(str(source), given.out / "labels.jsonl", partial(comparisons, str(source)), labeler.pairwise())
    import rlaif.job

    rlaif.job.Progress = Watched  # type: ignore[misc]
    first = run(job, labeler)
    marks = Watched.marks
    spans, cpu = (
        [(b[clock] - a[clock]) / (b["rows"] - a["rows"]) * 1e3 for a, b in pairwise(marks)]
        for clock in ("seconds", "cpu_seconds")
    )
    again = run(job, labeler)
    assert again["report"]["this_run"]["calls"] == 0
    text = source.stat().st_size
    found = {
        "rows": given.rows,
        "ms_a_row": spans,
        "cpu_ms_a_row": cpu,
        "last_to_second_tenth": spans[-1] / spans[0],
        "last_to_second_tenth_cpu": cpu[-1] / cpu[0],
        "check_s": first["checked_s"],
        "write_s": first["ended"] - marks[-1]["seconds"],
        "rss_mib": [mark["rss_mib"] for mark in marks],
        "rss_added_by_the_last_nine_tenths_mib": marks[-1]["rss_mib"] - marks[0]["rss_mib"],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "source_mb": text / 1e6,
        "store_mb": size(job.store_path) / 1e6,
        "store_to_text": size(job.store_path) / text,
        "out_mb": job.out.stat().st_size / 1e6,
        "continue_finished_s": again["checked_s"] + again["run_s"],
        "cpus": os.cpu_count(),
    }
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
