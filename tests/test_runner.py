"""The runner and the store: faults, stops, kills, budgets, and nothing lost or asked twice."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlaif.data import comparisons
from rlaif.engines import make_engine
from rlaif.engines.mock import MockEngine
from rlaif.job import Job
from rlaif.labeler import Labeler
from rlaif.records import BusyError, Completion, FatalError, Request, RlaifError, Row, TransientError, UsageError, digest
from rlaif.runner import Limits, Runner
from rlaif.store import VERSION, Store, Usage
from tests.conftest import clean_env, cli, make_rows, read_jsonl, write_jsonl
from tests.server import Server, error


def http(server: Server, path: Path, out: Path, *more: str) -> tuple[str, ...]:
    return ("label", str(path), "-o", str(out), "--engine", "openai", "--base-url", server.url, *more)


def start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlaif.cli", *args]
    return subprocess.Popen(command, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def truth(rows: list[Row]) -> list[bool]:
    return [(row["label"] == "a") == (row["quality_a"] > row["quality_b"]) for row in rows if row["label"] != "tie"]


# ------------------------------------------------------------ faults


async def _sequence(faults: dict[str, list[Any]], body: dict[str, Any]) -> web.StreamResponse | None:
    """Each distinct request meets the faults of the list in turn, then is answered."""
    left = faults.setdefault(json.dumps(body["messages"]), [])
    return left.pop(0)() if left else None


def test_rate_limits_server_faults_and_dropped_connections_are_tried_again(server: Server, tmp_path: Path) -> None:
    kinds = [
        lambda: error(429, "slow down", headers={"Retry-After": "0.1"}),
        lambda: error(500, "oops"),
        lambda: error(503, "busy", headers={"Retry-After": "0"}),
        lambda: web.Response(text='{"id": "x", "choi', content_type="application/json"),
        lambda: web.Response(text="<html>gateway</html>", content_type="text/html"),
        lambda: web.json_response({"id": "x", "choices": []}),
    ]
    met: Counter[str] = Counter()

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        name = json.dumps(body["messages"])
        met[name] += 1
        if met[name] > 1:
            return None
        if len(met) % 7 == 0:
            raise ConnectionResetError  # the connection closes without an answer
        return kinds[len(met) % len(kinds)]()

    server.fault = fault
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(20))
    done = cli(*http(server, path, tmp_path / "o.jsonl"))
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert {row["status"] for row in rows} <= {"ok", "tie"}
    assert all(truth(rows))
    assert set(met.values()) == {2}
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert report["this_run"]["retries"] == 40
    assert report["this_run"]["calls"] == 40


def test_retry_after_is_waited_for(server: Server, tmp_path: Path) -> None:
    times: dict[str, list[float]] = {}

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        seen = times.setdefault(json.dumps(body["messages"]), [])
        seen.append(time.monotonic())
        return error(429, "slow down", headers={"Retry-After": "2"}) if len(seen) == 1 else None

    server.fault = fault
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(2))
    assert cli(*http(server, path, tmp_path / "o.jsonl")).returncode == 0
    # Longer than the first back-off of our own could ever be (half a second).
    assert all(later - first >= 2 for first, later in times.values())


def test_a_call_that_hangs_is_given_up_and_tried_again(server: Server, tmp_path: Path) -> None:
    hung = []

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        if not hung:
            hung.append(1)
            await asyncio.sleep(60)
        return None

    server.fault = fault
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    done = cli(*http(server, path, tmp_path / "o.jsonl", "--timeout", "1"))
    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in read_jsonl(tmp_path / "o.jsonl")] == ["ok"] * 3


def test_a_row_that_never_gets_through_is_an_error_and_is_asked_again_next_time(server: Server, tmp_path: Path) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        return error(500, "cursed row") if "Question 2?" in body["messages"][0]["content"] else None

    server.fault = fault
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(6)), tmp_path / "o.jsonl"
    done = cli(*http(server, path, out, "--tries", "2"))
    assert done.returncode == 1
    assert "cursed row" in done.stderr
    rows = read_jsonl(out)
    assert [row["status"] for row in rows] == ["ok", "ok", "error", "ok", "ok", "ok"]
    assert rows[2]["label"] is None
    assert rows[2]["soft_label"] is None
    assert "cursed row" in rows[2]["error"]
    server.fault = None
    before = len(server.bodies)
    assert cli(*http(server, path, out, "--tries", "2")).returncode == 0
    assert len(server.bodies) == before + 2
    assert [row["status"] for row in read_jsonl(out)] == ["ok"] * 6


def test_unparsed_rows_are_asked_again_and_others_are_not(server: Server, tmp_path: Path) -> None:
    server.logprobs = 0
    server.speak = lambda p: "hard to say"
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(4)), tmp_path / "o.jsonl"
    cli(*http(server, path, out, "--samples", "1"))
    assert [row["status"] for row in read_jsonl(out)] == ["unparsed"] * 4
    server.speak = None
    cli(*http(server, path, out, "--samples", "1"))
    assert [row["status"] for row in read_jsonl(out)] == ["ok"] * 4
    calls = len(server.bodies)
    cli(*http(server, path, out, "--samples", "1"))
    assert len(server.bodies) == calls


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_every_call_would_meet_stops_the_run_at_once(server: Server, tmp_path: Path, status: int) -> None:
    server.latency = 0.05

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        return error(status, "planted words") if len(server.bodies) > 60 else None

    server.fault = fault
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(200)), tmp_path / "o.jsonl"
    done = cli(*http(server, path, out, "--concurrency", "8"))
    assert done.returncode == 1
    assert "planted words" in done.stderr
    assert len(server.bodies) <= 60 + 8
    finished = read_jsonl(out)
    assert 20 <= len(finished) <= 34
    assert all(row["status"] in ("ok", "tie") for row in finished)
    assert json.loads((tmp_path / "o.jsonl.run.json").read_text())["complete"] is False
    server.fault = None
    assert cli(*http(server, path, out, "--concurrency", "8")).returncode == 0
    assert len(read_jsonl(out)) == 200
    assert max(server.answered.values()) == 1


def test_a_server_that_goes_away_stops_the_run_instead_of_failing_every_row(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(300)), tmp_path / "o.jsonl"
    with Server() as server:

        async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
            return error(503, "gone") if len(server.bodies) > 100 else None

        server.fault = fault
        done = cli(*http(server, path, out, "--tries", "2", "--concurrency", "4"))
    assert done.returncode == 1
    assert "no call gets through" in done.stderr
    rows = read_jsonl(out)
    assert sum(row["status"] == "ok" for row in rows) >= 40
    assert sum(row["status"] == "error" for row in rows) <= 4


# ------------------------------------------------------------ stops, a budget (kills: tests/survival/test_store.py)


def test_ctrl_c_finishes_what_is_in_flight_and_the_same_command_goes_on(server: Server, tmp_path: Path) -> None:
    server.latency = 0.3
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(100)), tmp_path / "o.jsonl"
    arguments = http(server, path, out, "--concurrency", "10")
    process = start(*arguments)
    while len(server.bodies) < 35:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted" in errors
    assert "Traceback" not in output + errors
    calls = len(server.bodies)
    assert sum(server.answered.values()) == calls
    kept = read_jsonl(out)
    assert 10 <= len(kept) < 100
    server.latency = 0.0
    assert cli(*arguments).returncode == 0
    assert len(read_jsonl(out)) == 100
    assert len(server.bodies) == 200
    assert max(server.answered.values()) == 1


def test_the_budget_is_never_exceeded_and_what_it_bought_is_kept(server: Server, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(100)), tmp_path / "o.jsonl"
    arguments = http(server, path, out, "--price", "100,300")
    done = cli(*arguments, "--max-cost", "1.0")
    assert done.returncode == 1
    assert "budget" in done.stderr
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert 0.5 < report["this_run"]["cost_usd"] <= 1.0
    tokens = report["this_run"]
    assert tokens["cost_usd"] == pytest.approx((tokens["prompt_tokens"] * 100 + tokens["completion_tokens"] * 300) / 1e6)
    assert len(server.bodies) == tokens["calls"]
    assert 0 < len(read_jsonl(out)) < 100
    assert cli(*arguments).returncode == 0
    assert len(server.bodies) == 200


def test_no_more_rows_are_in_flight_than_asked_for(server: Server, tmp_path: Path) -> None:
    server.latency = 0.02
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(60))
    cli(*http(server, path, tmp_path / "o.jsonl", "--concurrency", "7"))
    assert server.most_flying == 7


def test_another_source_does_not_take_an_outputs_place(tmp_path: Path) -> None:
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count)) for name, count in (("one", 5), ("two", 3)))
    out = tmp_path / "o.jsonl"
    assert cli("label", one, "-o", out, "--engine", "mock").returncode == 0
    refused = cli("label", two, "-o", out, "--engine", "mock")
    assert refused.returncode == 2
    assert "source one.jsonl → two.jsonl" in refused.stderr
    assert len(read_jsonl(out)) == 5
    assert cli("label", two, "-o", out, "--engine", "mock", "--relabel").returncode == 0
    assert len(read_jsonl(out)) == 3


# ------------------------------------------------------------ the runner itself


class Item:
    problem = None


def request(text: str = "x", **changes: Any) -> Request:
    return Request(({"role": "user", "content": text},), choices=("1", "2"), **changes)


def run(store: Store, engine: Any, texts: list[str], limits: Limits, **more: Any) -> Runner:
    async def go() -> Runner:
        runner = Runner(engine, store, limits, **more)

        async def method(item: Any, ask: Any) -> Row:
            completion = await ask(request(item.text))
            return {"status": "ok", "votes": [], "text": completion.text}

        await runner.run(((digest([text, n]), _item(text)) for n, text in enumerate(texts)), method)
        return runner

    return asyncio.run(go())


def _item(text: str) -> Item:
    item = Item()
    item.text = text  # type: ignore[attr-defined]
    return item


def test_the_same_request_in_flight_is_sent_once(tmp_path: Path) -> None:
    engine = MockEngine(latency=0.05)
    runner = run(Store(tmp_path / "s"), engine, ["same"] * 20, Limits(concurrency=20))
    assert engine.calls == 1
    assert runner.tally.rows == 20


def test_planted_faults_are_outlived(tmp_path: Path) -> None:
    engine = MockEngine(faults=0.2, seed=1)
    runner = run(Store(tmp_path / "s"), engine, [f"t{n}" for n in range(20)], Limits(concurrency=20, tries=12))
    assert runner.tally.statuses["ok"] == 20
    assert runner.tally.retries == engine.calls - 20 > 0


def test_a_bug_in_a_method_is_not_swallowed(tmp_path: Path) -> None:
    async def go() -> None:
        async def method(item: Any, ask: Any) -> Row:
            raise ZeroDivisionError

        await Runner(MockEngine(), Store(tmp_path / "s"), Limits()).run([("00", _item("x"))], method)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(go())


def test_a_method_that_never_succeeds_stops_with_the_reason(tmp_path: Path) -> None:
    class Dead(MockEngine):
        async def complete(self, _: Request) -> Any:
            raise TransientError("nobody home")

    with pytest.raises(FatalError, match=r"no call gets through at all: nobody home"):
        run(Store(tmp_path / "s"), Dead(), ["x"] * 3, Limits(tries=1))


@pytest.mark.parametrize(
    "change",
    [
        {"text": "y"},
        {"prefix": "p"},
        {"max_tokens": 2},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"seed": 1},
        {"sample": 1},
    ],
)
def test_whatever_can_change_an_answer_changes_the_key(change: dict[str, Any]) -> None:
    identity = {"engine": "openai", "model": "m", "base_url": "u"}
    assert request().key(identity) != request(**change).key(identity)
    assert request().key(identity) != request().key({**identity, "base_url": "v"})
    assert request().key(identity) == request(hint={"planted": 1}).key(identity)


def test_an_engine_whose_packages_are_missing_says_which_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rlaif.engines.transformers", "rlaif.engines.chat"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FatalError, match=r"torch is not installed: pip install 'rlaif\[transformers\]'"):
        make_engine("transformers", model="m")


class Sparing(MockEngine):
    """Sends back every call that comes while so many are in flight; notes how often each was sent."""

    def __init__(self, takes: int):
        super().__init__(latency=0.01, spread=0.1)
        self.takes, self.flying = takes, 0
        self.sent: Counter[str] = Counter()

    async def complete(self, request: Request) -> Completion:
        self.sent[request.messages[0]["content"]] += 1
        if self.flying >= self.takes:
            raise BusyError("429: slow down", 0.0)
        self.flying += 1
        try:
            return await super().complete(request)
        finally:
            self.flying -= 1


def test_a_busy_servers_calls_wait_their_turn_however_often_they_are_sent_back(tmp_path: Path) -> None:
    engine = Sparing(takes=4)
    runner = run(Store(tmp_path / "s"), engine, [f"t{n}" for n in range(300)], Limits(concurrency=64, tries=2))
    assert runner.tally.statuses["ok"] == 300
    assert max(engine.sent.values()) > 2  # which would be failures, were they not sent back
    assert runner.tally.slowed == runner.tally.retries == engine.sent.total() - 300
    assert 2 <= runner.window.width <= 12


def test_time_outs_narrow_the_window_too(tmp_path: Path) -> None:
    class Slow(MockEngine):
        """Answers the later the more calls are in flight: of more than eight, none in time."""

        flying = 0

        async def complete(self, request: Request) -> Completion:
            self.flying += 1
            try:
                await asyncio.sleep(0.02 if self.flying <= 8 else 60)
                return await super().complete(request)
            finally:
                self.flying -= 1

    texts = [f"t{n}" for n in range(150)]
    runner = run(Store(tmp_path / "s"), Slow(), texts, Limits(concurrency=32, tries=20, timeout=0.2))
    assert runner.tally.statuses["ok"] == 150
    assert runner.tally.slowed == 0 < runner.tally.retries
    assert runner.window.width < 28


def test_a_server_that_sends_everything_back_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match=r"no call gets through at all: 429: slow down"):
        run(Store(tmp_path / "s"), Sparing(takes=0), ["x"] * 3, Limits(tries=3))


# ------------------------------------------------------------ a run that has finished


def test_a_finished_run_reads_no_row_again_unless_something_has_changed(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(20)), tmp_path / "o.jsonl"
    read = 0

    def items(seed: int = 0) -> Iterator[Any]:
        nonlocal read
        for item in comparisons(str(path), seed=seed):
            read += 1
            yield item

    def again(facts: dict[str, Any] | None = None, **changes: Any) -> tuple[int, int]:
        """Rows that were read, and calls."""
        nonlocal read
        read = 0
        labeler = Labeler(engine="mock", **changes)
        job = Job(str(path), out, items, labeler.pairwise(), facts or {})
        report = job.run(labeler.make_engine(Limits()), Limits(), job.check(), redo=True)
        assert (report["rows"], report["complete"]) == (20, True)
        assert json.loads(Path(f"{out}.run.json").read_text())["this_run"]["calls"] == report["this_run"]["calls"]
        return read, report["this_run"]["calls"]

    assert again() == (60, 40)
    before = out.read_bytes()
    assert again() == (0, 0)
    assert again(facts={"map": {"a": "b"}}) == (60, 0)
    assert again() == (60, 0)
    assert again(both_orders=False) == (40, 0)  # the rows are known, the method is not
    assert again() == (40, 0)
    assert out.read_bytes() == before
    out.write_bytes(before[:-2] + b" \n")
    assert again() == (60, 0)
    assert out.read_bytes() == before
    Path(f"{out}.run.json").unlink()
    assert again() == (40, 0)
    write_jsonl(path, [*make_rows(19), {**make_rows(20)[19], "prompt": "Another?"}])
    assert again() == (60, 2)


def test_a_run_with_rows_to_be_tried_again_is_not_finished(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(5)), tmp_path / "o.jsonl"
    labeler = Labeler(engine="mock", options={"garbage": 1.0})
    for _ in range(2):
        job = Job(str(path), out, lambda: comparisons(str(path)), labeler.pairwise())
        report = job.run(labeler.make_engine(Limits()), Limits(), job.check())
        assert (report["statuses"]["unparsed"], report["this_run"]["calls"] > 0) == (5, True)


# ------------------------------------------------------------ the store


def test_a_store_keeps_what_it_was_given_and_forgets_what_failed(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.add_completion("0a", Completion("\ud800 text", {"1": -0.5}, None, "stop", None, 10, 2, 0.5))
    store.add_result("0b", {"status": "unparsed", "votes": [{"status": "unparsed", "key": "0a"}]})
    assert store.completion("0a") is None
    kept = store.completion("0a", even_failed=True)
    assert kept is not None
    assert (kept.text, kept.logprobs, kept.key) == ("\ud800 text", {"1": -0.5}, "0a")
    assert not store.finished("0b")
    assert store.usage().cost_usd == 0.5
    store.close()
    assert Store(tmp_path / "s").result("0b") is not None


# As a store of version 1 was written.
VERSION_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE completions (
    key TEXT PRIMARY KEY, usable INTEGER NOT NULL, value TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL
) WITHOUT ROWID;
CREATE TABLE rows (key TEXT PRIMARY KEY, status TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('settings', '{"seed": 1}');
INSERT INTO completions VALUES ('0a', 1, '{"text":"1","logprobs":{"1":-0.5},"floor":null,"prompt_tokens":10}', 10, 2, 0.5);
INSERT INTO completions VALUES ('0b', 0, '{"text":"?"}', 10, 2, NULL);
INSERT INTO rows VALUES ('0c', 'ok', '{"status":"ok","soft_label":0.25}');
PRAGMA user_version=1;
"""


def test_a_store_of_the_first_version_is_taken_over_whole(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        db.executescript(VERSION_1)
    for _ in range(2):
        with closing(Store(tmp_path / "s")) as store:
            assert store.meta("settings") == {"seed": 1}
            assert store.completion("0a") == Completion("1", {"1": -0.5}, prompt_tokens=10, key="0a")
            assert store.completion("0b") is None
            assert store.completion("0b", even_failed=True) == Completion("?", key="0b")
            assert store.result("0c") == {"status": "ok", "soft_label": 0.25}
            assert store.usage() == Usage(2, 20, 4, 0.5)
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)


def test_a_byte_that_is_not_what_it_was_is_noticed(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "s")) as store:
        store.add_result("0c", {"status": "ok", "soft_label": 0.25})
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        (value,) = db.execute("SELECT value FROM rows").fetchone()
    for place in range(len(value)):
        with closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as db:
            db.execute("UPDATE rows SET value = ?", (value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :],))
        with closing(Store(tmp_path / "s")) as store, pytest.raises(RlaifError, match="damaged"):
            store.result("0c")


def test_a_store_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    held = Store(tmp_path / "s")
    with pytest.raises(UsageError, match="another process"):
        Store(tmp_path / "s")
    held.close()
    Store(tmp_path / "s").close()


def test_a_damaged_or_newer_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"not a database" * 100)
    with pytest.raises(RlaifError, match="not a store"):
        Store(tmp_path / "bad")
    with sqlite3.connect(tmp_path / "new") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(RlaifError, match="newer"):
        Store(tmp_path / "new")


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store._db.execute("PRAGMA max_page_count=20")

    def fill() -> None:
        for n in range(1000):
            store.add_result(f"{n:04x}", {"status": "ok", "votes": [], "filler": random.randbytes(500).hex()})

    with pytest.raises(RlaifError, match="cannot be written"):
        fill()
    assert store.result("0000") is not None
