"""A server that fails in every way at once: each row ends with its own label, or with a status that says why it has none."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlaif.records import RlaifError, Row
from tests.conftest import in_process, make_rows, read_jsonl, write_jsonl
from tests.server import Server, error

ROWS = 120
LABELS = ("status", "label", "soft_label", "error")


def label(server: Server, path: Path, out: Path, *more: str) -> None:
    in_process("label", path, "-o", out, "--engine", "openai", "--base-url", server.url, "--model", "planted", *more)


def labels(out: Path) -> dict[str, tuple[Any, ...]]:
    return {row["id"]: tuple(row[name] for name in LABELS) for row in read_jsonl(out)}


def this_run(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.with_name(out.name + ".run.json").read_text())["this_run"]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "d.jsonl", make_rows(ROWS))


@pytest.fixture(scope="module")
def right(data: Path) -> dict[str, tuple[Any, ...]]:
    """The labels of a run without a fault."""
    with Server() as server:
        label(server, data, data.with_name("right.jsonl"))
    found = labels(data.with_name("right.jsonl"))
    assert len(found) == ROWS
    assert {status for status, *_ in found.values()} == {"ok"}
    return found


# ------------------------------------------------------------ faults


class Half(web.StreamResponse):
    """An answer that promises more than it sends, and then closes the connection."""

    async def prepare(self, request: web.BaseRequest) -> Any:
        self.content_length = 1000
        writer = await super().prepare(request)
        await self.write(b'{"id": "x", "object": "chat.completion", "choices": [{"index": 0, "mess')
        assert request.transport
        request.transport.close()
        return writer


class Reset(web.StreamResponse):
    """No answer: the connection is reset, as by a machine that went down."""

    async def prepare(self, request: web.BaseRequest) -> Any:
        assert request.transport
        at_once = struct.pack("ii", 1, 0)
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        request.transport.abort()
        raise ConnectionResetError


async def hang() -> web.StreamResponse:
    await asyncio.sleep(3)
    return web.Response()


def answer(value: Any) -> web.Response:
    return web.Response(text=json.dumps(value), content_type="application/json")


def said(server: Server, body: dict[str, Any], **message: Any) -> web.Response:
    """The right answer but for some of the message; its log-probabilities are none of the choices'."""
    whole = server._completion(body)
    whole["choices"][0]["message"] |= message
    if "logprobs" in whole["choices"][0]:
        token = {"token": "", "logprob": -0.1, "bytes": None}
        whole["choices"][0]["logprobs"] = {"content": [{**token, "top_logprobs": [token]}]}
    return answer(whole)


# A fifth of the tries meets each of the four families, the last fifth is answered.
FAMILIES: list[list[Callable[[], Any]]] = [
    [
        lambda: error(429, "slow down", headers={"Retry-After": "0.05"}),
        lambda: error(429, "slow down"),
        lambda: error(500, "oops"),
        lambda: error(502, "bad gateway"),
        lambda: error(503, "busy", headers={"Retry-After": "0"}),
        lambda: web.Response(status=500, text="<html>oops</html>", content_type="text/html"),
    ],
    [hang],
    [Half, Reset],
    [
        lambda: web.Response(text="", content_type="application/json"),
        lambda: web.Response(text="<html>gateway</html>", content_type="text/html"),
        lambda: web.Response(text='{"id": "x", "choi', content_type="application/json"),
        lambda: answer([]),
        lambda: answer({"id": "x", "choices": []}),
        lambda: answer({"id": "x", "choices": None}),
        lambda: answer({"error": {"message": "with the status 200"}}),
    ],
]


class Mixed:
    """A fault by the draw, anew for each try; a call that met two is answered. Every tenth row is refused, and every tenth
    gets an empty answer, however often it asks.
    """

    def __init__(self, server: Server, seed: int):
        self.server, self.draw = server, random.Random(seed)
        self.met: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    async def __call__(self, body: dict[str, Any]) -> web.StreamResponse | None:
        call = json.dumps([body["messages"], body.get("logprobs"), body.get("seed")])
        family = self.draw.randrange(5)
        if family < 4 and self.met[call] < 2:
            self.met[call] += 1
            self.kinds[("status", "hang", "connection", "JSON")[family]] += 1
            made = self.draw.choice(FAMILIES[family])()
            return await made if asyncio.iscoroutine(made) else made
        row = place(body)
        if row % 10 == 3:
            return said(self.server, body, content=None, refusal="I cannot compare these.")
        if row % 10 == 7:
            return said(self.server, body, content="")
        return None


def place(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"].partition("Question ")[2].partition("?")[0])


def test_four_of_five_tries_fail_in_every_way_and_the_labels_are_those_without_faults(
    server: Server, tmp_path: Path, data: Path, right: dict[str, tuple[Any, ...]]
) -> None:
    mixed = Mixed(server, seed=1)
    server.fault = mixed
    out = tmp_path / "o.jsonl"
    label(server, data, out, "--timeout", "0.5", "--tries", "20", "--concurrency", "256")
    found = labels(out)
    assert list(found) == list(right)
    for row, (status, chosen, soft, _) in found.items():
        failed = {3: "refused", 7: "unparsed"}.get(int(row) % 10)
        if failed:
            assert (status, chosen, soft) == (failed, None, None)
        else:
            assert (status, chosen, soft) == right[row][:3]
    assert min(mixed.kinds[kind] for kind in ("status", "hang", "connection", "JSON")) > 40
    assert this_run(out)["retries"] >= sum(mixed.kinds.values())
    print(f"{ROWS} rows, {sum(mixed.kinds.values())} faults met: {dict(mixed.kinds)}")


def test_a_storm_of_429s_is_waited_out(server: Server, tmp_path: Path, data: Path, right: dict[str, tuple[Any, ...]]) -> None:
    begun = []
    refused = 0

    async def storm(body: dict[str, Any]) -> web.StreamResponse | None:
        nonlocal refused
        begun.append(time.monotonic())
        if begun[-1] - begun[0] < 0.8:
            refused += 1
            return error(429, "slow down")
        return None

    server.fault = storm
    label(server, data, tmp_path / "o.jsonl")
    assert labels(tmp_path / "o.jsonl") == right
    assert refused >= 20
    print(f"{ROWS} rows, {refused} times 429 in 0.8 s")


def test_a_server_that_restarts_in_the_middle_costs_no_label(
    tmp_path: Path, data: Path, right: dict[str, tuple[Any, ...]]
) -> None:
    out, first = tmp_path / "o.jsonl", Server().__enter__()
    first.latency = 0.02
    again = Server(port=first.port)

    def restart() -> None:
        while len(first.bodies) < ROWS:
            time.sleep(0.005)
        first.__exit__()
        time.sleep(0.5)  # nobody listens
        again.__enter__()

    restarting = threading.Thread(target=restart)
    restarting.start()
    label(first, data, out, "--concurrency", "16")
    restarting.join()
    again.__exit__()
    assert labels(out) == right
    assert ROWS <= len(first.bodies) < 2 * ROWS
    assert len(again.bodies) >= 2 * ROWS - len(first.bodies)
    assert this_run(out)["retries"] > 0


# ------------------------------------------------------------ JSON of another shape


def top(value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value in place of the most probable tokens."""

    def change(whole: dict[str, Any]) -> None:
        whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = value

    return change


def first(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda whole: whole["choices"][0].update(changes)


def each(logprob: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value in place of all log-probabilities."""

    def change(whole: dict[str, Any]) -> None:
        for token in whole["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            token["logprob"] = logprob

    return change


WHOLE: dict[str, Any] = {
    "a list": [],
    "a list of answers": [{"choices": []}],
    "null": None,
    "a number": 7,
    "a text": "1",
    "an empty object": {},
    "choices null": {"choices": None},
    "choices empty": {"choices": []},
    "choices an object": {"choices": {"0": {}}},
    "choices a text": {"choices": "1"},
    "a choice null": {"choices": [None]},
    "a choice a number": {"choices": [1]},
    "a choice a text": {"choices": ["1"]},
    "a choice empty": {"choices": [{}]},
    "an error with the status 200": {"error": {"message": "overloaded"}},
}
"""In place of the whole answer."""

PARTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "message null": first(message=None),
    "message a text": first(message="1"),
    "message a list": first(message=[{"content": "1"}]),
    "message empty": first(message={}, logprobs={"content": [{"token": "x", "logprob": -1, "top_logprobs": []}]}),
    "content a number": lambda whole: (whole["choices"][0]["message"].update(content=1), top([])(whole))[0],
    "content a list": lambda whole: (whole["choices"][0]["message"].update(content=[{"text": "1"}]), top([])(whole))[0],
    "top_logprobs an object": top({"1": -0.1, "2": -2.0}),
    "top_logprobs a text": top("1"),
    "top_logprobs of nulls": top([None, None]),
    "top_logprobs of texts": top(["1", "2"]),
    "top_logprobs without tokens": top([{"logprob": -0.1}, {"logprob": -2.0}]),
    "top_logprobs without values": top([{"token": "1"}, {"token": "2"}]),
    "tokens that are numbers": top([{"token": 1, "logprob": -0.1}, {"token": 2, "logprob": -2.0}]),
    "tokens that are null": top([{"token": None, "logprob": -0.1}]),
    "log-probabilities as texts": each("-0.1"),
    "log-probabilities as words": each("high"),
    "log-probabilities null": each(None),
    "log-probabilities true": each(True),
    "log-probabilities NaN": each(float("nan")),
    "log-probabilities infinite": each(float("inf")),
    "log-probabilities minus infinity": each(float("-inf")),
    "log-probabilities in lists": each([-0.1]),
    "log-probability content a text": first(logprobs={"content": "1"}),
    "log-probability content of nulls": first(logprobs={"content": [None]}),
    "logprobs a list": first(logprobs=[-0.1]),
    "logprobs a text": first(logprobs="-0.1"),
}
"""Changes of an answer that is right but for these."""

HARMLESS: dict[str, Callable[[dict[str, Any]], None]] = {
    "usage null": lambda whole: whole.update(usage=None),
    "usage missing": lambda whole: whole.pop("usage"),
    "id and model null": lambda whole: whole.update(id=None, model=None, created=None, object=None),
    "finish_reason missing": lambda whole: whole["choices"][0].pop("finish_reason"),
    "more than was asked for": lambda whole: whole.update(extra={"deep": [1, None]}),
}
"""Changes that leave the verdict where it is."""

EITHER: dict[str, Callable[[dict[str, Any]], None]] = {
    "usage a text": lambda whole: whole.update(usage="much"),
    "usage without numbers": lambda whole: whole.update(usage={"prompt_tokens": None, "completion_tokens": "2"}),
    "usage not finite": lambda whole: whole.update(usage={"prompt_tokens": 5, "completion_tokens": float("nan")}),
    "finish_reason a number": first(finish_reason=7),
}
"""Changes that may be overlooked or refused."""


def test_no_shape_of_json_is_a_crash_or_a_label(
    server: Server, tmp_path: Path, data: Path, right: dict[str, tuple[Any, ...]]
) -> None:
    names = [*WHOLE, *PARTS, *HARMLESS, *EITHER]
    assert 2 * len(names) < ROWS
    shapes = {2 * n + 1: name for n, name in enumerate(names)}  # every other row

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        name = shapes.get(place(body))
        if name is None:
            return None
        if name in WHOLE:
            return answer(WHOLE[name])
        if "logprobs" not in body and name in PARTS:
            return answer({"choices": None})  # asked for a text: this one is wrong for good
        whole = copy.deepcopy(server._completion(body))
        (PARTS | HARMLESS | EITHER)[name](whole)
        return answer(whole)

    server.fault = fault
    out = tmp_path / "o.jsonl"
    with pytest.raises(RlaifError, match="rows met an error"):
        label(server, data, out, "--tries", "2", "--concurrency", "256", "--samples", "1")
    rows: dict[str, Row] = {row["id"]: row for row in read_jsonl(out)}
    assert list(rows) == list(right)
    wrong = {}
    for row, found in rows.items():
        name = shapes.get(int(row), row)
        good = (found["label"], found["soft_label"]) == right[row][1:3]
        failed = found["status"] in ("error", "unparsed") and found["label"] is None and found["soft_label"] is None
        may_fail = name in WHOLE or name in PARTS or name in EITHER
        may_pass = name not in WHOLE and name not in PARTS
        if not ((good and may_pass) or (failed and may_fail)):
            wrong[name] = found
    assert not wrong, {name: (found["status"], found["label"], found["soft_label"]) for name, found in wrong.items()}
    server.fault = None
    label(server, data, out, "--samples", "1")
    assert labels(out) == right


def test_one_answer_without_log_probabilities_changes_no_other_rows_label(
    server: Server, tmp_path: Path, data: Path, right: dict[str, tuple[Any, ...]]
) -> None:
    """A server that has given them is not taken for one that has none."""

    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        if place(body) != 20 or "logprobs" not in body:
            return None
        whole = server._completion(body)
        whole["choices"][0]["logprobs"] = None
        return answer(whole)

    server.fault = fault
    out = tmp_path / "o.jsonl"
    with suppress(RlaifError):  # the row may be given up, or asked for a spoken answer
        label(server, data, out, "--tries", "2", "--concurrency", "4")
    found = labels(out)
    assert found["20"][1] in (right["20"][1], None)
    assert {row: what for row, what in found.items() if row != "20"} == {r: what for r, what in right.items() if r != "20"}


def test_a_model_list_of_any_shape_is_no_crash(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(2))
    shapes = ("null", "[]", '{"data": null}', '{"data": [null]}', '{"data": [{"id": 7}]}', '{"data": {}}', "1 2", "")
    for n, shape in enumerate(shapes):
        with Listed(shape) as other:
            label(other, path, tmp_path / f"{n}.jsonl")
        assert [row["status"] for row in read_jsonl(tmp_path / f"{n}.jsonl")] == ["ok", "ok"], shape


class Listed(Server):
    """Gives such a list of its models."""

    def __init__(self, shape: str):
        super().__init__()
        self.shape = shape

    async def _models(self, request: web.Request) -> web.Response:
        return web.Response(text=self.shape, content_type="application/json")
