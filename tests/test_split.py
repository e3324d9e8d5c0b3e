"""`rlaif split`: every row is in one part, in order of a column or with its prompt's other rows, and as it was."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.provenance import labelers
from rlaif.records import Row, UsageError
from rlaif.split import at_random, by_column
from tests.conftest import in_process, make_rows, read_jsonl, write_jsonl


def pairs(*margins: float) -> list[Row]:
    return [{"id": n, "prompt": f"Q{n}?", "chosen": "c", "rejected": "r", "margin": m} for n, m in enumerate(margins)]


def placed(rows: list[Row]) -> list[tuple[str, Row]]:
    return [(f"row {n}", row) for n, row in enumerate(rows)]


def parts_of(folder: Path, count: int, ending: str = ".jsonl") -> list[list[dict[str, Any]]]:
    return [read_jsonl(folder / f"o.{n}{ending}") for n in range(1, count + 1)]


def test_the_greatest_come_first_and_rows_stay_as_they_are(tmp_path: Path) -> None:
    rows = pairs(0.1, 0.9, 0.5, 0.9, 0.3)
    path, out = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "o.jsonl"
    said = in_process("split", path, "-o", out, "--parts", "2", "--by", "margin").splitlines()
    assert said == [
        f"{tmp_path / 'o.1.jsonl'}: 2 of 5 rows, margin 0.9 to 0.9",
        f"{tmp_path / 'o.2.jsonl'}: 3 of 5 rows, margin 0.5 to 0.1",
    ]
    assert parts_of(tmp_path, 2) == [[rows[1], rows[3]], [rows[2], rows[4], rows[0]]]
    in_process("split", path, "-o", out, "--parts", "2", "--by", "margin", "--ascending", "--shares", "4,1")
    assert parts_of(tmp_path, 2) == [[rows[0], rows[4], rows[2], rows[1]], [rows[3]]]
    assert not out.exists()


def test_who_labelled_the_rows_is_known_of_each_part(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", make_rows(12))
    in_process("label", data, "-o", tmp_path / "l.jsonl", "--engine", "mock")
    in_process("pairs", tmp_path / "l.jsonl", "-o", tmp_path / "p.jsonl")
    in_process("split", tmp_path / "p.jsonl", "-o", tmp_path / "o.jsonl", "--parts", "3", "--by", "margin")
    settings = json.loads((tmp_path / "l.jsonl.run.json").read_text())["settings"]
    for n in (1, 2, 3):
        (found,) = labelers([str(tmp_path / f"o.{n}.jsonl")])
        assert (found["labels"], found["settings"]) == (str(tmp_path / "l.jsonl"), settings)
        run = json.loads((tmp_path / f"o.{n}.jsonl.run.json").read_text())
        assert (run["made_by"], run["rows"], run["examples"], run["part"]) == ("rlaif split", 12, 4, n)


def test_files_of_any_kind(tmp_path: Path) -> None:
    rows = pairs(*range(6))
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    in_process("split", path, "-o", tmp_path / "o.parquet", "--parts", "2")
    in_process("split", tmp_path / "o.2.parquet", "-o", tmp_path / "o.jsonl", "--parts", "3")
    in_process("split", tmp_path / "o.1.parquet", "-o", tmp_path / "q.jsonl", "--parts", "3")
    both = [row for name in "oq" for n in (1, 2, 3) for row in read_jsonl(tmp_path / f"{name}.{n}.jsonl")]
    assert sorted(both, key=lambda row: row["id"]) == rows


SHARES = st.lists(st.floats(0.1, 10), min_size=2, max_size=5)


@given(values=st.lists(st.integers(-3, 3), max_size=30), shares=SHARES, ascending=st.booleans())
def test_parts_are_the_sorted_rows_cut_where_the_shares_say(values: list[int], shares: list[float], ascending: bool) -> None:
    rows = [{"n": n, "margin": value} for n, value in enumerate(values)]
    try:
        parts = by_column(placed(rows), "margin", shares, ascending)
    except UsageError:
        assert any(share / sum(shares) * len(rows) < 1.01 for share in shares)  # one part rounds to nothing
        return
    assert [row for part in parts for row in part] == sorted(rows, key=lambda row: row["margin"] * (1 if ascending else -1))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share / sum(shares) * len(rows)) <= 1.01


@given(prompts=st.lists(st.integers(0, 9), max_size=40), shares=SHARES, seed=st.integers(0, 5))
def test_a_prompts_rows_stay_together(prompts: list[int], shares: list[float], seed: int) -> None:
    rows = [{"id": n, "prompt": f"Q{prompt}?"} for n, prompt in enumerate(prompts)]
    try:
        parts = at_random(placed(rows), shares, seed)
    except UsageError:
        return
    assert sorted((row for part in parts for row in part), key=lambda row: row["id"]) == rows
    places = {(row["prompt"], n) for n, part in enumerate(parts) for row in part}
    assert len(places) == len(set(prompts))
    most = max(Counter(prompts).values())
    for part, share in zip(parts, shares, strict=True):
        assert part == sorted(part, key=lambda row: row["id"])
        assert abs(len(part) - share / sum(shares) * len(rows)) <= most + 1
    assert at_random(placed(rows), shares, seed) == parts


def test_the_seed_draws_and_the_order_of_rows_does_not() -> None:
    rows = [{"id": n, "prompt": f"Q{n}?"} for n in range(40)]
    first, again, other = (at_random(placed(rows), [1, 1], seed) for seed in (0, 0, 1))
    assert first == again != other
    turned = at_random(placed(rows[::-1]), [1, 1], 0)
    assert [sorted(row["id"] for row in part) for part in turned] == [[row["id"] for row in part] for part in first]
    assert 5 < sum(row["id"] < 20 for row in first[0]) < 15  # drawn, not cut


def test_whole_dialogues_and_messages_are_of_one_prompt_by_what_they_begin_with() -> None:
    turns = [[{"role": "user", "content": f"Q{n}?"}, {"role": "assistant", "content": a}] for n in range(8) for a in "xy"]
    dialogues = [f"\n\nHuman: Q{n}?\n\nAssistant: {answer}" for n in range(8) for answer in "xy"]
    for rows in ([{"messages": own} for own in turns], [{"chosen": text, "rejected": "z"} for text in dialogues]):
        parts = at_random(placed([{**row, "n": n // 2} for n, row in enumerate(rows)]), [1, 1])
        assert [len(part) for part in parts] == [8, 8]
        assert not {row["n"] for row in parts[0]} & {row["n"] for row in parts[1]}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--by", "gap"), "p.jsonl line 1: column 'gap': is not there; there are: id, prompt"),
        (("--by", "chosen"), "p.jsonl line 1: column 'chosen': expected a number, got 'c'"),
        (("--by", "margin"), "p.jsonl line 3: column 'margin': expected a number, got None"),
        (("--ascending",), "--ascending goes with --by"),
        (("--shares", "1,2,3"), "--shares 1,2,3: 2 numbers above 0"),
        (("--shares", "1,0"), "--shares 1,0: 2 numbers above 0"),
        (("--shares", "1,x"), "--shares: expected numbers"),
        (("--parts", "4"), "3 rows cannot be 4 such parts"),
    ],
)
def test_what_cannot_be_split_is_said_before_anything_is_written(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    rows = pairs(0.1, 0.2, 0.3)
    rows[2]["margin"] = None
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(UsageError, match=words):
        in_process("split", path, "-o", tmp_path / "o.jsonl", "--parts", "2", *args)
    assert list(tmp_path.iterdir()) == [path]


def test_one_prompt_is_never_torn_and_no_input_overwritten(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "o.2.jsonl", [{"prompt": "Q?", "n": n} for n in range(9)])
    with pytest.raises(UsageError, match="1 prompts cannot be 2 such parts"):
        in_process("split", path, "-o", tmp_path / "p.jsonl", "--parts", "2")
    with pytest.raises(UsageError, match=r"o\.2\.jsonl: the output is the input"):
        in_process("split", path, "-o", tmp_path / "o.jsonl", "--parts", "2", "--by", "n")
