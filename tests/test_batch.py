"""Batches: the labels of single calls, whatever fails, and nothing paid twice, whenever the process is killed."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlaif.cli import command_line
from rlaif.engines import batch as batches
from rlaif.engines.batch import Batch, BatchEngine
from rlaif.records import Message, Request, RlaifError, UsageError
from tests.batch_server import BatchServer
from tests.conftest import make_rows, read_jsonl, write_jsonl
from tests.server import Server, error
from tests.survival import children

SOON = ("--batch", "-E", "poll=0.02", "-E", "quiet=0.05")


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer() as running:
        yield running


def words(server: Server, path: Path, out: Path, *more: str, command: str = "label") -> list[str]:
    fixed = ["--engine", "openai", "--base-url", server.url, "--concurrency", "50"]
    return [command, str(path), "-o", str(out), *fixed, *SOON, *more]


def single(*arguments: str) -> list[str]:
    """The same command without batches."""
    return [word for word in arguments if word not in SOON]


def said(*args: str) -> str:
    """Run a command in this process; what it wrote on stderr. Raises: what the command raises."""
    with redirect_stderr(io.StringIO()) as found, redirect_stdout(io.StringIO()):
        command_line()(args, standalone_mode=False)
    return found.getvalue()


def once(server: BatchServer) -> bool:
    """Whether every request that was answered was answered once."""
    return set(server.answered.values()) == {1}


def right(rows: list[dict[str, Any]]) -> bool:
    """Whether all rows are labelled, by the planted truth, at the side of which there are no ties."""
    return all((row["label"] == "a") == (row["quality_a"] > row["quality_b"]) for row in rows) and all(
        row["status"] == "ok" for row in rows
    )


def records(out: Path) -> list[Path]:
    return sorted(out.with_name(out.name + ".batches").glob("*"))


# ------------------------------------------------------------ the same answers


def test_labels_and_keys_are_those_of_single_calls(server: BatchServer, tmp_path: Path) -> None:
    path, out, live = write_jsonl(tmp_path / "d.jsonl", make_rows(30)), tmp_path / "o.jsonl", tmp_path / "live.jsonl"
    server.messy = True
    told = said(*words(server, path, out))
    assert not server.bodies
    assert "batch batch_0: 60 requests sent" in told
    assert "batch batch_0: completed, 60 of 60 completed, 0 failed" in told
    assert right(read_jsonl(out))
    assert once(server)
    assert not out.with_name("o.jsonl.batches").exists()
    said(*single(*words(server, path, live)))
    assert len(server.bodies) == 60
    assert read_jsonl(live) == read_jsonl(out)
    runs = [json.loads((tmp_path / f"{name}.jsonl.run.json").read_text()) for name in ("o", "live")]
    assert runs[0]["settings"] == runs[1]["settings"]
    assert runs[0]["all_runs"] == runs[1]["all_runs"]


def test_two_calls_a_vote_are_two_batches(server: BatchServer, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(5)), tmp_path / "o.jsonl"
    said(*words(server, path, out, "--cot", "two-call"))
    assert len(server.batches) == 2
    assert right(read_jsonl(out))


@pytest.mark.parametrize(
    ("command", "row", "more", "column", "count"),
    [
        ("score", {"prompt": "p", "response": "r [q=1]"}, ["--attribute", "overall"], "score", 1),
        ("rank", {"prompt": "p", "responses": ["x [q=1]", "y [q=2]", "z [q=0]"]}, [], "ranking", 6),
        ("sample", {"prompt": "p"}, ["--n", "3"], "responses", 3),
        ("revise", {"prompt": "p", "response": "r"}, ["--method", "critique", "--constitution", "general"], "revised", 8),
    ],
)
def test_every_command_that_asks_a_model(
    server: BatchServer, tmp_path: Path, command: str, row: dict[str, Any], more: list[str], column: str, count: int
) -> None:
    if command == "score":
        server.digits = [0.1] * 10
    if command == "revise":
        server.speak = lambda p: "words that revise"
    path, out = write_jsonl(tmp_path / "d.jsonl", [row]), tmp_path / "o.jsonl"
    if command == "score":
        more = [*more, "-E", "prefill=true"]  # the rating 10 takes a second call, after the first
    said(*words(server, path, out, *more, command=command))
    (made,) = read_jsonl(out)
    assert made["status"] == "ok"
    assert made[column] is not None
    assert sum(server.answered.values()) == count + (command == "score")
    assert not server.bodies
    assert records(out) == []


# ------------------------------------------------------------ files


def test_files_are_as_large_as_may_be_and_several_are_open_at_once(
    server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "REQUESTS", 7)
    open_at_once = []
    server.held.set()

    async def count() -> None:
        open_at_once.append(sum(batch["status"] != "completed" for batch in server.batches.values()))
        if open_at_once[-1] == 3 or len(open_at_once) > 100:
            server.held.clear()

    server.moments["poll"] = count
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    said(*words(server, path, out))
    assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [7, 7, 6]
    assert max(open_at_once) == 3
    assert right(read_jsonl(out))


def test_a_file_has_so_many_bytes_at_most(server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    monkeypatch.setattr(batches, "BYTES", 5000)
    said(*words(server, path, out))
    sizes = [len(server.files[batch["input_file_id"]]) for batch in server.batches.values()]
    assert len(sizes) > 3
    assert max(sizes) <= 5000
    monkeypatch.setattr(batches, "BYTES", 10)  # a request that is too large for any file goes by itself
    said(*words(server, path, tmp_path / "p.jsonl", "--limit", "1", "--seed", "7", "--template", "helpful-detailed"))
    assert [batch["request_counts"]["total"] for batch in server.batches.values()][-2:] == [1, 1]


def test_fewer_rows_at_a_time_make_smaller_batches(server: BatchServer, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(6)), tmp_path / "o.jsonl"
    said(*words(server, path, out, "--concurrency", "3"))
    assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [6, 6]


# ------------------------------------------------------------ failures of requests


def test_lines_that_fail_go_into_the_next_batch_and_hopeless_ones_fail_their_row(server: BatchServer, tmp_path: Path) -> None:
    met: set[str] = set()

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        text = body["messages"][0]["content"]
        if "Question 3?" in text:
            return error(400, "too long", "context_length_exceeded")
        number = next(n for n in range(12) if f"Question {n}?" in text)
        if number % 3 == 0 and text not in met:
            met.add(text)
            return error((429, 500, 503)[number // 3 % 3], "not now")
        return None

    server.fault = fault
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(12)), tmp_path / "o.jsonl"
    said(*words(server, path, out, "--max-errors", "0.5"))
    rows = read_jsonl(out)
    assert [n for n, row in enumerate(rows) if row["status"] != "ok"] == [3]
    assert "too long" in rows[3]["error"]
    assert right([row for n, row in enumerate(rows) if n != 3])
    first, *others = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert (first, sum(others)) == (24, 6)
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert (report["this_run"]["retries"], report["this_run"]["slowed"]) == (6, 0)
    assert once(server)


def test_fewer_log_probabilities_are_asked_for_where_a_server_refuses_many(server: BatchServer, tmp_path: Path) -> None:
    server.logprobs = 5
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(4)), tmp_path / "o.jsonl"
    said(*words(server, path, out))
    assert len(server.batches) == 2
    assert right(read_jsonl(out))


def test_a_batch_that_expires_keeps_its_answers_and_the_rest_goes_into_another(server: BatchServer, tmp_path: Path) -> None:
    server.ends = ["expired"]
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    told = said(*words(server, path, out))
    assert "batch batch_0: expired, 10 of 20 completed" in told
    first, *others = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert (first, sum(others)) == (20, 10)
    assert once(server)
    assert right(read_jsonl(out))


def test_answers_that_a_completed_batch_leaves_out_are_asked_again(server: BatchServer, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(4)), tmp_path / "o.jsonl"
    whole = server._written

    def without_three(lines: list[dict[str, Any]]) -> bytes:
        return whole(lines[3:] if len(server.batches) == 1 else lines)

    server._written = without_three  # type: ignore[method-assign]
    said(*words(server, path, out))
    first, *others = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert (first, sum(others)) == (8, 3)
    assert right(read_jsonl(out))


# ------------------------------------------------------------ failures of batches


def test_a_refused_batch_stops_the_run_with_the_servers_words(server: BatchServer, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(4)), tmp_path / "o.jsonl"
    with pytest.raises(RlaifError, match="refuses batch batch_0: line 1: no model other"):
        said(*words(server, path, out, "--model", "other"))
    assert records(out) == []
    with pytest.raises(RlaifError, match="refuses batch batch_1"):
        said(*words(server, path, out, "--model", "other"))


def test_a_batch_that_is_too_much_for_the_queue_goes_in_parts(server: BatchServer, tmp_path: Path) -> None:
    server.most = 6
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    said(*words(server, path, out))
    sizes = [batch["request_counts"]["total"] for batch in server.batches.values() if batch["status"] == "completed"]
    assert sizes == [5] * 4
    assert right(read_jsonl(out))
    assert once(server)
    server.most = 0.5  # type: ignore[assignment]
    with pytest.raises(RlaifError, match="Enqueued token limit"):
        said(*words(server, path, tmp_path / "p.jsonl"))


def test_a_full_queue_is_waited_for(server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another batch is on its way, a refused one is sent again as it is."""
    monkeypatch.setattr(batches, "REQUESTS", 10)
    problem = server._problem

    def full(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
        others = sum(batch["status"] in ("in_progress", "finalizing") for batch in server.batches.values())
        return {"code": "token_limit_exceeded", "message": "full"} if others else problem(lines)

    server._problem = full  # type: ignore[method-assign]
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    said(*words(server, path, out))
    assert {batch["request_counts"]["total"] for batch in server.batches.values()} == {10}
    assert right(read_jsonl(out))
    assert once(server)


def test_of_a_cancelled_batch_the_answers_are_kept_and_the_next_run_sends_the_rest(server: BatchServer, tmp_path: Path) -> None:
    server.ends = ["cancelled"]
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    with pytest.raises(RlaifError, match=r"batch batch_0 was cancelled.*; 5 of 10 rows are finished"):
        said(*words(server, path, out))
    assert len(read_jsonl(out)) == 5
    said(*words(server, path, out))
    assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [20, 10]
    assert once(server)
    assert right(read_jsonl(out))


# ------------------------------------------------------------ failures of the line


def in_turn(*faults: Callable[[], web.Response | None]) -> Callable[[], Any]:
    """A hook that meets each fault once, and nothing after."""
    left = [*faults]

    async def hook() -> web.Response | None:
        return left.pop(0)() if left else None

    return hook


def _reset() -> web.Response:
    raise ConnectionResetError


PASSING = (
    _reset,
    lambda: error(500, "oops"),
    lambda: error(429, "slow down", headers={"Retry-After": "0"}),
    lambda: web.Response(text="<html>gateway</html>"),
)


@pytest.mark.parametrize("moment", ["upload", "create", "created", "poll", "download"])
def test_what_may_pass_is_tried_again_and_no_batch_is_made_twice(server: BatchServer, tmp_path: Path, moment: str) -> None:
    server.moments[moment] = in_turn(*PASSING)
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
    said(*words(server, path, out))
    assert len(server.batches) == 1
    assert right(read_jsonl(out))
    assert once(server)


def test_a_batch_that_may_have_been_made_is_looked_for_when_its_requests_are_asked_again(
    server: BatchServer, tmp_path: Path
) -> None:
    """No try to make it is answered, but the first one came through; nor are the first looks at the list."""
    server.moments["created"] = in_turn(*[_reset] * 9)
    server.moments["list"] = in_turn(*[_reset] * 6)
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
    said(*words(server, path, out))
    assert len(server.batches) == 1
    assert right(read_jsonl(out))


def test_downloads_that_break_off_are_begun_again(server: BatchServer, tmp_path: Path) -> None:
    server.cuts = 3
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    said(*words(server, path, out))
    assert server.cuts == 0
    assert len(server.batches) == 1
    assert right(read_jsonl(out))


def test_a_server_without_batches_is_told_of_at_once(tmp_path: Path) -> None:
    with Server() as live:
        path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
        with pytest.raises(RlaifError, match=r"has no batch endpoint \(POST /files: 404.*leave out --batch"):
            said(*words(live, path, out))
        assert records(out) == []
        said(*single(*words(live, path, out)))
        assert right(read_jsonl(out))


@pytest.mark.parametrize(("status", "why"), [(404, "has no batch endpoint"), (400, "POST /batches: 400: not here")])
def test_a_refusal_to_begin_leaves_nothing_behind(server: BatchServer, tmp_path: Path, status: int, why: str) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
    server.moments["create"] = in_turn(lambda: error(status, "not here"))
    with pytest.raises(RlaifError, match=why) as caught:
        said(*words(server, path, out))
    assert "delete" not in str(caught.value)
    assert records(out) == []
    said(*words(server, path, out))
    assert right(read_jsonl(out))


def test_what_a_batch_that_got_lost_keeps_is_named(server: BatchServer, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
    server.moments["poll"] = in_turn(lambda: error(404, "No batch found"))
    with pytest.raises(RlaifError, match=r"No batch found; if it is lost, delete .*\.json: its requests are then sent anew"):
        said(*words(server, path, out))
    (record,) = records(out)
    server.batches.clear()
    with pytest.raises(RlaifError, match="No batch found"):
        said(*words(server, path, out))
    record.unlink()
    said(*words(server, path, out))
    assert right(read_jsonl(out))


# ------------------------------------------------------------ kills and stops


def killed(tmp_path: Path, arguments: list[str], moment: threading.Event, sign: int = signal.SIGKILL) -> str:
    """Run a command until the server meets the moment, then send it the signal; what it said."""
    process = children.start(tmp_path / "said", *arguments)
    assert moment.wait(20), (tmp_path / "said").read_text()
    assert process.pid
    os.kill(process.pid, sign)
    process.join(20)
    process.kill()  # else it would be waited for
    assert process.exitcode == (-sign if sign == signal.SIGKILL else 1)
    return (tmp_path / "said").read_text()


@pytest.mark.parametrize("moment", ["upload", "create", "created", "poll", "download"])
def test_after_a_kill_at_any_moment_nothing_is_paid_twice(server: BatchServer, tmp_path: Path, moment: str) -> None:
    for name in ("earlier", "later"):  # others' batches, so that the list has pages
        server.batches[name] = {"id": name, "status": "completed", "metadata": None, "input_file_id": "file-x"}
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    arguments = words(server, path, out, "--cot", "two-call")
    killed(tmp_path, arguments, server.hang(moment))
    server.freed.set()
    assert not out.exists()
    assert len(records(out)) == (moment != "upload")
    for name in ("between", "last"):
        server.batches[name] = {"id": name, "status": "completed", "metadata": {}, "input_file_id": "file-y"}
    told = said(*arguments)
    assert sum("end" in batch for batch in server.batches.values()) == 2
    assert told.count("20 requests sent") == (2 if moment in ("upload", "create") else 1)
    assert sum(server.answered.values()) == 40
    assert once(server)
    assert right(read_jsonl(out))
    assert records(out) == []


def test_kills_between_the_first_answers_and_the_last(server: BatchServer, tmp_path: Path) -> None:
    """One file is stored, the other on its way: the answers of both are used, and none is asked again."""
    setup = "from rlaif.engines import batch; batch.REQUESTS = 10"
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    reached = threading.Event()
    calls = []

    async def second_hangs() -> web.Response | None:
        calls.append(1)
        if len(calls) != 2:
            return None
        await asyncio.sleep(0.3)  # until the first one's answers are stored
        reached.set()
        return await server.late()

    server.moments["download"] = second_hangs
    process = children.start(tmp_path / "said", *words(server, path, out), setup=setup)
    assert reached.wait(20)
    process.kill()
    process.join(20)
    server.freed.set()
    assert len(records(out)) == 2
    told = said(*words(server, path, out, "--concurrency", "1"))  # most answers are there before they are asked for
    assert "requests sent" not in told
    assert once(server)
    assert sum(server.answered.values()) == 20
    assert right(read_jsonl(out))
    assert records(out) == []


def test_ctrl_c_leaves_the_batch_at_the_server_and_the_same_command_collects_it(server: BatchServer, tmp_path: Path) -> None:
    server.held.set()
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    polled = threading.Event()

    async def polling() -> None:
        polled.set()

    server.moments["poll"] = polling
    begun = time.monotonic()
    told = killed(tmp_path, words(server, path, out), polled, signal.SIGINT)
    assert time.monotonic() - begun < 15
    assert "interrupted: the same command goes on" in told
    assert "batch batch_0 goes on at the server: the same command collects its answers" in told
    assert "Traceback" not in told
    server.held.clear()
    assert "sent" not in said(*words(server, path, out))
    assert len(server.batches) == 1
    assert right(read_jsonl(out))


def test_a_run_begun_in_batches_is_finished_in_single_calls_and_the_other_way_round(
    server: BatchServer, tmp_path: Path
) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), tmp_path / "o.jsonl"
    said(*words(server, path, out, "--limit", "4"))
    said(*single(*words(server, path, out, "--limit", "7")))
    assert len(server.bodies) == 6
    said(*words(server, path, out))
    assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [8, 6]
    assert right(read_jsonl(out))
    assert once(server)


def test_rows_that_came_to_nothing_are_asked_anew_and_not_given_the_old_answer(server: BatchServer, tmp_path: Path) -> None:
    server.logprobs = 0
    server.speak = lambda p: "hard to say"
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
    said(*words(server, path, out, "--samples", "1"))
    assert [row["status"] for row in read_jsonl(out)] == ["unparsed"] * 3
    server.speak = None
    said(*words(server, path, out, "--samples", "1"))
    assert [row["status"] for row in read_jsonl(out)] == ["ok"] * 3


def test_the_budget_holds(server: BatchServer, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(20)), tmp_path / "o.jsonl"
    with pytest.raises(RlaifError, match="the budget"):
        said(*words(server, path, out, "--price", "100,300", "--max-cost", "0.5"))
    spent = json.loads((tmp_path / "o.jsonl.run.json").read_text())["all_runs"]["cost_usd"]
    assert 0.1 < spent <= 0.5


# ------------------------------------------------------------ the ledger


REQUESTS = [Request((Message(role="user", content=f"say {n}"),), max_tokens=9) for n in range(4)]


def asked(server: BatchServer, ledger: Path, requests: list[Request], stored: set[int], done: bool = False) -> list[str]:
    """What an engine of its own answers; and then the ledger is told that these requests' answers are stored."""

    async def whole() -> list[str]:
        engine = BatchEngine(ledger, base_url=server.url, poll=0.02, quiet=0.02)
        keys = {REQUESTS[n].key(engine.identity) for n in stored}
        answers = await asyncio.gather(*(engine.complete(request) for request in requests))
        engine.settle(keys.__contains__, done)
        await engine.close()
        return [answer.text for answer in answers]

    return asyncio.run(whole())


def test_an_answer_is_kept_until_it_is_stored_and_not_longer(server: BatchServer, tmp_path: Path) -> None:
    server.speak = lambda p: f"answer {sum(server.answered.values())}"
    ledger = tmp_path / "l"
    first = asked(server, ledger, REQUESTS, {0, 1})
    assert first == ["answer 1", "answer 2", "answer 3", "answer 4"]
    # A run that stored two of four: these are asked anew, for they came to nothing; the others' answers are still there.
    assert asked(server, ledger, REQUESTS, {0, 1}) == ["answer 5", "answer 6", "answer 3", "answer 4"]
    (record, *others) = sorted(ledger.glob("*"))
    assert not others
    assert len(json.loads(record.read_text())["keys"]) == 2
    # A run that is done needs nothing more of what it read.
    assert asked(server, ledger, REQUESTS[2:], set(), done=True) == ["answer 3", "answer 4"]
    assert not ledger.exists()


@pytest.mark.parametrize(("end", "fault"), [("cancelled", 0), ("expired", 0), ("completed", 400), ("failed", 0)])
def test_what_a_batch_of_an_earlier_run_did_not_answer_is_sent_anew(
    server: BatchServer, tmp_path: Path, end: str, fault: int
) -> None:
    """Not even a refusal of that time counts in this run, as it may have been what the run was ended for."""

    async def left_alone() -> None:
        engine = BatchEngine(tmp_path / "l", base_url=server.url, poll=0.02, quiet=0.02)
        calls = [asyncio.create_task(engine.complete(request)) for request in REQUESTS]
        while not server.batches:
            await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await engine.close()

    async def refused(body: dict[str, Any]) -> web.StreamResponse | None:
        refusing = fault and len(server.batches) == 1 and "say 2" in body["messages"][0]["content"]
        return error(fault, "not any of these") if refusing else None

    server.held.set()
    server.ends, server.fault = [end], refused
    asyncio.run(left_alone())
    server.held.clear()
    if end == "failed":
        (batch,) = server.batches.values()
        batch |= {"status": "failed", "errors": {"data": [{"message": "for some reason"}]}}
    assert len(asked(server, tmp_path / "l", REQUESTS, {0, 1, 2, 3})) == 4
    assert len(server.batches) == 2
    assert once(server)
    assert sum(server.answered.values()) == 4
    assert not (tmp_path / "l").exists()


def test_requests_of_one_key_share_an_answer(server: BatchServer, tmp_path: Path) -> None:
    assert len({*asked(server, tmp_path / "l", [REQUESTS[0]] * 3, {0})}) == 1
    assert sum(server.answered.values()) == 1


def test_old_batches_are_not_asked_after_unless_one_of_their_requests_is(server: BatchServer, tmp_path: Path) -> None:
    asked(server, tmp_path / "l", REQUESTS[:2], set())
    server.batches.clear()
    assert asked(server, tmp_path / "l", REQUESTS[2:], {2, 3})
    with pytest.raises(RlaifError, match="delete"):
        asked(server, tmp_path / "l", REQUESTS[:1], set())


def test_a_record_that_cannot_be_read_is_named(server: BatchServer, tmp_path: Path) -> None:
    record = tmp_path / "l" / "x.json"
    Batch(record, {"k"}, "file", "id").write()
    record.write_text(record.read_text()[:-9])
    with pytest.raises(RlaifError, match=r"x\.json: no record of a batch"):
        BatchEngine(tmp_path / "l", base_url=server.url)


# ------------------------------------------------------------ what is refused, and secrets


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--engine", "mock"], "--batch goes with --engine openai, not mock"),
        (["--timeout", "9"], "--timeout does not go with --batch"),
        (["--ray", "local"], "--ray does not go with --batch"),
        (["-E", "poll=0"], "poll above 0"),
        (["--base-url", "{url},{url}/"], "one --base-url"),
    ],
)
def test_what_does_not_go_together(server: BatchServer, tmp_path: Path, more: list[str], why: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    given = {"--engine": "openai", "--base-url": server.url} | {more[0]: more[1].format(url=server.url)}
    options = [word for pair in given.items() for word in pair]
    with pytest.raises(UsageError, match=why):
        said("label", str(path), "-o", str(tmp_path / "o.jsonl"), "--batch", *options)
    assert not server.files


def test_the_key_is_nowhere(server: BatchServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "sk-very-secret"
    monkeypatch.setenv("OPENAI_API_KEY", server.key)
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
    server.moments["poll"] = in_turn(lambda: error(403, f"the key {server.key} may not"))
    with pytest.raises(RlaifError, match=r"the key \[key\] may not") as caught:
        said(*words(server, path, out))
    assert server.key not in str(caught.value)
    told = said(*words(server, path, out))
    assert server.key not in told
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 3
    assert not any(server.key.encode() in file.read_bytes() for file in files)
    assert not any(server.key.encode() in content for content in server.files.values())
