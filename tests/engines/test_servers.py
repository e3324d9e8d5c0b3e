"""Several servers of one model: the least loaded is asked, one that fails is left, and the labels are those of one server."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlaif.engines.openai import OpenAIEngine, _Server
from rlaif.records import FatalError, UsageError
from tests.conftest import clean_env, cli, make_rows, read_jsonl, write_jsonl
from tests.server import Server, error


@pytest.fixture
def two() -> Iterator[tuple[Server, Server]]:
    with Server() as first, Server() as second:
        yield first, second


def label(path: Path, out: Path, *urls: str) -> tuple[str, ...]:
    more = ("--concurrency", "16", "--timeout", "2")
    return ("label", str(path), "-o", str(out), "--engine", "openai", "--base-url", ",".join(urls), *more)


def sent(server: Server) -> set[str]:
    return {json.dumps(body) for body in server.bodies}


def test_a_slower_server_gets_fewer_requests(two: tuple[Server, Server], tmp_path: Path) -> None:
    fast, slow = two
    fast.latency, slow.latency = 0.02, 0.2
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(150))
    done = cli(*label(path, tmp_path / "o.jsonl", slow.url, fast.url))
    assert done.returncode == 0, done.stderr
    assert len(fast.bodies) + len(slow.bodies) == 300
    assert len(fast.bodies) > 3 * len(slow.bodies) > 0
    assert not sent(fast) & sent(slow)


def test_when_one_of_two_dies_the_other_answers_all_and_the_labels_are_the_same(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(200)), tmp_path / "o.jsonl"
    with Server() as lasting:
        lasting.latency = 0.02
        with Server() as dying:
            dying.latency = 0.02
            command = [sys.executable, "-m", "rlaif.cli", *label(path, out, dying.url, lasting.url)]
            process = subprocess.Popen(command, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while len(dying.bodies) < 60 and process.poll() is None:
                time.sleep(0.002)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        rows = read_jsonl(out)
        assert [row["status"] for row in rows] == ["ok"] * 200
        known = len({json.dumps(body["messages"]) for body in [*lasting.bodies, *dying.bodies]})
        assert known == 400 <= lasting.answered.total() + dying.answered.total() <= 400 + 16
        # The first URL stands for all, whether it is there or not: nothing is asked again.
        before = len(lasting.bodies)
        assert cli(*label(path, out, dying.url)).returncode == 1
        again = cli(*label(path, out, dying.url, lasting.url))
        assert (again.returncode, len(lasting.bodies)) == (0, before), again.stderr
        late = tmp_path / "late.jsonl"
        assert cli(*label(path, late, dying.url, lasting.url)).returncode == 0
        assert f"no server answers at {dying.url}" in json.loads(Path(f"{late}.run.json").read_text())["notes"][0]
    kept = ("soft_label", "label", "status")
    assert [[row[name] for name in kept] for row in read_jsonl(late)] == [[row[name] for name in kept] for row in rows]


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_only_fails_is_no_black_hole(two: tuple[Server, Server], tmp_path: Path, status: int) -> None:
    """It has the least to do, as it fails at once, and would get every request."""
    good, bad = two
    good.latency = 0.02

    async def fault(body: dict[str, Any]) -> web.StreamResponse:
        return error(status, "no")

    bad.fault = fault
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(60))
    done = cli(*label(path, tmp_path / "o.jsonl", good.url, bad.url))
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in read_jsonl(tmp_path / "o.jsonl")} == {"ok"}
    assert len(bad.bodies) < 40


def test_a_wrong_key_at_one_of_them_stops_before_anything_is_asked(two: tuple[Server, Server]) -> None:
    two[1].key = "other"
    with pytest.raises(FatalError, match="refused the key"):
        OpenAIEngine("planted", f"{two[0].url},{two[1].url}")


def test_the_same_server_named_twice_is_one(server: Server) -> None:
    assert len(OpenAIEngine("planted", f"{server.url}, {server.url}")._servers) == 1


def test_a_url_that_is_none_is_named(server: Server) -> None:
    with pytest.raises(UsageError, match=r"must begin with http:// or https://, got there"):
        OpenAIEngine("planted", f"{server.url},there")


def test_it_is_spared_for_longer_each_time() -> None:
    server = _Server("http://x/v1")
    spared = []
    for _ in range(10):
        server.failed()
        spared.append(round(server.closed - time.monotonic()))
    assert spared == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_the_proxy_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "near")
    assert _Server("http://far:8000/v1").proxy == "http://proxy:3128"
    assert _Server("http://near:8000/v1").proxy is None
