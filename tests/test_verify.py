"""`rlaif verify`: final answers are found and compared, failures have no score, and training sets are built from its file."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlaif.cli import app
from rlaif.records import RlaifError, RowError, UsageError
from rlaif.verify import by_answer, number
from tests.conftest import cli, in_process, read_jsonl, write_jsonl

ARITHMETIC = Path(__file__).parents[1] / "rlaif" / "samples" / "arithmetic.jsonl"


def verified(*args: str | Path) -> str:
    return in_process("verify", *args)


def judged(response: str, reference: Any, pattern: str | None = None) -> float:
    found = re.compile(pattern) if pattern else None
    return by_answer("answer", found)({"prompt": "p", "response": response, "answer": reference})


# ------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("Answer: 42", 42),
        ("so the answer is **42**.", "42"),
        ("**Answer:** $1,234.50", 1234.5),
        ("**Answer**: 1,234 apples", 1234.0),
        ("Answer: 3 + 4 = 7", "7"),
        ("It is 14.", "14"),
        ("A range of 12-3.", "3"),
        ("14 apples, in a box of 7 or 9, cost 28 euros.", "28"),
        (r"thus \boxed{\frac{3}{4}}", "0.75"),
        (r"$\boxed{1{,}000}$", "1000"),
        ("We add.\n#### 72", "5 + 67 = 72\n#### 72"),
        ("#### Solution\n5 and then 7", "7"),
        ("Answer: 1 1/2", "1.5"),
        ("Answer: −3", "-3"),
        ("Answer: 3e2", "300"),
        ("Answer: 50 %", "50"),
        ("Answer: 5\nNo, wait.\nAnswer: 6", "6"),
        ("The answer is 12. It took 5 + 5 = 10 seconds.", "12"),
        ("Answer: approx. 12", "12"),
        ("Answer:\n42", "42"),
        ("The answer is paris!", "Paris"),
        ("Answer: **St.  Louis**", "St. Louis"),
        ("Answer: (B)", "b"),
        ("Answer: 12:30.", "12:30"),
        (r"\boxed{\text{Yes}}", "yes"),
    ],
)
def test_a_right_answer_is_1(response: str, reference: Any) -> None:
    assert judged(response, reference) == 1.0


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("Answer: 41", 42),
        ("I do not know.", 42),
        ("42. Answer: none", "42"),  # the mark counts, not the number before it
        ("Answer: 42\nAnswer:", "42"),
        ("Answer: 5\nNo, wait.\nAnswer: 6", "5"),
        ("Answer: 420", "42"),
        ("Answer: -5", "5"),
        ("Answer: 12.5", "12"),
        ("Answer: 1 1/2", "1"),
        ("Answer: 3/0", "3"),
        ("Answer: 3/4/2020", "3/4"),
        ("Answer: 12:30", "12"),
        ("Answer: 1,2,3", "1"),
        ("Answer: 1,23", "23"),
        ("Answer: A4", "4"),
        ("Answer: " + "9" * 5000, "9"),
        ("Paris", "Paris"),  # a text must be marked as the answer
        ("Answer: Parisian", "Paris"),
    ],
)
def test_any_other_answer_is_0_and_so_is_none(response: str, reference: Any) -> None:
    assert judged(response, reference) == 0.0


def test_a_pattern_says_where_the_answer_stands() -> None:
    assert judged("x=5; y=6; Answer: 6", "5", r"x=(\d+)") == 1.0
    assert judged("x=5, x=7", "7", r"x=(\d+)") == 1.0
    assert judged("the result: 9", "9", r"result: .*") == 1.0
    assert judged("Answer: 9", "9", r"result: .*") == 0.0  # none is found, and no number is searched for
    assert judged("<a>Yes</a>", "yes", r"<a>(.*)</a>") == 1.0


@pytest.mark.parametrize("reference", [None, "", "  ", "**", True, [1], {"x": 1}])
def test_without_a_reference_there_is_no_score(reference: Any) -> None:
    with pytest.raises(RowError, match="column 'answer'"):
        judged("Answer: 1", reference)


WRITTEN = ("{}", "{:,}", "${:,}", "{}.0", "{}.", "**{}**", "{} %", "\\boxed{{{}}}", "= {:,} apples")


@given(n=st.integers(-(10**12), 10**12), m=st.integers(-(10**12), 10**12), form=st.sampled_from(WRITTEN))
def test_a_whole_number_is_right_however_it_is_written_and_no_other_one_is(n: int, m: int, form: str) -> None:
    said = f"We count 3, then 5.\nAnswer: {form.format(n)}"
    assert judged(said, n) == judged(said, f"{n:,}") == 1.0
    assert judged(said, m) == float(n == m)


@given(a=st.integers(-99, 99), b=st.integers(1, 99))
def test_a_fraction_is_its_value(a: int, b: int) -> None:
    assert number(f"{a}/{b}") == Fraction(a, b)
    assert judged(f"Answer: {2 * a}/{2 * b}", f"{a}/{b}") == 1.0


@given(st.text(max_size=60), st.text(max_size=20) | st.integers() | st.floats() | st.none())
def test_no_text_breaks_it(response: str, reference: Any) -> None:
    with suppress(RowError):
        assert judged(response, reference) in (0.0, 1.0)


# ------------------------------------------------------------ files


def samples() -> list[dict[str, Any]]:
    """As `rlaif sample` writes them: right and wrong responses, without an answer, a failed one, one without a reference."""
    row = {"samples": [], "status": "ok", "error": None}
    return [
        {"id": "x", "prompt": "1 + 1?", "sum": 2, "responses": ["Answer: 2", "Answer: 3", "Well."], **row},
        {"id": "y", "prompt": "2 + 2?", "sum": 4, "responses": None, **row, "status": "refused", "error": "no"},
        {"id": "z", "prompt": "3 + 3?", "sum": None, "responses": ["Answer: 6"], **row},
    ]


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "s.jsonl", samples())


def test_rows_are_those_of_rlaif_score(sampled: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.jsonl"
    said = verified(sampled, "-o", out, "--answer", "sum")
    assert said.startswith(f"{out}: 5 responses; mean score 0.333, of 3; 2 without a score, the first: {sampled} line 2: ")
    rows = read_jsonl(out)
    assert [(row["id"], row["status"], row["score"]) for row in rows] == [
        ("x/0", "ok", 1.0),
        ("x/1", "ok", 0.0),
        ("x/2", "ok", 0.0),
        ("y/0", "error", None),
        ("z/0", "error", None),
    ]
    assert rows[4]["error"] == "column 'sum': no reference answer"
    assert rows[0]["scores"] == {"verifier": 1.0}
    assert rows[3]["scores"] is None
    write_jsonl(tmp_path / "one.jsonl", samples()[:1])
    assert cli("score", tmp_path / "one.jsonl", "-o", tmp_path / "rated.jsonl", "--engine", "mock").returncode == 0
    assert {tuple(row) for row in rows} == {tuple(row) for row in read_jsonl(tmp_path / "rated.jsonl")}
    run = json.loads((tmp_path / "v.jsonl.run.json").read_text())
    assert (run["made_by"], run["rows"], run["statuses"]) == ("rlaif verify", 5, {"ok": 3, "error": 2})
    assert run["settings"]["answer"] == "sum"
    assert [source["source"] for source in run["sources"]] == [str(sampled)]


@pytest.mark.parametrize(
    ("kind", "count"), [(("rest", "--thresholds", "1"), 1), (("best-of-n",), 1), (("kto", "--threshold", "1"), 3)]
)
def test_training_sets_are_built_from_it(sampled: Path, tmp_path: Path, kind: tuple[str, ...], count: int) -> None:
    verified(sampled, "-o", tmp_path / "v.jsonl", "--answer", "sum")
    out = tmp_path / "t.jsonl"
    done = CliRunner().invoke(app, ["build", kind[0], str(tmp_path / "v.jsonl"), "-o", str(out), *kind[1:]])
    assert done.exit_code == 0, done.output
    made = read_jsonl(tmp_path / "t.1.jsonl" if kind[0] == "rest" else out)
    assert len(made) == count
    right = [row["completion"] for row in made if row.get("label", True)]
    assert right == ["Answer: 2"]


def test_a_function_judges_and_what_it_fails_on_has_no_score(sampled: Path, tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "def judge(prompt, response, row):\n"
        "    row['prompt'] = 'changed'\n"
        "    if row['id'] == 'z/0':\n        return 0.25\n"
        "    return {'Answer: 2': True, 'Answer: 3': False}[response]\n"
        "def nan(prompt, response, row):\n    return float('nan')\n"
        "def text(prompt, response, row):\n    return 'yes'\n"
    )
    out = tmp_path / "v.jsonl"
    verified(sampled, "-o", out, "--function", f"{code}:judge")
    rows = read_jsonl(out)
    assert [(row["status"], row["score"]) for row in rows] == [
        ("ok", 1.0),
        ("ok", 0.0),
        ("error", None),
        ("error", None),
        ("ok", 0.25),
    ]
    assert rows[2]["error"] == "the function failed: KeyError: 'Well.'"
    assert rows[0]["prompt"] == "1 + 1?"
    assert len(json.loads((tmp_path / "v.jsonl.run.json").read_text())["settings"]["function_sha256"]) == 64
    for name, words in (("nan", "not finite"), ("text", "a str, which is no number")):
        with pytest.raises(RlaifError, match=f"no response could be verified; .*{words}"):
            verified(sampled, "-o", tmp_path / "none.jsonl", "--function", f"{code}:{name}")
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "either --answer COLUMN or --function"),
        (("--answer", "sum", "--function", "x.py:f"), "either --answer COLUMN or --function"),
        (("--answer", "total"), "line 1: no column 'total'; there are: id, prompt, sum, response"),
        (("--answer", "sum", "--pattern", "("), "--pattern: '\\(' is no regular expression"),
        (("--function", "none.py:f"), "no such file: none.py"),
    ],
)
def test_what_cannot_be_is_said(sampled: Path, tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        verified(sampled, "-o", tmp_path / "v.jsonl", *args)
    assert [path.name for path in tmp_path.iterdir()] == ["s.jsonl"]


def test_the_input_is_never_overwritten(sampled: Path) -> None:
    with pytest.raises(UsageError, match="the output is the input"):
        verified(sampled, "-o", sampled, "--answer", "sum")
    assert read_jsonl(sampled) == samples()


# ------------------------------------------------------------ the shipped problems


def test_the_shipped_problems_are_whole_and_verified_by_their_answers(tmp_path: Path) -> None:
    rows = read_jsonl(ARITHMETIC)
    assert 55 <= len(rows) <= 65
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    assert all(tuple(row) == ("id", "prompt", "answer") and row["prompt"].endswith("`Answer: NUMBER`.") for row in rows)
    assert all(number(row["answer"]) is not None for row in rows)
    assert len({row["answer"] for row in rows}) > 45
    said = [[f"Let me see.\nAnswer: {row['answer']}", f"Answer: {float(row['answer']) + 1}"] for row in rows]
    path = write_jsonl(tmp_path / "s.jsonl", [{**row, "responses": two} for row, two in zip(rows, said, strict=True)])
    verified(path, "-o", tmp_path / "v.jsonl", "--answer", "answer")
    assert [row["score"] for row in read_jsonl(tmp_path / "v.jsonl")] == [1.0, 0.0] * len(rows)
