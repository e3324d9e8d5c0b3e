"""The key goes to the server and nowhere else: whatever is written or said is searched for it, unpacked where it is packed."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sqlite3
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web

from rlaif.data import read_rows
from rlaif.store import Store
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl
from tests.server import Server, error
from tests.survival.children import finished

KEY = "sk-survival-0123456789ABCDEFabcdef"
TOKEN = "hf_SurvivalOf0123456789ABCDEFabcdef"
SECRETS = {"OPENAI_API_KEY": KEY, "HF_TOKEN": TOKEN}
TALK = {"OPENAI_LOG": "debug", "PYTHONASYNCIODEBUG": "1", "PYTHONFAULTHANDLER": "1"}
"""Whatever makes Python and the SDK say more than they do."""


def forms(secret: str) -> Iterator[bytes]:
    """How a secret may stand in a file: as it is, turned into base64 (after 0, 1 or 2 other bytes), hexadecimal, quoted."""
    yield secret.encode()
    yield secret.encode().hex().encode()
    yield quote(secret, safe="").encode()
    for shift in range(3):
        start, end = (shift * 4 + 2) // 3, -4  # what does not depend on its neighbours
        yield base64.b64encode(b"x" * shift + secret.encode())[start:end]


FORMS = {form: name for name, secret in SECRETS.items() for form in forms(secret)}


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    text = f"Authorization: Bearer {KEY}"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("inner.txt", text)
    for n in range(3):
        (tmp_path / f"d{n}.txt").write_bytes(b"data:" + base64.b64encode(b"x" * n + text.encode()))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [text] * 9}), tmp_path / "e.parquet", compression="zstd")
    from rlaif.records import Completion

    store = Store(tmp_path / "f.store")
    store.add_completion("ab" * 32, Completion(text * 9))
    store.close()
    assert {path for path, _ in found_in(tmp_path)} == {file.name for file in tmp_path.iterdir()}


def found_in(folder: Path) -> set[tuple[str, str]]:
    """Files that hold a secret, and its name."""
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert files
    return {
        (str(path.relative_to(folder)), name)
        for path, data in files.items()
        for content in contents(path, data)
        for form, name in FORMS.items()
        if form in content
    }


def contents(path: Path, data: bytes) -> Iterator[bytes]:
    """A file's bytes, and what is packed in them."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(path) as file:
            yield from (file.read(name) for name in file.namelist())
    elif data[:4] == b"PAR1":
        yield from (json.dumps(row, default=str).encode() for _, row in read_rows(str(path)))
    elif data[:15] == b"SQLite format 3" and path.name.endswith(".store"):
        yield from stored(path)
    for packed in re.findall(rb"[A-Za-z0-9+/]{200,}={0,2}", data):  # a picture or a font in a page
        yield base64.b64decode(packed + b"==")


def stored(path: Path) -> Iterator[bytes]:
    with sqlite3.connect(path) as db:
        keys = {
            table: [key if isinstance(key, str) else key.hex() for (key,) in db.execute(f"SELECT key FROM {table}")]
            for table in ("completions", "rows")
        }
    db.close()
    store = Store(path)
    try:
        for key in keys["completions"]:
            yield repr(store.completion(key, even_failed=True)).encode()
        for key in keys["rows"]:
            yield json.dumps(store.result(key)).encode()
    finally:
        store.close()


def quiet(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said, in which there must be no secret."""
    said = done.stdout + done.stderr
    assert not [name for form, name in FORMS.items() if form.decode() in said], said
    return said


# ------------------------------------------------------------ a server that tells the key to all


class Telltale:
    """Every first try of a call is an error that echoes the header; every seventh row never gets anything else."""

    def __init__(self) -> None:
        self.met: set[str] = set()

    async def __call__(self, body: dict[str, Any]) -> web.StreamResponse | None:
        name = json.dumps([body["messages"], body.get("seed")])
        row = int(body["messages"][0]["content"].partition("Question ")[2].partition("?")[0])
        if name in self.met and row % 7 < 6:
            return None
        self.met.add(name)
        words = f"Who is 'Authorization: Bearer {KEY}'?"
        return (
            error(500, words),
            error(429, words, headers={"Retry-After": "0"}),
            web.Response(status=502, text=words),
            web.Response(text=words, content_type="application/json"),
            web.Response(text=json.dumps({"error": {"message": words}}), content_type="application/json"),
        )[len(self.met) % 5]


@pytest.fixture
def telltale(server: Server) -> Server:
    server.key = KEY
    server.fault = Telltale()
    server.logprobs = 0
    server.speak = lambda p: f"{1 if p > 0.5 else 2}\nYou sent Authorization: Bearer {KEY}"
    return server


def http(server: Server) -> tuple[str, ...]:
    return ("--engine", "openai", "--base-url", server.url, "--model", "planted")


def test_a_server_that_echoes_the_key_puts_it_into_nothing(telltale: Server, tmp_path: Path) -> None:
    rows = [{**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b"} for row in make_rows(15)]
    path, out = write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "o.jsonl"
    done = cli("label", path, "-o", out, *http(telltale), "--samples", "1", "--tries", "3", env={**SECRETS, **TALK})
    assert done.returncode == 1, done.stderr  # the rows that never got through
    assert "[key]" in quiet(done)
    assert [row["id"] for row in read_jsonl(out) if row["status"] == "error"] == ["6", "13"]
    assert all(f"Bearer {KEY}" == headers["Authorization"] for headers in telltale.headers)
    assert not found_in(tmp_path)
    for command in (
        ("align", out, "--human", "human", "-o", tmp_path / "agreement.json"),
        ("report", out, "-o", tmp_path / "report.html"),
        ("pairs", out, "-o", tmp_path / "pairs.parquet"),
        ("label", path, "-o", out, *http(telltale), "--samples", "1", "--reparse"),
    ):
        finished(tmp_path / "said", *command, env=SECRETS)
        said_quietly(tmp_path / "said")
    assert not found_in(tmp_path)


PIPELINE = """
steps:
  label: label rows.jsonl -o labelled.jsonl --engine openai --base-url {url} --model planted --samples 1
  pairs: pairs labelled.jsonl -o train.jsonl
"""


def test_a_pipelines_logs_lineage_and_cards_know_no_key(telltale: Server, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", make_rows(5))
    (tmp_path / "pipe.yaml").write_text(PIPELINE.format(url=telltale.url))
    out = tmp_path / "out"
    quiet(cli("run", tmp_path / "pipe.yaml", "-o", out, env=SECRETS))
    quiet(cli("card", out, env=SECRETS))
    assert {"lineage.json", "labelled.jsonl.store", "train.jsonl"} <= {path.name for path in out.iterdir()}
    assert list((out / "logs").iterdir())
    assert list(out.rglob("*.md"))
    assert not found_in(tmp_path)


# ------------------------------------------------------------ keys in other places


def said_quietly(path: Path) -> str:
    said = path.read_text()
    assert not [name for form, name in FORMS.items() if form.decode() in said], said
    return said


@pytest.mark.parametrize("where", ["http://{key}@{host}/v1", "http://me:{key}@{host}/v1", "http://{host}/v1?key={key}"])
def test_a_key_in_the_url_is_in_nothing(server: Server, tmp_path: Path, where: str) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(2)), tmp_path / "o.jsonl"
    url = where.format(key=KEY, host=f"127.0.0.1:{server.port}")
    words = ("--engine", "openai", "--base-url", url, "--model", "planted", "--tries", "1")
    finished(tmp_path / "said", "label", path, "-o", out, *words)
    said_quietly(tmp_path / "said")
    assert not found_in(tmp_path)


CRASHES = {
    "a traceback": ("ZeroDivisionError", "1 / 0"),
    "a signal": ("Fatal Python error: Aborted", "os.abort()"),
    "an error that quotes its arguments": ("KeyError", "{}[str(request)]"),
}

CRASH = """
import faulthandler, os
from rlaif.engines.openai import OpenAIEngine
faulthandler.enable()
async def crash(self, request):
    all = {{**vars(self), **os.environ}}
    {}
OpenAIEngine.complete = crash
"""


@pytest.mark.parametrize("kind", CRASHES)
def test_a_crash_inside_the_engine_shows_no_key(server: Server, tmp_path: Path, kind: str) -> None:
    words, code = CRASHES[kind]
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(2)), tmp_path / "o.jsonl"
    done = finished(
        tmp_path / "said", "label", path, "-o", out, *http(server), env={**SECRETS, **TALK}, setup=CRASH.format(code)
    )
    assert done not in (0, 2)
    said = said_quietly(tmp_path / "said")
    assert words in said
    assert "in crash" in said
    assert not found_in(tmp_path)
