"""Labelling over HTTP against a bare aiohttp window of the same width, and against distilabel, on one loopback server.

    python benchmarks/over_http.py [--distilabel .venv-distilabel/bin/python] [--json FILE]

Three cases, each rival by turns in every round: `tail` (latency lognormal, mean 0.2 s, σ 1.0, 50 in flight, 1,000 rows; the
share of the bare window's rate), `none` (a server that answers at once: our own milliseconds a request over the bare
window's), `limit` (a server that allows so many requests a second, which our window has to find).
The bare window sends the very bodies that we send, made before the clock starts, and reads the choices' log-probabilities; we
read and check the rows, render, ask, store each answer and each row, and write the output and the run file.
The server, a process of its own, draws the same latencies for each rival.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

SAMPLES = Path(__file__).parents[1] / "rlaif" / "samples" / "comparisons.jsonl"

# ---------------------------------------------------------------- the server


class Served:
    """Answers each chat request after a drawn time; with `allowed` a second, in a bucket of a tenth of it, others get 429."""

    def __init__(self) -> None:
        self.reset({})

    def reset(self, settings: dict[str, float]) -> None:
        self.draw = random.Random(7)
        self.latency, self.sigma = settings.get("latency", 0.0), settings.get("sigma", 1.0)
        self.allowed = settings.get("allowed", 0.0)
        self.bucket, self.filled = self.allowed / 10, time.monotonic()
        self.times: list[float] = []
        self.refused = 0

    async def chat(self, request: web.Request) -> web.Response:
        await request.read()
        if self.allowed and not self._let_in():
            self.refused += 1
            return web.json_response({"error": {"message": "slow down"}}, status=429)
        self.times.append(time.monotonic())
        if self.latency:
            await asyncio.sleep(self.draw.lognormvariate(math.log(self.latency) - self.sigma**2 / 2, self.sigma))
        return web.Response(body=ANSWER, content_type="application/json")

    def _let_in(self) -> bool:
        now = time.monotonic()
        self.bucket = min(self.bucket + (now - self.filled) * self.allowed, self.allowed / 10)
        self.filled = now
        let_in = self.bucket >= 1
        self.bucket -= let_in
        return let_in

    async def settings(self, request: web.Request) -> web.Response:
        told = {"times": self.times, "refused": self.refused}
        self.reset(await request.json())
        return web.json_response(told)

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "me"}]})


def _answer() -> bytes:
    top = [{"token": str(n), "logprob": -0.5 - n, "bytes": [48 + n]} for n in range(1, 21)]
    choice = {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": "1"},
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
    }
    usage = {"prompt_tokens": 400, "completion_tokens": 1, "total_tokens": 401}
    whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(whole).encode()


ANSWER = _answer()


async def serve() -> None:
    served = Served()
    app = web.Application()
    app.router.add_get("/v1/models", served.models)
    app.router.add_post("/v1/chat/completions", served.chat)
    app.router.add_post("/settings", served.settings)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


# ---------------------------------------------------------------- the rivals


def rows(first: int, count: int) -> list[dict[str, Any]]:
    """Comparisons of the sample set, with a number before each prompt: the same request would be sent once."""
    known = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
    kept = ("response_a", "response_b")
    made = ((n, known[n % len(known)]) for n in range(first, first + count))
    return [{"id": str(n), "prompt": f"{n}. {row['prompt']}", **{name: row[name] for name in kept}} for n, row in made]


def job(folder: Path, url: str, first: int, count: int, width: int | None) -> tuple[Any, Any]:
    """The job of labelling so many rows, in one order, and its labeler."""
    from rlaif.data import comparisons
    from rlaif.job import Job
    from rlaif.labeler import Labeler

    labeler = Labeler(engine="openai", base_url=url, model="m", both_orders=False, concurrency=width)
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(first, count)), encoding="utf-8")
    return Job(str(source), folder / "out.jsonl", partial(comparisons, str(source)), labeler.pairwise()), labeler


def ours(url: str, count: int, width: int | None, first: int = 0) -> float:
    """Seconds to label so many rows, from the first look at the file to the run file."""
    with tempfile.TemporaryDirectory() as folder:
        work, labeler = job(Path(folder), url, first, count, width)
        engine = labeler.make_engine(labeler.pace)
        begun = time.perf_counter()
        work.run(engine, labeler.pace, work.check())
        return time.perf_counter() - begun


def bodies(url: str, count: int, first: int = 0) -> list[bytes]:
    """What `ours` sends, in its order."""
    sent: list[bytes] = []
    with tempfile.TemporaryDirectory() as folder:
        work, labeler = job(Path(folder), url, first, count, 1)
        engine = labeler.make_engine(labeler.pace)

        async def post(server: Any, body: bytes) -> bytes:
            sent.append(body)
            return ANSWER

        engine._post = post
        work.run(engine, labeler.pace, work.check())
    return sent


def bare(url: str, sent: list[bytes], width: int) -> float:
    """Seconds for a window of so many calls in flight over the bodies."""

    async def whole() -> float:
        pending, found = iter(sent), []

        async def work(session: aiohttp.ClientSession) -> None:
            for body in pending:
                async with session.post(url + "/chat/completions", data=body) as response:
                    answer = json.loads(await response.read())
                found.append({t["token"]: t["logprob"] for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]})

        headers = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
            begun = time.perf_counter()
            await asyncio.gather(*(work(session) for _ in range(width)))
            assert len(found) == len(sent)
            return time.perf_counter() - begun

    return asyncio.run(whole())


DISTILABEL = """
import json, os, sys, time
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration
url, width, texts = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
with Pipeline() as pipeline:
    load = LoadDataFromDicts(data=[{"instruction": text} for text in texts], batch_size=width)
    llm = OpenAILLM(model="m", base_url=url, api_key="none", generation_kwargs={"max_new_tokens": 1, "temperature": 0.0})
    load >> TextGeneration(llm=llm, input_batch_size=width)
if __name__ == "__main__":
    begun = time.perf_counter()
    found = pipeline.run(use_cache=False)
    rows = found["default"]["train"]
    print("SECONDS", time.perf_counter() - begun, sum(row["generation"] is not None for row in rows))
"""


def distilabel(python: str, url: str, sent: list[bytes], width: int) -> float:
    """Seconds for its pipeline of the same prompts, in its own environment, the start of its processes left out."""
    with tempfile.TemporaryDirectory() as folder:
        texts, script = Path(folder) / "texts.json", Path(folder) / "run.py"
        texts.write_text(json.dumps([json.loads(body)["messages"][-1]["content"] for body in sent]))
        script.write_text(DISTILABEL)
        words = [python, str(script), url, str(width), str(texts)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
        said = [line.split() for line in done.stdout.splitlines() if line.startswith("SECONDS")]
        if not said or int(said[0][2]) != len(sent):
            raise SystemExit(f"distilabel failed: {done.stdout[-500:]} {done.stderr[-2000:]}")
        return float(said[0][1])


# ---------------------------------------------------------------- the cases


class Bench:
    def __init__(self, port: int):
        self.root, self.url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/v1"

    def settings(self, **settings: float) -> dict[str, Any]:
        """Set the server up anew; what it saw since the last time."""
        request = urllib.request.Request(self.root + "/settings", data=json.dumps(settings).encode())
        with urllib.request.urlopen(request) as response:
            told: dict[str, Any] = json.load(response)
        return told

    def tail(self, count: int, width: int, rounds: int, python: str | None) -> dict[str, Any]:
        sent = bodies(self.url, count)
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            rivals = {"bare": partial(bare, self.url, sent, width), "ours": partial(ours, self.url, count, width)}
            if python:
                rivals["distilabel"] = partial(distilabel, python, self.url, sent, width)
            for name, run in rivals.items():
                self.settings(latency=0.2, sigma=1.0)
                times.setdefault(name, []).append(run())
        middle = {name: statistics.median(found) for name, found in times.items()}
        shares = {name: middle["bare"] / value for name, value in middle.items()}
        return {"rows": count, "width": width, "seconds": middle, "share_of_bare": shares, "rounds": times}

    def none(self, count: int, width: int, rounds: int) -> dict[str, Any]:
        sent = bodies(self.url, count)
        self.settings()
        times: dict[str, list[float]] = {"bare": [], "ours": []}
        for _ in range(rounds):
            times["bare"].append(bare(self.url, sent, width) / count * 1e3)
            times["ours"].append(ours(self.url, count, width) / count * 1e3)
        middle = {name: statistics.median(found) for name, found in times.items()}
        over = statistics.median(mine - other for mine, other in zip(times["ours"], times["bare"], strict=True))
        return {"rows": count, "width": width, "ms_a_request": middle, "our_own_ms": over, "rounds": times}

    def limit(self, allowed: float, seconds: float) -> dict[str, Any]:
        """The rate of answers in the second half of a run, when the window has found what the server takes."""
        count = int(allowed * seconds)
        self.settings(latency=0.1, sigma=0.3, allowed=allowed)
        ours(self.url, count, None)
        told = self.settings()
        times = told["times"][count // 2 :]
        rate = (len(times) - 1) / (times[-1] - times[0])
        return {
            "allowed": allowed,
            "rate": rate,
            "share": rate / allowed,
            "answered": len(told["times"]),
            "refused": told["refused"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--distilabel", help="The Python of an environment that has distilabel 1.5.3.")
    parser.add_argument("--only", choices=["tail", "none", "limit"], action="append")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    server = subprocess.Popen([sys.executable, __file__, "serve"], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    bench, found = Bench(int(server.stdout.readline())), {}
    wanted = given.only or ["tail", "none", "limit"]
    try:
        if "tail" in wanted:
            found["tail"] = bench.tail(given.rows, given.width, given.rounds, given.distilabel)
            for name, share in found["tail"]["share_of_bare"].items():
                print(f"heavy tail   {name:12} {found['tail']['seconds'][name]:7.2f} s   {share:5.3f} of bare", flush=True)
        if "none" in wanted:
            found["none"] = bench.none(given.rows * 3, given.width, given.rounds)
            for name, value in found["none"]["ms_a_request"].items():
                print(f"no latency   {name:12} {value:7.3f} ms a request")
            print(f"no latency   our own      {found['none']['our_own_ms']:7.3f} ms a request", flush=True)
        if "limit" in wanted:
            found["limit"] = [bench.limit(allowed, 20) for allowed in (25, 100, 400)]
            for one in found["limit"]:
                print(
                    f"{one['allowed']:5.0f} a second allowed: {one['rate']:6.1f} reached, {one['refused']} sent back",
                    flush=True,
                )
    finally:
        server.kill()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve())
    else:
        main()
