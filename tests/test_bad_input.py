"""Bad input and broken surroundings through the real command line: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.conftest import clean_env, cli, make_rows, read_jsonl, write_jsonl
from tests.server import Server, error

KEY = "sk-test-0123456789abcdef"
ROW = {"prompt": "Q?", "response_a": "One.", "response_b": "Two."}
MOCK = ("--engine", "mock")

Done = subprocess.CompletedProcess[str]


def refused(done: Done, code: int, message: str) -> str:
    """Check that a command ended with one line that says what is wrong, and give that line."""
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("labelling ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("rlaif: ")
    assert re.search(message, lines[0]), lines[0]
    assert done.returncode == code
    return lines[0]


def no_key(folder: Path, done: Done, key: str = KEY) -> None:
    """Check that the key is in nothing that a command said or left behind."""
    assert key not in done.stdout + done.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert key.encode() not in path.read_bytes(), path.name


def lines_of(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def label(*more: str, data: str = "d.jsonl", out: str = "o.jsonl", engine: tuple[str, ...] = MOCK) -> tuple[str, ...]:
    return ("label", data, "-o", out, *engine, *more)


# ------------------------------------------------------------ found before anything is spent

BAD_TEMPLATE = '{% extends "pairwise/_layout.jinja" %}\n{% block preamble %}{{ }}{% endblock %}'
LABELLED = {**ROW, "id": "0", "status": "ok", "soft_label": 0.9, "label": "a"}

# Name: the files, the command, and what the line must say.
USAGE: dict[str, tuple[dict[str, str], tuple[str, ...], str]] = {
    "no such file": ({}, label(data="gone.jsonl"), r"no such file: gone\.jsonl"),
    "unknown file type": ({"d.csv": "a,b\n"}, label(data="d.csv"), r"d\.csv: unknown file type"),
    "missing column": ({"d.jsonl": lines_of({"prompt": "Q?"})}, label(), r"d\.jsonl line 1: no column 'response_a'"),
    "empty file": ({"d.jsonl": ""}, label(), r"d\.jsonl: no rows"),
    "blank file": ({"d.jsonl": "\n\n"}, label(), r"d\.jsonl: no rows"),
    "broken JSON": ({"d.jsonl": lines_of(ROW, ROW) + '{"prompt": '}, label(), r"d\.jsonl line 3: not JSON"),
    "a list": ({"d.jsonl": lines_of(ROW, [1])}, label(), r"d\.jsonl line 2: expected a JSON object .* got a list"),
    "empty response": (
        {"d.jsonl": lines_of(ROW, {**ROW, "response_b": " "})},
        label(),
        r"d\.jsonl line 2: column 'response_b' is empty; --bad-rows keep",
    ),
    "null response": (
        {"d.jsonl": lines_of({**ROW, "response_a": None})},
        label(),
        r"d\.jsonl line 1: column 'response_a': expected text, got null",
    ),
    "identical responses": (
        {"d.jsonl": lines_of(ROW, {**ROW, "response_b": "One."}, {**ROW, "response_b": "One."})},
        label(),
        r"d\.jsonl line 2: columns 'response_a' and 'response_b' are identical.* \(and 1 more such rows\)",
    ),
    "reserved column": ({"d.jsonl": lines_of({**ROW, "label": "a"})}, label(), r"d\.jsonl line 1: column 'label' is one that"),
    "split of a file": ({}, label("--split", "test"), r"d\.jsonl has no splits"),
    "unknown template": (
        {},
        label("--template", "kindness"),
        r"unknown template 'kindness': a file, or one of constitution, general",
    ),
    "no such template file": ({}, label("--template", "t.jinja"), r"no such template file: t\.jinja"),
    "template syntax": ({"t.jinja": BAD_TEMPLATE}, label("--template", "t.jinja"), r"template t\.jinja: .* \(line 2\)"),
    "template settings": ({"t.jinja": "---\nx: 1\n---\n"}, label("--template", "t.jinja"), r"unknown setting 'x'"),
    "unknown ending": ({}, label(out="o.csv"), r"o\.csv: the output must end in \.jsonl, \.jsonl\.gz, \.parquet"),
    "missing folder": ({}, label(out="gone/o.jsonl"), r"no such folder: gone"),
    "output is the input": ({}, label(out="d.jsonl"), r"d\.jsonl: the output is the input"),
    "output is the input by another name": ({}, label(out="../{here}/d.jsonl"), r"the output is the input"),
    "output is not ours": ({"o.jsonl": "mine\n"}, label(), r"o\.jsonl is there already, and no store beside it"),
    "mixed types for parquet": (
        {"d.jsonl": lines_of({**ROW, "x": 1}, {**ROW, "x": "a"})},
        label(out="o.parquet"),
        r"column 'x', rows 1 to 2: no parquet type holds all its values",
    ),
    "map without =": ({}, label("--map", "prompt"), r"--map: expected NAME=VALUE, got 'prompt'"),
    "map twice": ({}, label("--map", "prompt=x", "--map", "prompt=y"), r"--map: prompt is given twice"),
    "map of nothing": ({}, label("--map", "prompt=query"), r"--map prompt=query: no column 'query'; there are: prompt"),
    "budget without price": ({}, label("--max-cost", "1"), r"--max-cost needs --price"),
    "price of one number": ({}, label("--price", "1"), r"--price: expected two numbers, IN,OUT, got '1'"),
    "price in words": ({}, label("--price", "a,b"), r"--price: expected two numbers"),
    "negative price": ({}, label("--price=-1,2"), r"--price: prices cannot be negative"),
    "price not a number": ({}, label("--price", "nan,1"), r"--price"),
    "option without =": ({}, label("-E", "nonsense"), r"-E: expected NAME=VALUE, got 'nonsense'"),
    "unknown setting": ({}, label("-E", "nonsense=1"), r"engine mock has no setting 'nonsense'; it has model, seed, k"),
    "share over one": ({}, label("-E", "garbage=2"), r"garbage is a share, from 0 to 1, not 2"),
    "share in words": ({}, label("-E", "garbage=much"), r"mock engine: garbage"),
    "base URL for mock": ({}, label("--base-url", "http://127.0.0.1:1"), r"--base-url goes with --engine openai, not mock"),
    "base URL without scheme": (
        {},
        label("--base-url", "localhost:1", engine=("--engine", "openai")),
        r"--base-url must begin with http:// or https://",
    ),
    "no key": ({}, label(engine=("--engine", "openai", "--model", "m")), r"no key: set .* OPENAI_API_KEY"),
    "no model for vllm": ({}, label(engine=("--engine", "vllm")), r"--engine vllm needs --model"),
    "reparse of nothing": ({}, label("--reparse"), r"o\.jsonl: no store beside it"),
    "align without the column": (
        {"o.jsonl": lines_of(LABELLED)},
        ("align", "o.jsonl", "--human", "human"),
        r"no column 'human'",
    ),
    "align with an unknown value": (
        {"o.jsonl": lines_of({**LABELLED, "human": "a"}, {**LABELLED, "human": "good"})},
        ("align", "o.jsonl", "--human", "human"),
        r"row 2, column 'human': 'good' is not a human label .*--human-values",
    ),
    "pairs of unlabelled rows": (
        {},
        ("pairs", "d.jsonl", "-o", "t.jsonl"),
        r"d\.jsonl line 1: no column 'id'; is this an output",
    ),
    "pairs of nothing": ({"o.jsonl": ""}, ("pairs", "o.jsonl", "-o", "t.jsonl"), r"o\.jsonl: no rows"),
    "pairs onto itself": (
        {"o.jsonl": lines_of(LABELLED)},
        ("pairs", "o.jsonl", "-o", "o.jsonl"),
        r"would overwrite the labelled",
    ),
    "pairs of a changed label": (
        {"o.jsonl": lines_of({**LABELLED, "label": "b"})},
        ("pairs", "o.jsonl", "-o", "t.jsonl"),
        r"row '0': label 'b' and soft_label 0\.9 do not belong together",
    ),
    "pairs of a label without its soft label": (
        {"o.jsonl": lines_of({**LABELLED, "soft_label": None})},
        ("pairs", "o.jsonl", "-o", "t.jsonl"),
        r"row '0': label 'a' and soft_label None do not belong together",
    ),
    "template to show": ({}, ("templates", "show", "kindness"), r"unknown template 'kindness'"),
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", USAGE)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    files, args, message = USAGE[name]
    write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    before = snapshot(tmp_path)
    refused(cli(*(arg.format(here=tmp_path.name) for arg in args), cwd=tmp_path), 2, message)
    assert snapshot(tmp_path) == before


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "o.jsonl", [LABELLED])
    (tmp_path / "t.jsonl").mkdir()
    refused(cli("pairs", path, "-o", tmp_path / "t.jsonl"), 2, r"t\.jsonl: is a folder")
    refused(cli(*label(data=str(path), out=str(tmp_path / "t.jsonl"))), 2, r"t\.jsonl: is a folder")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (label(engine=("--engine", "abacus")), "--engine"),
        (label("--bad-rows", "perhaps"), "--bad-rows"),
        (label("--limit", "0"), "--limit"),
        (label("--limit", "many"), "--limit"),
        (label("--colour", "red"), "--colour"),
        (("label", "d.jsonl"), "--out"),
        (("label",), "data"),
        (("align", "o.jsonl"), "--human"),
        (("pairs", "o.jsonl", "-o", "t.jsonl", "--min-confidence", "0.4"), "--min-confidence"),
        (("lable", "d.jsonl"), "lable"),
    ],
)
def test_what_the_command_line_does_not_know_is_named(tmp_path: Path, args: tuple[str, ...], named: str) -> None:
    done = cli(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert named.lower() in done.stderr.lower()
    assert not done.stdout


@pytest.mark.parametrize("setting", ["k=steep", "latency=-1", "seed=x"])
def test_a_setting_of_the_wrong_kind_is_one_line(tmp_path: Path, setting: str) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    refused(cli(*label("-E", setting), cwd=tmp_path), 2, setting.partition("=")[0])


def test_a_template_that_fails_on_a_row_is_one_line_and_asks_nothing(server: Server, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    (tmp_path / "t.jinja").write_text(BAD_TEMPLATE.replace("{{ }}", "{{ row.ward }}"))
    done = cli(*label("--template", "t.jinja", engine=http(server)), cwd=tmp_path)
    refused(done, 2, r"template t\.jinja: 'dict object' has no attribute 'ward'")
    assert not server.bodies


# ------------------------------------------------------------ rows that cannot be judged, kept


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_bad_rows_are_kept_with_their_reason_and_are_never_asked_about(server: Server, tmp_path: Path, ending: str) -> None:
    rows = make_rows(6)
    rows[1]["response_a"] = ""
    rows[3]["response_b"] = None
    rows[4]["response_a"] = rows[4]["response_b"]
    out = tmp_path / f"o{ending}"
    command = label("--bad-rows", "keep", data=str(write_jsonl(tmp_path / "d.jsonl", rows)), out=str(out), engine=http(server))
    line = refused(cli(*command), 1, r"3 rows met an error, .* the first, .*2: column 'response_a' is empty")
    assert str(out) in line
    made = written(out)
    assert [row["status"] for row in made] == ["ok", "error", "ok", "error", "error", "ok"]
    assert [row["error"] for row in made if row["error"]] == [
        "column 'response_a' is empty",
        "column 'response_b': expected text, got null",
        "columns 'response_a' and 'response_b' are identical: there is nothing to compare",
    ]
    for row, given in zip(made, rows, strict=True):
        assert {name: row[name] for name in given} == given
        failed = row["status"] == "error"
        assert (row["label"] is None) == (row["soft_label"] is None) == (row["votes"] == []) == failed
    assert len(server.bodies) == 2 * 3
    assert not [body for body in server.bodies if re.search(r"Question [134]\?", body["messages"][0]["content"])]
    refused(cli(*command), 1, "3 rows met an error")
    assert len(server.bodies) == 2 * 3  # going on costs nothing either


def test_dialogues_that_cannot_be_judged_are_kept_too(tmp_path: Path) -> None:
    def dialogue(question: str, answer: str) -> str:
        return f"\n\nHuman: {question}\n\nAssistant: {answer}"

    rows = [
        {"chosen": dialogue("Q", "Good."), "rejected": dialogue("Q", "Bad.")},
        {"chosen": dialogue("Q", "Good."), "rejected": dialogue("R", "Bad.")},
        {"chosen": None, "rejected": None},
    ]
    write_jsonl(tmp_path / "d.jsonl", rows)
    refused(cli(*label("--bad-rows", "keep"), cwd=tmp_path), 1, "2 rows met an error")
    made = read_jsonl(tmp_path / "o.jsonl")
    assert [row["status"] for row in made] == ["ok", "error", "error"]
    assert [row["label"] for row in made[1:]] == [None, None]
    assert "answer different prompts" in made[1]["error"]


# ------------------------------------------------------------ the server


def http(server: Server, model: str = "planted") -> tuple[str, ...]:
    return ("--engine", "openai", "--base-url", server.url, "--model", model)


def written(out: Path) -> list[dict[str, Any]]:
    if out.name.endswith(".parquet"):
        import pyarrow.parquet as pq

        rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
        return rows
    return read_jsonl(out)


def always(answer: Callable[[], web.Response]) -> Callable[[dict[str, Any]], Any]:
    async def fault(body: dict[str, Any]) -> web.Response:
        return answer()

    return fault


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("out", ["o.jsonl", "o.jsonl.gz", "o.parquet"])
def test_the_key_is_sent_and_is_in_nothing_else(server: Server, tmp_path: Path, out: str) -> None:
    server.key = KEY
    write_jsonl(tmp_path / "d.jsonl", make_rows(5))
    done = cli(*label(out=out, engine=http(server)), cwd=tmp_path, env={"OPENAI_API_KEY": KEY})
    assert done.returncode == 0, done.stderr
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert len(server.bodies) == 10
    no_key(tmp_path, done)
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl", out, f"{out}.store", f"{out}.run.json"}


def test_a_password_in_the_url_is_in_nothing_either(server: Server, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(2))
    for port in (server.port, free_port()):
        url = f"http://me:{KEY}@127.0.0.1:{port}/v1"
        done = cli(*label("--base-url", url, "--tries", "1", engine=("--engine", "openai")), cwd=tmp_path)
        assert "Traceback" not in done.stderr
        no_key(tmp_path, done)


# Each breaks the server, or the way to it, and says what the line must hold: the server's own words.
BREAKS: dict[str, tuple[Callable[[Server], None], str]] = {
    "wrong key from the start": (
        lambda s: setattr(s, "key", "right"),
        r"refused the key: .*Incorrect API key provided: \[key\]",
    ),
    "401 on a call": (
        lambda s: setattr(s, "fault", always(lambda: error(401, f"Key {KEY} was revoked"))),
        r"the server says 401: .*Key \[key\] was revoked",
    ),
    "403 on a call": (
        lambda s: setattr(s, "fault", always(lambda: error(403, "Your region is closed"))),
        r"the server says 403: .*Your region is closed",
    ),
    "404 on a call": (
        lambda s: setattr(s, "model", "another"),
        r"the server says 404: .*The model `planted` does not exist",
    ),
    "400 on a call": (
        lambda s: setattr(s, "fault", always(lambda: error(400, "seed must be even"))),
        r"the server says 400: .*seed must be even",
    ),
    "no money left": (
        lambda s: setattr(s, "fault", always(lambda: error(429, "You exceeded your quota", code="insufficient_quota"))),
        r"the server says 429: .*You exceeded your quota",
    ),
    "several lines of words": (
        lambda s: setattr(s, "fault", always(lambda: error(400, f"bad\n\nrequest\r\nwith {KEY}"))),
        r"the server says 400: .*bad request with \[key\]",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_server_that_refuses_stops_the_run_with_its_words(server: Server, tmp_path: Path, name: str) -> None:
    spoil, message = BREAKS[name]
    spoil(server)
    write_jsonl(tmp_path / "d.jsonl", make_rows(50))
    done = cli(*label("--concurrency", "4", engine=http(server)), cwd=tmp_path, env={"OPENAI_API_KEY": KEY}, timeout=60)
    refused(done, 1, message)
    no_key(tmp_path, done)
    assert len(server.bodies) <= 8  # only what was in flight when the first refusal came
    assert not (tmp_path / "o.jsonl").exists()


def test_a_server_that_is_not_there_is_told_soon(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    url = f"http://127.0.0.1:{free_port()}/v1"
    command = label("--base-url", url, "--model", "m", engine=("--engine", "openai"))
    done = cli(*command, cwd=tmp_path, env={"OPENAI_API_KEY": KEY}, timeout=20)
    refused(done, 1, rf"no server answers at {re.escape(url)}: ")
    no_key(tmp_path, done)


def test_a_model_is_asked_for_by_name_where_the_server_has_several(server: Server, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    done = cli(*label(engine=http(server, "nope")), cwd=tmp_path)
    refused(done, 1, r"the server says 404: .*The model `nope` does not exist")


# ------------------------------------------------------------ what was finished stays


@pytest.mark.parametrize("name", ["wrong key from the start", "401 on a call", "404 on a call", "the server is gone"])
def test_rows_that_were_finished_are_there_after_a_run_that_fails(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(30))
    env = {"OPENAI_API_KEY": KEY}
    with Server() as server:
        command = label("--limit", "10", engine=http(server))
        assert cli(*command, cwd=tmp_path, env=env).returncode == 0
        before = read_jsonl(tmp_path / "o.jsonl")
        assert [row["label"] for row in before if row["label"] in ("a", "b")] == [row["label"] for row in before]
        longer = label("--limit", "20", "--concurrency", "4", engine=http(server))
        if name in BREAKS:
            spoil, message = BREAKS[name]
            spoil(server)
            done = cli(*longer, cwd=tmp_path, env=env, timeout=60)
    if name not in BREAKS:
        message = "no server answers at"
        done = cli(*longer, cwd=tmp_path, env=env, timeout=60)
    refused(done, 1, message)
    no_key(tmp_path, done)
    assert read_jsonl(tmp_path / "o.jsonl") == before
    assert len(before) == 10


# ------------------------------------------------------------ the store


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder with ten rows labelled by the mock engine into o.jsonl."""
    write_jsonl(tmp_path / "d.jsonl", make_rows(20))
    assert cli(*label("--limit", "10"), cwd=tmp_path).returncode == 0
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 10
    return tmp_path


def test_a_store_that_is_none_is_named_and_not_overwritten(labelled: Path) -> None:
    store, out = labelled / "o.jsonl.store", labelled / "o.jsonl"
    store.write_bytes(b"this is not a database, " * 50)
    before = snapshot(labelled)
    refused(cli(*label(), cwd=labelled), 1, r"o\.jsonl\.store: not a store that can be read .*move it away")
    assert snapshot(labelled) == before
    assert len(read_jsonl(out)) == 10


def test_a_store_that_was_cut_short_is_named(labelled: Path) -> None:
    store = labelled / "o.jsonl.store"
    store.write_bytes(store.read_bytes()[: store.stat().st_size // 2])
    before = (labelled / "o.jsonl").read_bytes()
    refused(cli(*label(), cwd=labelled), 1, r"o\.jsonl\.store: not a store that can be read")
    assert (labelled / "o.jsonl").read_bytes() == before


def test_a_store_whose_pages_are_damaged_is_named(labelled: Path) -> None:
    store = labelled / "o.jsonl.store"
    store.write_bytes(store.read_bytes()[:4096] + b"\xab" * (store.stat().st_size - 4096))
    before = (labelled / "o.jsonl").read_bytes()
    try:
        refused(cli(*label(), cwd=labelled), 1, r"o\.jsonl\.store: ")
    finally:
        assert (labelled / "o.jsonl").read_bytes() == before


def test_a_folder_in_the_stores_place_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    (tmp_path / "o.jsonl.store").mkdir()
    refused(cli(*label(), cwd=tmp_path), 2, r"o\.jsonl\.store: ")


def test_a_store_of_a_newer_version_is_left_alone(labelled: Path) -> None:
    with sqlite3.connect(labelled / "o.jsonl.store") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    before = (labelled / "o.jsonl").read_bytes()
    refused(cli(*label(), cwd=labelled), 1, r"o\.jsonl\.store: written by a newer rlaif \(store version 99, this one knows 2\)")
    assert (labelled / "o.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--seed", "1"), r"\(seed 0 → 1\)"),
        (("--one-order",), r"\(both_orders True → False\)"),
        (("-E", "k=3"), r"\(engine\.planted\.k 2\.0 → 3\)"),
        (("--model", "other"), r"\(engine\.model planted → other\)"),
        (("--template", "helpful-base"), r"\(template general → helpful-base, template_hash \w{12}… → \w{12}…\)"),
        (("--samples", "4", "--temperature", "0.5"), r"\(samples None → 4, temperature None → 0\.5\)"),
    ],
)
def test_changed_settings_are_named_with_both_values(labelled: Path, change: tuple[str, ...], named: str) -> None:
    before = snapshot(labelled)
    refused(cli(*label(*change), cwd=labelled), 2, rf"o\.jsonl was made with other settings {named}.*--relabel")
    assert {name: snapshot(labelled)[name] for name in ("o.jsonl", "o.jsonl.run.json")} == {
        name: before[name] for name in ("o.jsonl", "o.jsonl.run.json")
    }
    assert cli(*label("--limit", "10"), cwd=labelled).returncode == 0  # as it was, it still goes on


def test_a_second_process_on_one_output_is_turned_away_and_harms_nothing(server: Server, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    begun, release = threading.Event(), threading.Event()

    async def wait(body: dict[str, Any]) -> None:
        begun.set()
        await asyncio.get_running_loop().run_in_executor(None, release.wait, 60)

    server.fault = wait
    command = label(engine=http(server))
    first = subprocess.Popen(
        [sys.executable, "-m", "rlaif.cli", *command],
        cwd=tmp_path,
        env=clean_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert begun.wait(60)
        refused(cli(*command, cwd=tmp_path), 2, r"o\.jsonl\.store: another process works on this output")
    finally:
        release.set()
        _, words = first.communicate(timeout=60)
    assert first.returncode == 0, words
    assert [row["status"] for row in read_jsonl(tmp_path / "o.jsonl")] == ["ok"] * 3
    assert len(server.bodies) == 6
