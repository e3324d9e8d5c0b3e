"""Rows in and out: every kind of source, what is refused before anything is spent, and writes that are whole or nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.data import (
    RESERVED,
    Item,
    as_messages,
    as_text,
    atomic,
    check,
    check_output,
    comparisons,
    parquet_schema,
    read_rows,
    write_rows,
)
from rlaif.records import Row, UsageError
from tests.conftest import SHARED, cli, make_rows, shared_rows, write_jsonl

PLAIN = {"prompt": "Which way?", "response_a": "Left.", "response_b": "Right."}


def rows_of(path: Path, split: str | None = None) -> list[Row]:
    return [row for _, row in read_rows(str(path), split)]


def taken(tmp_path: Path, rows: list[Row], name: str = "d.jsonl", **knobs: Any) -> list[Item]:
    return list(comparisons(str(write_jsonl(tmp_path / name, rows)), **knobs))


def dialogue(*turns: str) -> str:
    """An hh-rlhf dialogue: turns of the human and the assistant in alternation."""
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {turn}" for n, turn in enumerate(turns))


def hh_rows(count: int) -> list[Row]:
    return [
        {"chosen": dialogue(f"Question {n}?", f"Good {n}"), "rejected": dialogue(f"Question {n}?", f"Bad {n}")}
        for n in range(count)
    ]


# ------------------------------------------------------------ reading


def test_every_file_type_gives_the_same_rows_with_their_places(tmp_path: Path) -> None:
    rows = make_rows(2500)  # more than one batch of parquet
    write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "d.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.jsonl", "d.jsonl.gz", "d.parquet"):
        assert rows_of(tmp_path / name) == rows
    place = "{} {} 2500"
    for name, kind in (("d.jsonl", "line"), ("d.jsonl.gz", "line"), ("d.parquet", "row")):
        assert list(read_rows(str(tmp_path / name)))[-1][0] == place.format(tmp_path / name, kind)


def test_blank_lines_are_passed_over_and_still_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n   \n{"a": 2}')
    assert list(read_rows(str(path))) == [(f"{path} line 2", {"a": 1}), (f"{path} line 4", {"a": 2})]


def test_a_saved_dataset_is_read_and_its_splits_are_chosen_among(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = make_rows(5)
    single = datasets.Dataset.from_list(rows)
    single.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": single, "test": datasets.Dataset.from_list(rows[:2])}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"test": single}).save_to_disk(tmp_path / "only")
    assert rows_of(tmp_path / "single") == rows
    assert rows_of(tmp_path / "both", "test") == rows[:2]
    assert rows_of(tmp_path / "only") == rows  # one split alone needs no choice
    with pytest.raises(UsageError, match="has the splits train, test: choose one with --split"):
        rows_of(tmp_path / "both")
    with pytest.raises(UsageError, match="has no split 'dev': it has train, test"):
        rows_of(tmp_path / "both", "dev")
    with pytest.raises(UsageError, match="has no splits"):  # else the run file would name a split that never was
        rows_of(tmp_path / "single", "test")


def test_a_split_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no splits"):
        rows_of(write_jsonl(tmp_path / "d.jsonl", make_rows(1)), "test")


def test_a_hub_name_without_a_hub_is_one_clear_line(tmp_path: Path) -> None:
    done = cli("label", "nobody/no-such-data", "-o", tmp_path / "o.jsonl", "--engine", "mock")
    assert done.returncode == 2
    assert done.stderr.startswith("rlaif: nobody/no-such-data is not a file, or a dataset that the hub gives: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a": \n', r"line 2: not JSON: "),
        ("d.jsonl", b'{"a": 1}\n[1, 2]\n', r"line 2: expected a JSON object with named columns, got a list"),
        ("d.jsonl", b"3\n", r"line 1: expected a JSON object .* got a number"),
        ("d.jsonl", b"null\n", r"got null"),
        ("d.jsonl", b'{"a": "\xff"}\n', r"line 1: not JSON: "),
        ("d.jsonl", b'{"a": ' + b"[" * 200_000 + b"\n", r"line 1: not JSON: "),
        ("d.jsonl.gz", b"plain text", r"after line 0: cannot be read: Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-12], r"cannot be read: "),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:10] + b"\xff" * 40, r"after line 0: cannot be read: "),
        ("d.parquet", b"PAR1 but no more", r"cannot be read as parquet: "),
        ("d.csv", b"a,b\n", r"d\.csv: unknown file type; known: \.jsonl, \.jsonl\.gz, \.parquet"),
    ],
    ids=range(11),
)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        rows_of(path)
    assert str(path) in str(caught.value)


def test_rows_before_a_broken_line_are_given(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\noops\n')
    reading = read_rows(str(path))
    assert [next(reading)[1]["a"], next(reading)[1]["a"]] == [1, 2]
    with pytest.raises(UsageError):
        next(reading)


def test_a_folder_that_is_no_dataset_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a saved dataset"):
        rows_of(tmp_path)
    with pytest.raises(UsageError, match=r"no such file: .*gone\.jsonl"):
        rows_of(tmp_path / "gone.jsonl")


# ------------------------------------------------------------ columns


def test_columns_are_renamed_and_the_others_carried(tmp_path: Path) -> None:
    row = {"question": "Q?", "left": "L", "right": "R", "source": "s", "id": 7}
    mapping = {"prompt": "question", "response_a": "left", "response_b": "right"}
    (item,) = taken(tmp_path, [row], mapping=mapping)
    assert item.row == {"id": 7, "prompt": "Q?", "response_a": "L", "response_b": "R", "source": "s"}
    assert (item.prompt, item.problem) == ("Q?", None)


def test_two_columns_can_change_places(tmp_path: Path) -> None:
    (item,) = taken(tmp_path, [PLAIN], mapping={"response_a": "response_b", "response_b": "response_a"})
    assert (item.row["response_a"], item.row["response_b"]) == ("Right.", "Left.")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"prompt": "query"}, r"line 1: --map prompt=query: no column 'query'; there are: prompt, response_a, response_b"),
        ({"prompt": "response_b"}, r"line 1: --map prompt=response_b: column 'prompt' is there already and would be lost"),
        ({"x": "prompt", "y": "prompt"}, r"--map x=prompt: column 'prompt' is renamed twice"),
    ],
)
def test_a_rename_that_would_lose_a_column_is_refused(tmp_path: Path, mapping: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        taken(tmp_path, [PLAIN], mapping=mapping)


def test_the_id_is_carried_or_made_from_the_position(tmp_path: Path) -> None:
    rows = [PLAIN, {**PLAIN, "id": "mine"}, {**PLAIN, "id": None}, {**PLAIN, "id": 0}]
    items = taken(tmp_path, rows)
    assert [item.row["id"] for item in items] == ["0", "mine", "2", 0]
    assert next(iter(items[1].row)) == "id"


@pytest.mark.parametrize("name", RESERVED)
def test_a_column_that_the_output_adds_is_refused_and_can_be_renamed(tmp_path: Path, name: str) -> None:
    row = {**PLAIN, name: "kept"}
    with pytest.raises(UsageError, match=rf"line 1: column '{name}' is one that the output adds; .*--map my_{name}={name}"):
        taken(tmp_path, [row])
    (item,) = taken(tmp_path, [row], mapping={f"my_{name}": name})
    assert item.row[f"my_{name}"] == "kept"


@pytest.mark.parametrize("name", ["prompt", "response_a", "response_b"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, name: str) -> None:
    row = {column: value for column, value in PLAIN.items() if column != name}
    with pytest.raises(UsageError, match=rf"line 2: no column '{name}'; there are: .*rename with --map {name}=COLUMN"):
        taken(tmp_path, [PLAIN, row])


def test_the_limit_stops_before_later_rows_are_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [PLAIN, PLAIN])
    with path.open("a") as file:
        file.write("not JSON\n")
    assert len(list(comparisons(str(path), limit=2))) == 2
    with pytest.raises(UsageError):
        list(comparisons(str(path), limit=3))


# ------------------------------------------------------------ problems


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"prompt": None}, "column 'prompt': expected text or messages, got null"),
        ({"prompt": 3}, "column 'prompt': expected text or messages, got a number"),
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": " \n\t"}, "column 'prompt' is empty"),
        ({"prompt": []}, "column 'prompt' is empty"),
        ({"prompt": ["text"]}, "column 'prompt': expected text or messages, got a list"),
        ({"prompt": [{"role": "user"}]}, "column 'prompt': expected text or messages, got a list"),
        ({"prompt": [{"role": "user", "content": None}]}, "column 'prompt': expected text or messages, got a list"),
        ({"prompt": {"role": "user", "content": "x"}}, "column 'prompt': expected text or messages, got an object"),
        ({"response_a": None}, "column 'response_a': expected text, got null"),
        ({"response_a": 1.5}, "column 'response_a': expected text, got a number"),
        ({"response_a": True}, "column 'response_a': expected text, got true or false"),
        ({"response_b": ["x"]}, "column 'response_b': expected text, got a list"),
        ({"response_b": {"x": 1}}, "column 'response_b': expected text, got an object"),
        ({"response_b": ""}, "column 'response_b' is empty"),
        ({"response_b": "  \n"}, "column 'response_b' is empty"),
        (
            {"response_a": "Same.", "response_b": "Same."},
            "columns 'response_a' and 'response_b' are identical: there is nothing to compare",
        ),
        ({"response_a": "Same.", "response_b": "Same. "}, None),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, None),
    ],
)
def test_a_row_that_cannot_be_judged_says_why(tmp_path: Path, changes: Row, problem: str | None) -> None:
    path = tmp_path / "d.jsonl"
    items = taken(tmp_path, [PLAIN, {**PLAIN, **changes}])
    assert [item.problem for item in items] == [None, problem]
    assert check(items, str(path)) == (2, [f"{path} line 2: {problem}"] if problem else [])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": None, "rejected": "x"}, "column 'chosen': expected a dialogue ending with an assistant turn, got null"),
        ({"chosen": dialogue("Q", "A"), "rejected": "x"}, "column 'rejected': expected a dialogue ending .*, got text"),
        (
            {"prompt": "Q", "chosen": "A", "rejected": 5},
            "column 'rejected': expected text, or messages ending .*, got a number",
        ),
        ({"prompt": "Q", "chosen": [{"role": "user", "content": "A"}], "rejected": "B"}, "column 'chosen': .*, got a list"),
        ({"prompt": "Q", "chosen": [], "rejected": "B"}, "column 'chosen': .*, got a list"),
        ({"prompt": "Q", "chosen": "A", "rejected": " "}, "column 'rejected': the response is empty"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "columns 'chosen' and 'rejected' are identical"),
        ({"prompt": " ", "chosen": "A", "rejected": "B"}, "column 'prompt' is empty"),
        ({"chosen": dialogue("Q", "A"), "rejected": dialogue("Q", "")}, "column 'rejected': the response is empty"),
        (
            {"chosen": dialogue("Q", "A"), "rejected": dialogue("R", "A")},
            "columns 'chosen' and 'rejected' differ before the last assistant turn: they answer different prompts",
        ),
    ],
)
def test_a_preference_that_cannot_be_judged_names_the_columns_of_the_file(tmp_path: Path, row: Row, problem: str) -> None:
    (item,) = taken(tmp_path, [row])
    assert item.problem is not None
    assert re.match(problem, item.problem), item.problem


def test_no_rows_at_all_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"d\.jsonl: no rows"):
        check([], "d.jsonl")


# ------------------------------------------------------------ chosen and rejected


def test_dialogues_are_split_at_the_last_assistant_turn(tmp_path: Path) -> None:
    before = ("How?", "What do you\n\nmean?", "Really how?")
    row = {"chosen": dialogue(*before, "Like this.\n\nAnd that."), "rejected": dialogue(*before, "No.")}
    (item,) = taken(tmp_path, [row])
    assert item.problem is None
    assert item.prompt == dialogue(*before).strip()
    human, other = ("response_a", "response_b") if item.row["human_label"] == "a" else ("response_b", "response_a")
    assert item.row[human] == "Like this.\n\nAnd that."
    assert item.row[other] == "No."
    assert as_messages(item.prompt) == [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "What do you\n\nmean?"},
        {"role": "user", "content": "Really how?"},
    ]


def test_the_chosen_side_is_a_in_about_half_of_the_rows_and_the_human_label_tells_it(tmp_path: Path) -> None:
    items = taken(tmp_path, hh_rows(2000))
    for n, item in enumerate(items):
        assert item.row[f"response_{item.row['human_label']}"] == f"Good {n}"
        assert {item.row["response_a"], item.row["response_b"]} == {f"Good {n}", f"Bad {n}"}
    share = sum(item.row["human_label"] == "a" for item in items) / 2000
    assert abs(share - 0.5) < 4 * 0.5 / 2000**0.5


def test_the_side_depends_on_content_and_seed_but_not_on_the_place_in_the_file(tmp_path: Path) -> None:
    rows = hh_rows(200)
    shuffled = random.Random(1).sample(rows, 200)

    def sides(items: list[Item]) -> dict[str, str]:
        return {item.prompt: item.row["human_label"] for item in items}

    first = sides(taken(tmp_path, rows))
    assert sides(taken(tmp_path, shuffled, "e.jsonl")) == first
    assert sides(taken(tmp_path, shuffled[:50], "f.jsonl")).items() <= first.items()
    assert sides(taken(tmp_path, rows)) == first  # no hidden state between two readings
    other = sides(taken(tmp_path, rows, seed=1))
    assert 60 < sum(other[prompt] != first[prompt] for prompt in first) < 140


def test_a_prompt_with_two_answers_needs_no_dialogue(tmp_path: Path) -> None:
    (item,) = taken(tmp_path, [{"prompt": "Q?", "chosen": "Yes.\n\nAssistant: no split here", "rejected": "No."}])
    assert item.problem is None
    assert item.prompt == "Q?"
    assert item.row[f"response_{item.row['human_label']}"] == "Yes.\n\nAssistant: no split here"


def test_a_human_label_that_is_there_stays(tmp_path: Path) -> None:
    (item,) = taken(tmp_path, [{"prompt": "Q?", "chosen": "Yes.", "rejected": "No.", "human_label": "mine"}])
    assert item.row["human_label"] == "mine"


@pytest.mark.parametrize("with_prompt", [True, False])
def test_conversational_lists_give_their_last_turn(tmp_path: Path, with_prompt: bool) -> None:
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row: Row = {name: [*before, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    if with_prompt:
        row["prompt"] = "Hi"
    (item,) = taken(tmp_path, [row])
    assert item.problem is None
    assert item.row["prompt"] == ("Hi" if with_prompt else before)
    assert item.prompt == ("Hi" if with_prompt else "System: Be brief.\n\nHuman: Hi")
    assert item.row[f"response_{item.row['human_label']}"] == "chosen"


def test_conversational_lists_with_differing_prompts_are_a_problem(tmp_path: Path) -> None:
    row = {
        name: [{"role": "user", "content": f"for {name}"}, {"role": "assistant", "content": name}]
        for name in ("chosen", "rejected")
    }
    (item,) = taken(tmp_path, [row])
    assert item.problem is not None
    assert "differ before the last assistant turn" in item.problem


def test_real_dialogues_are_read_and_their_faults_found() -> None:
    rows = shared_rows("hh_harmless_half.jsonl.gz")
    items = list(comparisons(str(SHARED / "hh_harmless_half.jsonl.gz")))
    count, problems = check(items, "hh")
    assert count == len(rows) == 1181
    assert sum("differ before the last assistant turn" in problem for problem in problems) == 3
    assert sum("the response is empty" in problem for problem in problems) == 2
    assert len(problems) == 5
    for row, item in zip(rows, items, strict=True):
        if item.problem is None:
            chosen, rejected = ("a", "b") if item.row["human_label"] == "a" else ("b", "a")
            # Put together again, each side is the dialogue that it was (but for white space around the turns).
            for side, name in ((chosen, "chosen"), (rejected, "rejected")):
                whole = f"{item.prompt}\n\nAssistant: {item.row[f'response_{side}']}"
                assert "".join(whole.split()) == "".join(row[name].split())
            assert as_messages(item.prompt)[-1]["role"] == "user"
    share = sum(item.row["human_label"] == "a" for item in items) / count
    assert abs(share - 0.5) < 4 * 0.5 / count**0.5


# ------------------------------------------------------------ text and messages


def test_one_user_message_is_its_text_and_a_dialogue_its_turns() -> None:
    assert as_text("plain") == "plain"
    assert as_text([{"role": "user", "content": "Hi"}]) == "Hi"
    assert as_text([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]) == "System: S\n\nHuman: Hi"
    assert as_text([{"role": "tool", "content": "4"}, {"role": "user", "content": "Hi"}]) == "tool: 4\n\nHuman: Hi"
    assert [as_text(value) for value in (None, 3, {"role": "user"}, ["x"], [{"role": 1, "content": "x"}])] == [None] * 5
    assert as_messages("no Human: here") == [{"role": "user", "content": "no Human: here"}]
    assert as_messages([{"role": "user", "content": "Hi", "name": "dropped"}]) == [{"role": "user", "content": "Hi"}]


TURN = st.text(min_size=1).map(str.strip).filter(lambda t: t and not re.search(r"Human:|Assistant:", t))


@given(st.lists(TURN, min_size=2, max_size=7))
def test_messages_survive_the_way_through_text(turns: list[str]) -> None:
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    text = as_text(messages)
    assert text is not None
    assert as_messages(text) == messages


# ------------------------------------------------------------ writing

VOTE = {"order": "ab", "soft_label": 0.25, "logprobs": {"1": -1.5, "2": None}, "text": "1", "error": None}
LABELLED = [
    {
        "id": "0",
        "soft_label": 0.25,
        "label": "b",
        "votes": [VOTE, {**VOTE, "text": "naïve – 漢字 🙂 \u2028 \x85"}],
        "error": None,
    },
    {"id": "1", "soft_label": None, "label": None, "votes": [], "error": "Zeitüberschreitung"},
    {"id": "2", "soft_label": 1.0, "label": "a", "votes": [{**VOTE, "logprobs": None}], "error": None},
]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_labelled_rows_come_back_as_they_were_written(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"o{ending}"
    write_rows(out, lambda: LABELLED)
    assert rows_of(out) == LABELLED
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_lone_surrogates_are_kept_in_json_lines_and_replaced_in_parquet(tmp_path: Path) -> None:
    rows = [{"a": "x\ud800y", "b": [{"t": "\udfff"}], "c\udc80": 1, "d": {"e": "\ud83d"}}]
    for ending in (".jsonl", ".jsonl.gz"):
        write_rows(tmp_path / f"o{ending}", lambda: rows)
        assert rows_of(tmp_path / f"o{ending}") == rows
    write_rows(tmp_path / "o.parquet", lambda: rows)  # its UTF-8 has no place for them, and a paid-for row must not be lost
    assert rows_of(tmp_path / "o.parquet") == [{"a": "x\ufffdy", "b": [{"t": "\ufffd"}], "c\ufffd": 1, "d": {"e": "\ufffd"}}]


def test_text_that_is_not_ascii_is_written_as_it_is(tmp_path: Path) -> None:
    write_rows(tmp_path / "o.jsonl", lambda: [{"a": "漢字"}])
    assert (tmp_path / "o.jsonl").read_text(encoding="utf-8") == '{"a": "漢字"}\n'


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([1, "a"], "column 'mixed', rows 1 to 2"),
        ([True, 1], "column 'mixed', rows 1 to 2"),
        ([[1], ["a"]], "column 'mixed', rows 1 to 2"),
        ([{"x": 1}, {"x": "a"}], "column 'mixed', rows 1 to 2"),
        ([2**70], "column 'mixed', rows 1 to 1"),
        ([2**60 + 1, 0.5], "column 'mixed', rows 1 to 2"),
        ([1] * 1000 + ["a"], "column 'mixed', rows 1001 to 1001"),
        ([{}], "mixed"),
    ],
)
def test_a_column_that_no_parquet_type_holds_is_named_before_anything_is_written(
    tmp_path: Path, values: list[Any], named: str
) -> None:
    out = tmp_path / "o.parquet"
    rows = [{"fine": 1, "mixed": value} for value in values]
    with pytest.raises(UsageError, match=named):
        parquet_schema(rows)
    with pytest.raises(UsageError, match=named):
        write_rows(out, lambda: rows)
    assert not list(tmp_path.iterdir())


def test_what_fits_only_one_of_two_chunks_is_found_while_writing(tmp_path: Path) -> None:
    rows = [{"n": 2**60 + 1}] * 1000 + [{"n": 0.5}]  # together a double, which cannot hold the first thousand
    with pytest.raises(UsageError, match="column 'n', rows 1 to 1000"):
        write_rows(tmp_path / "o.parquet", lambda: rows)
    assert not list(tmp_path.iterdir())


def test_columns_that_only_some_rows_have_are_null_in_the_others(tmp_path: Path) -> None:
    rows = [{"a": None}] * 1000 + [{"a": "text"}, {"b": 1}, {"a": None, "b": 0.5}]
    write_rows(tmp_path / "o.parquet", lambda: rows)
    assert rows_of(tmp_path / "o.parquet") == [{"a": row.get("a"), "b": row.get("b")} for row in rows]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"o{ending}"
    write_rows(out, lambda: [{"a": 1}])
    before = out.read_bytes()
    calls = 0

    def rows() -> Iterator[Row]:
        nonlocal calls
        calls += 1
        yield from ({"a": n} for n in range(3000))
        # Parquet reads the rows twice: fail only when the file is being written.
        if not ending.endswith("parquet") or calls == 2:
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_rows(out, rows)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_appears_only_when_the_block_ends_and_with_the_usual_rights(tmp_path: Path) -> None:
    path, other = tmp_path / "o.jsonl", tmp_path / "other"
    with atomic(path) as temporary:
        temporary.write_text("x")
        assert not path.exists()
        assert temporary.parent == tmp_path  # a rename from another file system would not be atomic
    other.write_text("x")
    assert path.stat().st_mode == other.stat().st_mode
    assert path.read_text() == "x"


def test_an_output_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    for name, message in (
        ("o.csv", r"o\.csv: the output must end in \.jsonl"),
        ("o", r"must end in"),
        ("gone/o.jsonl", r"no such folder: .*gone"),
        ("folder.jsonl", r"folder\.jsonl: is a folder"),
    ):
        (tmp_path / "folder.jsonl").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=message):
            check_output(tmp_path / name)
    check_output(tmp_path / "o.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_closed_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written to"):
        check_output(tmp_path / "o.jsonl")


# A high surrogate before a low one is one character to JSON, so that such a pair would not come back as two.
ANY_TEXT = st.text(st.characters()).filter(lambda text: not re.search("[\ud800-\udbff][\udc00-\udfff]", text))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(rows=st.lists(st.dictionaries(ANY_TEXT, JSON, max_size=5), max_size=8), ending=st.sampled_from([".jsonl", ".jsonl.gz"]))
def test_any_rows_survive_json_lines(tmp_path_factory: pytest.TempPathFactory, rows: list[Row], ending: str) -> None:
    out = tmp_path_factory.mktemp("round") / f"o{ending}"
    write_rows(out, lambda: rows)
    assert rows_of(out) == rows
    raw = gzip.decompress(out.read_bytes()) if ending.endswith("gz") else out.read_bytes()
    raw.decode("utf-8")  # nothing that another reader could not take
    assert [json.loads(line) for line in raw.split(b"\n")[:-1]] == rows


COLUMNS = st.fixed_dictionaries(
    {
        "text": st.none() | st.text(),
        "whole": st.none() | st.integers(-(2**63), 2**63 - 1),
        "real": st.none() | st.floats(allow_nan=False),
        "flag": st.none() | st.booleans(),
        "votes": st.none() | st.lists(st.fixed_dictionaries({"text": st.text(), "p": st.none() | st.floats(0, 1)}), max_size=3),
    }
)


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(COLUMNS, min_size=1, max_size=6))
def test_typed_rows_survive_parquet(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    out = tmp_path_factory.mktemp("round") / "o.parquet"
    write_rows(out, lambda: rows)
    assert rows_of(out) == rows


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TURN, min_size=2, max_size=2, unique=True), seed=st.integers(0, 2**40))
def test_chosen_and_rejected_are_both_shown_once_whatever_the_seed(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], seed: int
) -> None:
    row = {"prompt": "Q?", "chosen": texts[0], "rejected": texts[1]}
    (item,) = taken(tmp_path_factory.mktemp("sides"), [row], seed=seed)
    shown = [item.row["response_a"], item.row["response_b"]]
    assert shown == (texts if item.row["human_label"] == "a" else texts[::-1])


def test_what_is_written_is_read_by_other_tools(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_rows(tmp_path / "o.jsonl", lambda: LABELLED)
    loaded = datasets.Dataset.from_json(str(tmp_path / "o.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert loaded["label"] == ["b", None, "a"]
