"""Labelling with the vLLM engine against one offline `LLM.chat` call over all prompts: the share of its rate.

    python benchmarks/vllm_engine.py [--model embedded] [--rows 200] [--rounds 3] [--json FILE]

On a GPU, each of the two takes `--memory` of it (0.4). Ours reads and checks the rows, renders, asks, stores each answer and
each row, and writes the output; the offline call has its messages before the clock starts. They take turns, each with prompts
of its own, as vLLM answers faster what it has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from over_http import rows

rival: Any = None  # of this process


class Ours:
    def __init__(self, model: str, memory: float) -> None:
        import torch

        from rlaif.labeler import Labeler

        options = {"gpu_memory_utilization": memory, "max_model_len": 4096} if torch.cuda.is_available() else {}
        self._labeler = Labeler(engine="vllm", model=model, both_orders=False, options=options)
        self._engine = self._labeler.make_engine(self._labeler.pace)
        self._loop = asyncio.new_event_loop()

    def seconds(self, first: int, count: int) -> float:
        from rlaif.data import comparisons
        from rlaif.job import Job

        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "rows.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows(first, count)), encoding="utf-8")
            items = partial(comparisons, str(source))
            begun = time.perf_counter()
            job = Job(str(source), Path(folder) / "out.jsonl", items, self._labeler.pairwise())
            self._loop.run_until_complete(job.work(self._engine, self._labeler.pace, job.check()))
            return time.perf_counter() - begun

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())


class Offline:
    def __init__(self, model: str, memory: float) -> None:
        import torch
        from vllm import LLM

        if model == "embedded":
            from rlaif.engines.embedded import embedded_model

            model = str(embedded_model())
        gpu = torch.cuda.is_available()
        more = {"gpu_memory_utilization": memory} if gpu else {"enforce_eager": True}
        self._llm = LLM(model, dtype="bfloat16", max_model_len=4096, enable_prefix_caching=True, **more)

    def seconds(self, first: int, count: int) -> float:
        from vllm import SamplingParams

        from rlaif.prompts import load_template

        template = load_template("general")
        asked = [
            template.render(prompt=row["prompt"], response_1=row["response_a"], response_2=row["response_b"], row=row)[0]
            for row in rows(first, count)
        ]
        begun = time.perf_counter()
        found = self._llm.chat(
            [list(one) for one in asked], SamplingParams(max_tokens=1, temperature=0, logprobs=20), use_tqdm=False
        )
        assert len(found) == count
        return time.perf_counter() - begun

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def start(kind: type[Any], model: str, memory: float) -> None:
    global rival  # one for each process
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    rival = kind(model, memory)


def stop() -> None:
    """End its processes, for which this one would wait."""
    rival.close()


def measure(first: int, count: int) -> float:
    return float(rival.seconds(first, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=0.4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    kinds = {"offline": Offline, "ours": Ours}
    pools = {who: ProcessPoolExecutor(1, spawn, start, (kind, given.model, given.memory)) for who, kind in kinds.items()}
    rates: dict[str, list[float]] = {who: [] for who in kinds}
    first = 20_000
    for number in range(given.rounds + 1):
        for who in sorted(kinds, reverse=bool(number % 2)):
            count = given.rows if number else given.rows // 4  # the first is slower
            rate = count / pools[who].submit(measure, first, count).result()
            first += count
            if number:
                rates[who].append(rate)
                print(f"round {number}  {who:8} {rate:8.2f} labels a second", flush=True)
    middle = {who: statistics.median(found) for who, found in rates.items()}
    share = middle["ours"] / middle["offline"]
    print(f"share of the offline call's rate: {share:.3f}")
    if given.json:
        told = {"model": given.model, "rows": given.rows, "labels_a_second": middle, "share": share, "rounds": rates}
        given.json.write_text(json.dumps(told, indent=1) + "\n")
    for pool in pools.values():
        pool.submit(stop)
        pool.shutdown()


if __name__ == "__main__":
    main()
