"""The runner and the store: faults, stops, kills, budgets, and nothing lost or asked twice."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlaif.engines import make_engine
from rlaif.engines.mock import MockEngine
from rlaif.records import FatalError, Request, RlaifError, Row, TransientError, UsageError, digest
from rlaif.runner import Limits, Runner
from rlaif.store import Store
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


# ------------------------------------------------------------ kills and stops


def test_ten_kills_at_random_moments_lose_nothing_and_repeat_only_calls_in_flight(server: Server, tmp_path: Path) -> None:
    server.latency = 0.03
    width = 8
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(900)), tmp_path / "o.jsonl"
    arguments = http(server, path, out, "--concurrency", str(width))
    draw = random.Random(7)
    kills = 0
    while kills < 10:
        before = len(server.bodies)
        process = start(*arguments)
        # Kill it somewhere in the middle of its work, not while it starts.
        wanted = before + draw.randrange(20, 140)
        while len(server.bodies) < wanted and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        kills += 1
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(out)
    assert [row["id"] for row in rows] == [str(n) for n in range(900)]
    assert all(truth(rows))
    assert len(server.bodies) <= 1800 + kills * width
    assert len({json.dumps(body["messages"]) for body in server.bodies}) == 1800
    # An uninterrupted run makes the same rows.
    server.latency = 0.0
    whole = tmp_path / "whole.jsonl"
    assert cli(*http(server, path, whole)).returncode == 0
    assert read_jsonl(whole) == rows


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


# ------------------------------------------------------------ the store


def test_a_store_keeps_what_it_was_given_and_forgets_what_failed(tmp_path: Path) -> None:
    from rlaif.records import Completion

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


def test_a_store_that_another_process_holds_is_refused(tmp_path: Path) -> None:
    held = Store(tmp_path / "s")
    with pytest.raises(UsageError, match="another process"):
        Store(tmp_path / "s")
    held.close()
    Store(tmp_path / "s").close()


def test_a_damaged_or_newer_store_is_refused(tmp_path: Path) -> None:
    import sqlite3

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
