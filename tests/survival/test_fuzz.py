"""Any bytes in place of what is read: a clear error or what was written, never a crash and never an invented label."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlaif import data
from rlaif.constitution import load_constitution
from rlaif.label.exemplars import load_exemplars
from rlaif.label.pairwise import choice_probability, parse_verdict
from rlaif.label.rating import expectation
from rlaif.labeler import load_labeler
from rlaif.pipeline import recipe
from rlaif.prompts import Template, load_template
from rlaif.records import Completion, UsageError
from rlaif.revise import Critiqued, bare, load_critiques, parse_clair
from tests.survival.told import one_line

FEW = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
MANY = settings(deadline=None, max_examples=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ------------------------------------------------------------ verdicts

VERDICTS = [
    *("1", "2", "3", "12", "10", "-1", "1.", "1/2", "١", "²", "Response ", "response_1", "<response_2>", "Answer: "),
    *("I prefer ", " is ", " not ", "'t", "or ", "and ", "both ", "neither", "tie", "first", "better", "worse"),
    *("**", "\n", " ", "."),
]
SAID = st.lists(st.sampled_from(VERDICTS), max_size=8).map("".join)


@MANY
@given(text=SAID | st.text(max_size=40), choices=st.sampled_from([("1", "2"), ("A", "B"), ("first", "second"), ("(", ")")]))
@example("not 1", ("1", "2"))
@example("1 is worse", ("1", "2"))
@example("²", ("1", "2"))
@example("\x00", ("1", "2"))
def test_a_verdict_names_its_choice_and_no_other(text: str, choices: tuple[str, str]) -> None:
    value = parse_verdict(text, choices)
    assert value in (None, 0.0, 0.5, 1.0)
    if value not in (0.0, 1.0):
        return
    own, other = choices if value == 1.0 else choices[::-1]
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    named = [line for line in (lines[0], lines[-1]) if own.lower() in line.lower()]
    assert named
    assert any(other.lower() not in line.lower() for line in named)
    assert not any(re.search(r"\b(not|worse|neither|both|or|and)\b|'t\b", line) for line in named if len(lines) == 1)
    assert not any(re.search(r"\d\d|-\d|\d/", line) for line in named if len(lines) == 1)


@MANY
@given(st.text(st.characters(exclude_characters="12"), max_size=60))
def test_a_text_without_a_choice_is_a_tie_said_plainly_or_nothing(text: str) -> None:
    value = parse_verdict(text, ("1", "2"))
    assert value is None or (value == 0.5 and re.search("tie|equal|neither", text, re.IGNORECASE))


NUMBERS = st.floats() | st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -9999.0, 1e308])
MARKS = tuple(str(n) for n in range(1, 11))


@MANY
@given(st.dictionaries(st.sampled_from(("1", "2")), NUMBERS), st.none() | NUMBERS)
@example({"1": float("nan"), "2": -1.0}, -3.0)
@example({"1": float("-inf"), "2": float("-inf")}, None)
@example({"1": float("inf"), "2": float("inf")}, None)
def test_numbers_that_are_none_give_no_label(found: dict[str, float], floor: float | None) -> None:
    value = choice_probability(Completion("", found, floor), ("1", "2"))
    assert value is None or 0 <= value <= 1
    if any(map(math.isnan, found.values())):
        assert value is None


@MANY
@given(st.dictionaries(st.sampled_from(MARKS), NUMBERS), st.none() | NUMBERS)
@example({"1": float("nan")}, -3.0)
@example(dict.fromkeys(MARKS, float("inf")), None)
def test_numbers_that_are_none_give_no_rating(found: dict[str, float], floor: float | None) -> None:
    value = expectation(Completion("", found, floor), MARKS)
    assert value is None or -1 - 1e-9 <= value <= 1 + 1e-9


# ------------------------------------------------------------ sections

SECTIONS = st.lists(
    st.sampled_from(["{teacher_reasoning}", "{corrected_student_solution}", ":", "**", "\n", "\n\n", "Yes.", "{"])
    | st.text(max_size=4),
    max_size=10,
).map("".join)


@MANY
@given(SECTIONS | st.text(max_size=80))
def test_sections_are_parts_of_the_text_in_its_order_or_there_are_none(text: str) -> None:
    found = parse_clair(text)
    if found:
        reasoning, answer = found
        assert reasoning.strip()
        assert answer.strip()
        assert text.index("{teacher_reasoning}") < text.rindex("{corrected_student_solution}")
        assert text.index(reasoning) < text.rindex(answer)


@MANY
@given(
    st.text(max_size=80)
    | st.lists(st.sampled_from(["<response>", "</response>", "Revision:", "x", "\n"]), max_size=6).map("".join)
)
def test_a_bare_revision_is_a_part_of_the_text(text: str) -> None:
    assert bare(text) in text


# ------------------------------------------------------------ files of rows

ROWS = [{"prompt": f"Q{n}?", "response_a": "One.", "response_b": "Two, größer.", "n": n, "x": [1.5, None]} for n in range(20)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def parquet(codec: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file, compression=codec)
    return file.getvalue()


WHOLE = {".jsonl": [LINES], ".jsonl.gz": [gzip.compress(LINES)], ".parquet": [parquet("snappy"), parquet("none")]}


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with some of them cut off, left out, put in or changed."""
    found = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        end = min(len(found), start + draw(st.integers(0, 12)))
        found[start:end] = draw(st.binary(max_size=12))
    return bytes(found[: draw(st.integers(0, len(found)))] if draw(st.booleans()) else found)


@pytest.mark.parametrize("ending", WHOLE)
def test_a_damaged_file_gives_rows_or_one_line(place: Path, ending: str) -> None:
    path = place / f"d{ending}"

    @settings(FEW, max_examples=100)
    @given(st.data())
    def check(drawn: st.DataObject) -> None:
        path.write_bytes(drawn.draw(st.binary(max_size=200) | st.sampled_from(WHOLE[ending]).flatmap(damaged)))
        try:
            for _, row in data.read_rows(str(path)):
                assert isinstance(row, dict)
        except UsageError as error:
            one_line(error, path.name)

    check()


def test_a_parquet_file_whose_text_is_no_utf_8_is_named(place: Path) -> None:
    path = place / "bytes.parquet"
    path.write_bytes(parquet("none").replace("größer".encode(), b"gr\x00\xb6\xc3\x9fer"))
    with pytest.raises(UsageError, match=r"bytes\.parquet after row 0: cannot be read as parquet"):
        list(data.read_rows(str(path)))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3),
    max_leaves=5,
)
COLUMNS = ("prompt", "response", "responses", "response_a", "response_b", "chosen", "rejected", "id", "samples", "human_label")


@settings(FEW, max_examples=150)
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), ANY), min_size=1, max_size=2))
def test_any_values_in_the_columns_are_judged_or_named(place: Path, rows: list[dict[str, Any]]) -> None:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for read in (data.comparisons, data.prompts, data.responses, data.response_lists):
        try:
            for item in read(str(path)):
                assert item.problem is None or "\n" not in item.problem
                if item.problem is None:
                    assert item.prompt.strip()
        except UsageError as error:
            one_line(error, "rows.jsonl")


# ------------------------------------------------------------ files of YAML


def training(path: str) -> object:
    from rlaif.train.kinds import load_config

    return load_config("dpo", Path(path))


FILES: dict[str, tuple[Callable[[str], object], Any]] = {
    "labeler": (
        load_labeler,
        {"engine": "mock", "options": {"k": 2}, "price": [1, 2], "cot": "off", "attributes": {"a": 1}, "principles": "one"},
    ),
    "constitution": (
        load_constitution,
        {"principles": [{"name": "a", "critique": "C.", "revision": "R.", "preference": "P?", "weight": 2}]},
    ),
    "exemplars": (
        load_exemplars,
        {"exemplars": [{"prompt": "P", "better": "B", "worse": "W", "rationale": "{better} {worse}"}]},
    ),
    "critiques": (
        load_critiques,
        {"exemplars": [dict.fromkeys(Critiqued.model_fields, "x")]},
    ),
    "pipeline": (
        lambda path: recipe.read(Path(path), Path(path).parent / "run"),
        {"settings": {"n": 3}, "sizes": {"s": {"n": 2}}, "steps": {"a": "label rows.jsonl -o o.jsonl --limit ${n}"}},
    ),
    "training": (training, {"model": "tiny", "data": "rows.jsonl", "out": "run", "max_steps": 3, "learning_rate": 1e-4}),
}


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """The content with anything in place of a part of it, under another name, or beside it."""
    if isinstance(content, dict) and content and draw(st.integers(0, 3)):
        name = draw(st.sampled_from(sorted(content)))
        return {**content, name: draw(changed(content[name]))}
    if isinstance(content, list) and content and draw(st.integers(0, 3)):
        return [draw(changed(content[0])), *content[1:]]
    if isinstance(content, dict) and draw(st.booleans()):
        return {**content, draw(st.text(max_size=4) | st.integers() | st.none()): draw(ANY)}
    return draw(ANY | st.sampled_from(["${n}", "${", "${x}", "-o", "--help", "a b 'c", "\0", "../x", "~", "1e999", "{{ x }}"]))


@pytest.mark.parametrize("kind", FILES)
def test_any_yaml_is_read_or_refused_in_one_line(place: Path, kind: str) -> None:
    load, good = FILES[kind]
    (place / "rows.jsonl").write_bytes(LINES)
    path = place / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(good), encoding="utf-8")
    load(str(path))  # as it is, it is right
    marks = [*"[]{}:,-?|>&*!%@`'\"#~\n\t \0x\ud7ff\x85", "a: ", "- ", "<<: ", "---\n"]
    syntax = st.lists(st.sampled_from(marks), max_size=15)

    @settings(FEW, max_examples=120)
    @given(changed(good).map(yaml.safe_dump) | syntax.map("".join) | st.text(max_size=30), st.binary(max_size=3))
    def check(text: str, more: bytes) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass") + (more if len(more) == 3 else b""))
        try:
            load(str(path))
        except UsageError as error:
            one_line(error, path.name)

    check()


# ------------------------------------------------------------ templates

CODE = [
    *("{{", "}}", "{%", "%}", "{#", "#}", " prompt ", " row.x ", " block preamble ", " endblock ", " for x in row "),
    *(" endfor ", " extends 'pairwise/_layout.jinja' ", " include 'x' ", "1 / 0", "|", "join", "'", "(", ")", ".x", "~"),
    *("\n", "<response_1>"),
]
JINJA = st.lists(st.sampled_from(CODE) | st.text(max_size=3), max_size=12).map("".join)
HEAD = st.sampled_from(["", "---\n", "---\nchoices: [A, B]\n---\n", "---\nasks_for: worse\n---\n", "---\r\n"])
LAYOUT = '{% extends "pairwise/_layout.jinja" %}{% block preamble %}'


@settings(FEW, max_examples=200)
@given(
    HEAD | changed({"choices": ["A", "B"], "asks_for": "worse", "stop": ["x"]}).map(lambda c: f"---\n{yaml.safe_dump(c)}---\n"),
    JINJA | JINJA.map(lambda code: LAYOUT + code + "{% endblock %}"),
    st.dictionaries(st.sampled_from(["x", "y"]), ANY),
)
def test_any_template_is_rendered_or_refused_in_one_line(place: Path, head: str, code: str, row: dict[str, Any]) -> None:
    path = place / "mine.jinja"
    path.write_bytes((head + code).encode("utf-8", "surrogatepass"))
    try:
        template: Template = load_template(str(path))
        messages, prefix = template.render(prompt="P?", response_1="one", response_2="two", row=row)
    except UsageError as error:
        one_line(error, "mine.jinja")
    else:
        assert len(template.choices) == 2
        assert messages
        assert all(isinstance(message["content"], str) for message in messages)
        assert isinstance(prefix, str)
