"""What is paid for stays: kills, a full disk, damaged files, wrong clocks, closed folders, and others at the same output."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rlaif.records import RlaifError, Row
from tests.conftest import in_process, make_rows, read_jsonl, write_jsonl
from tests.server import Server, error
from tests.survival.children import finished, start
from tests.survival.told import one_line

MOCK = ("--engine", "mock")


def http(server: Server, path: Path, out: Path, *more: str) -> tuple[str, ...]:
    return ("label", str(path), "-o", str(out), "--engine", "openai", "--base-url", server.url, "--model", "planted", *more)


def truth(rows: list[Row]) -> list[bool]:
    return [(row["label"] == "a") == (row["quality_a"] > row["quality_b"]) for row in rows if row["label"] != "tie"]


def labels(out: Path) -> dict[str, tuple[str, float | None]]:
    return {row["id"]: (row["label"], row["soft_label"]) for row in read_jsonl(out)}


# ------------------------------------------------------------ kills


def test_fifty_kills_at_random_moments_lose_nothing_and_repeat_only_calls_in_flight(server: Server, tmp_path: Path) -> None:
    server.latency = 0.02
    width, rows, kills = 8, 700, 50
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(rows)), tmp_path / "o.jsonl"
    words = http(server, path, out, "--concurrency", str(width))
    draw = random.Random(7)
    for n in range(kills):
        # Somewhere in the middle of its work; every tenth while it starts.
        wanted = len(server.bodies) + (0 if n % 10 == 9 else draw.randrange(1, 40))
        process = start(tmp_path / "said", *words)
        while len(server.bodies) < wanted and process.is_alive():
            time.sleep(0.001)
        time.sleep(draw.random() * 0.03)
        assert process.is_alive(), (tmp_path / "said").read_text()
        process.kill()
        process.join()
    before = len(server.bodies)
    assert before > rows / 2
    server.latency = 0.0
    in_process(*words)
    found = read_jsonl(out)
    assert [row["id"] for row in found] == [str(n) for n in range(rows)]
    assert all(truth(found))
    assert len(server.bodies) <= 2 * rows + kills * width
    assert len({json.dumps(body["messages"]) for body in server.bodies}) == 2 * rows
    # An uninterrupted run makes the same rows.
    whole = tmp_path / "whole.jsonl"
    repeated = len(server.bodies) - 2 * rows
    in_process(*http(server, path, whole))
    assert read_jsonl(whole) == found
    print(f"{kills} kills, {rows} rows: {repeated} of {2 * rows} calls were sent twice")


def test_of_processes_that_begin_at_once_on_a_new_output_one_works(server: Server, tmp_path: Path) -> None:
    server.latency = 0.2
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(20)), tmp_path / "o.jsonl"
    started = [start(tmp_path / f"said{n}", *http(server, path, out)) for n in range(4)]
    for process in started:
        process.join()
    assert sorted(process.exitcode or 0 for process in started) == [0, 2, 2, 2]
    for n, process in enumerate(started):
        if process.exitcode:
            assert "another process works on this output" in (tmp_path / f"said{n}").read_text()
    assert all(truth(read_jsonl(out)))
    assert len(server.bodies) == 40


# ------------------------------------------------------------ a full disk, a closed folder


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=32m", "tmpfs")

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words, str(self.folder)], check=True, capture_output=True)

    def remount(self, options: str) -> None:
        self._mount("-o", f"remount,{options}")

    def fill(self, left: int) -> Path:
        """Write a file that leaves so many bytes."""
        ballast = self.folder / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(self.folder).free - left))
        return ballast

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as reason:
        pytest.skip(f"needs to mount a small file system, which is not allowed here: {reason}")
    yield made
    made.close()


def refused(said: Path, *words: str | Path) -> str:
    """The one line that a command ends with."""
    assert finished(said, *words) in (1, 2)
    lines = [line for line in said.read_text().splitlines() if not line.startswith("labelling ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("rlaif: ")
    return lines[0]


def test_a_disk_that_fills_while_answers_are_stored_loses_none_of_them(disk: Disk, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(400)), disk.folder / "o.jsonl"
    ballast = disk.fill(left=120_000)
    line = refused(tmp_path / "said", "label", path, "-o", out, *MOCK)
    assert "disk" in line or "space" in line.lower(), line
    assert "o.jsonl" in line
    assert not [file.name for file in disk.folder.iterdir() if file.name.endswith(".tmp")]
    ballast.unlink()
    in_process("label", path, "-o", out, *MOCK)
    found = json.loads((disk.folder / "o.jsonl.run.json").read_text())
    assert found["complete"]
    assert 0 < found["this_run"]["calls"] < 800  # what was stored before is not asked for again
    assert found["all_runs"]["calls"] == 800
    whole = tmp_path / "whole.jsonl"
    in_process("label", path, "-o", whole, *MOCK)
    assert labels(out) == labels(whole)


def test_a_disk_that_fills_while_the_output_is_written_keeps_the_old_one(disk: Disk, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(400)), disk.folder / "o.jsonl"
    in_process("label", path, "-o", out, *MOCK, "--limit", "398")
    before = out.read_bytes()
    assert len(before) > 300_000
    ballast = disk.fill(left=200_000)  # enough for two more rows in the store, not for another output
    line = refused(tmp_path / "said", "label", path, "-o", out, *MOCK)
    assert f"{out}: cannot be written: No space left" in line
    ballast.unlink()
    disk.fill(left=20_000)
    line = refused(tmp_path / "said", "report", out, "-o", disk.folder / "report.html")
    assert "report.html: cannot be written: No space left" in line
    assert out.read_bytes() == before
    assert not [file.name for file in disk.folder.iterdir() if file.name.endswith(".tmp")]
    ballast.unlink()
    in_process("label", path, "-o", out, *MOCK)
    assert len(read_jsonl(out)) == 400
    assert json.loads((disk.folder / "o.jsonl.run.json").read_text())["this_run"]["calls"] == 0


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    """The same without a file system of its own: no file of the process may be longer than 100 kB."""
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(400)), tmp_path / "o.jsonl"
    setup = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))"
    assert finished(tmp_path / "said", "label", path, "-o", out, *MOCK, setup=setup) == 1
    said = (tmp_path / "said").read_text()
    assert "Traceback" not in said
    assert "rlaif: " in said.splitlines()[-1]
    in_process("label", path, "-o", out, *MOCK)
    assert all(truth(read_jsonl(out)))


def test_a_folder_that_may_only_be_read_is_named(disk: Disk, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(10)), disk.folder / "o.jsonl"
    in_process("label", path, "-o", out, *MOCK, "--limit", "5")
    before = {file.name: file.read_bytes() for file in disk.folder.iterdir()}
    disk.remount("ro")
    for name in ("o.jsonl", "new.jsonl"):
        assert "cannot be written to" in refused(tmp_path / "said", "label", path, "-o", disk.folder / name, *MOCK)
    for words in (
        ("pairs", out, "-o", disk.folder / "pairs.jsonl"),
        ("report", out, "-o", disk.folder / "report.html"),
    ):
        assert str(disk.folder) in refused(tmp_path / "said", *words)
    disk.remount("rw")
    assert {file.name: file.read_bytes() for file in disk.folder.iterdir()} == before
    in_process("label", path, "-o", out, *MOCK)
    assert len(read_jsonl(out)) == 10


# ------------------------------------------------------------ a damaged store


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 rows, 40 of which are labelled."""
    folder = tmp_path_factory.mktemp("stored")
    write_jsonl(folder / "d.jsonl", make_rows(60))
    in_process("label", folder / "d.jsonl", "-o", folder / "o.jsonl", *MOCK, "--limit", "40")
    in_process("label", folder / "d.jsonl", "-o", folder / "right.jsonl", *MOCK)
    return folder


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def zeros(data: bytearray, draw: random.Random) -> None:
    """A sector that was never written."""
    start = draw.randrange(len(data) // 512) * 512
    data[start : start + 512] = bytes(512)


def noise(data: bytearray, draw: random.Random) -> None:
    """A sector with other bytes in it."""
    start = draw.randrange(len(data) // 512) * 512
    data[start : start + 512] = draw.randbytes(512)


def letters(data: bytearray, draw: random.Random) -> None:
    """A byte of a text or a number that became another one of its kind."""
    place = draw.choice([n for n, byte in enumerate(data) if chr(byte).isalnum()])
    data[place] = draw.choice(b"0123456789" if chr(data[place]).isdigit() else b"abcdefghijklmnop")


def flips(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randrange(1, 20)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


@pytest.mark.parametrize("damage", [cut, zeros, noise, flips, letters])
def test_a_damaged_store_is_named_or_gives_what_was_written(
    stored: Path, tmp_path: Path, damage: Callable[[bytearray, random.Random], None]
) -> None:
    right, draw = labels(stored / "right.jsonl"), random.Random(3)
    whole, before = (stored / "o.jsonl.store").read_bytes(), (stored / "o.jsonl").read_bytes()
    told = 0
    for n in range(30):
        data = bytearray(whole)
        damage(data, draw)
        folder = tmp_path / str(n)
        folder.mkdir()
        for name in ("d.jsonl", "o.jsonl", "o.jsonl.run.json"):
            shutil.copy(stored / name, folder / name)
        (folder / "o.jsonl.store").write_bytes(data)
        try:
            in_process("label", folder / "d.jsonl", "-o", folder / "o.jsonl", *MOCK)
        except RlaifError as error:
            told += 1
            one_line(error, "o.jsonl")
            found = labels(folder / "o.jsonl")
            assert (folder / "o.jsonl").read_bytes() == before or found.items() <= right.items()
        else:
            assert labels(folder / "o.jsonl") == right, n
    print(f"{damage.__name__}: {told} of 30 told, the others harmless")
    assert told > 5


def test_the_log_of_a_killed_run_cut_short_gives_what_was_written(stored: Path, tmp_path: Path) -> None:
    """What SQLite had not yet moved from its log into the store, cut anywhere."""
    right = labels(stored / "right.jsonl")
    path = shutil.copy(stored / "d.jsonl", tmp_path / "d.jsonl")
    slowly = ("-E", "latency=0.05", "--concurrency", "4")
    process = start(tmp_path / "said", "label", path, "-o", tmp_path / "o.jsonl", *MOCK, *slowly)
    log = tmp_path / "o.jsonl.store-wal"
    while process.is_alive() and not (log.exists() and log.stat().st_size > 60_000):
        time.sleep(0.01)
    process.kill()
    process.join()
    draw, whole = random.Random(5), log.read_bytes()
    assert whole
    for n in range(10):
        folder = tmp_path / str(n)
        folder.mkdir()
        for name in ("d.jsonl", "o.jsonl.store"):
            shutil.copy(tmp_path / name, folder / name)
        (folder / log.name).write_bytes(whole[: draw.randrange(len(whole))])
        in_process("label", folder / "d.jsonl", "-o", folder / "o.jsonl", *MOCK, "-E", "latency=0", "--relabel")
        assert labels(folder / "o.jsonl") == right


# ------------------------------------------------------------ wrong clocks


JUMPS = """
import random, time
draw, real = random.Random(1), time.time
time.time = lambda: real() + draw.choice([-1e6, -86400, -1, 0, 1, 86400, 1e6])  # by up to eleven days, at each look
"""


def test_a_clock_that_jumps_by_days_changes_nothing(server: Server, tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(60)), tmp_path / "o.jsonl"
    met: set[str] = set()

    async def busy(body: dict[str, Any]) -> web.StreamResponse | None:
        name = json.dumps(body["messages"])
        if name in met or len(met) >= 20:
            return None
        met.add(name)
        return error(429, "slow down", headers={"Retry-After": "0.2"})

    server.fault = busy
    assert finished(tmp_path / "said", *http(server, path, out), setup=JUMPS) == 0, (tmp_path / "said").read_text()
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert 0 <= report["this_run"]["wall_seconds"] < 30
    assert report["complete"]
    whole = tmp_path / "whole.jsonl"
    server.fault = None
    in_process(*http(server, path, whole))
    assert labels(out) == labels(whole)


@pytest.mark.parametrize("days", [-3, 3])
def test_a_date_to_try_again_after_is_counted_by_the_servers_own_clock(server: Server, tmp_path: Path, days: int) -> None:
    """This machine's clock is days off: a date from the server is near to what the server says that it is now."""
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(4)), tmp_path / "o.jsonl"
    met: dict[str, list[float]] = {}

    async def busy(body: dict[str, Any]) -> web.StreamResponse | None:
        seen = met.setdefault(json.dumps(body["messages"]), [])
        seen.append(time.monotonic())
        if len(seen) > 1:
            return None
        now = time.time()
        date, later = formatdate(now, usegmt=True), formatdate(now + 2, usegmt=True)
        return error(503, "busy", headers={"Retry-After": later, "Date": date})

    server.fault = busy
    setup = f"import time; real = time.time; time.time = lambda: real() + {days * 86400}"
    code = finished(tmp_path / "said", *http(server, path, out), setup=setup, timeout=15)
    assert code == 0, (tmp_path / "said").read_text()
    assert all(truth(read_jsonl(out)))
    assert all(1 <= later - first < 8 for first, later in met.values())
