"""Contrast of preference sets: hand-computed similarities and distances, properties, the rows it takes, table and plot."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.contrast import METRICS, compare, contrast, jaccard, measure, plot, render, words
from rlaif.pairs import PairSettings, training_pairs
from rlaif.records import UsageError
from tests.conftest import cli, shared_rows, write_jsonl

TEXT = st.text(alphabet="abcé .,\n1", max_size=30)
TOKENS = st.lists(st.sampled_from(["red", "Green", "blue", "sky", "1"]), max_size=12)


def values(chosen: str, rejected: str) -> dict[str, float]:
    return dict(zip(METRICS, contrast(chosen, rejected), strict=True))


# ---------------------------------------------------------------- two texts


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # {the, cat, sat} and {the, cat, sits}: 2 of 4; T → t, a → i, "." → s
        ("The cat sat.", "the cat sits", {"jaccard": 2 / 4, "levenshtein": 3, "levenshtein_normalised": 3 / 12}),
        # the textbook's example: k → s, e → i, g inserted
        ("kitten", "sitting", {"jaccard": 0.0, "levenshtein": 3, "levenshtein_normalised": 3 / 7, "length_characters": -1}),
        ("a b c d", "a b", {"jaccard": 0.5, "levenshtein": 4, "length_characters": 4, "length_words": 2, "longer": 1.0}),
        ("a a a b", "b a", {"jaccard": 1.0, "length_words": 2, "identical": 0.0}),  # sets: how often does not count
        ("Yes", "Yes", {"jaccard": 1.0, "levenshtein": 0, "levenshtein_normalised": 0.0, "identical": 1.0}),
        ("", "word", {"jaccard": 0.0, "levenshtein": 4, "levenshtein_normalised": 1.0, "longer": 0.0}),
        ("", "", {"jaccard": 1.0, "levenshtein": 0, "levenshtein_normalised": 0.0, "identical": 1.0}),
        ("?!", "..", {"jaccard": 1.0, "levenshtein": 2, "identical": 0.0}),  # no words in either
    ],
)
def test_values_are_those_worked_out_by_hand(chosen: str, rejected: str, expected: dict[str, float]) -> None:
    found = values(chosen, rejected)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_words_are_runs_of_letters_digits_and_underscores_in_lower_case() -> None:
    assert words("It's 3.5 snake_case, Ünïcode—日本!") == ["it", "s", "3", "5", "snake_case", "ünïcode", "日本"]


def test_no_side_is_longer_where_both_have_as_many_characters() -> None:
    assert math.isnan(values("abc", "xyz")["longer"])


@given(first=TEXT, second=TEXT)
def test_similarity_and_distance_are_symmetric_and_bounded(first: str, second: str) -> None:
    one, two = values(first, second), values(second, first)
    for name in ("jaccard", "levenshtein", "levenshtein_normalised", "identical"):
        assert one[name] == two[name]
    for name in ("length_characters", "length_words"):
        assert one[name] == -two[name]
    assert 0 <= one["jaccard"] <= 1
    assert 0 <= one["levenshtein_normalised"] <= 1
    assert abs(len(first) - len(second)) <= one["levenshtein"] <= max(len(first), len(second))
    assert (one["levenshtein"] == 0) == (first == second) == bool(one["identical"])


@given(text=TEXT)
def test_a_text_is_the_same_as_itself(text: str) -> None:
    assert values(text, text)["jaccard"] == 1
    assert values(text, text)["levenshtein"] == 0


@given(tokens=TOKENS, data=st.data())
def test_permuted_words_have_a_jaccard_similarity_of_1(tokens: list[str], data: st.DataObject) -> None:
    permuted = data.draw(st.permutations(tokens))
    assert values(" ".join(tokens), " ".join(permuted).upper())["jaccard"] == 1


@given(first=TEXT, second=TEXT, third=TEXT)
def test_the_distance_satisfies_the_triangle_inequality(first: str, second: str, third: str) -> None:
    one, two, three = (values(*pair)["levenshtein"] for pair in ((first, second), (second, third), (first, third)))
    assert three <= one + two


@given(first=st.sets(st.integers(0, 9)), second=st.sets(st.integers(0, 9)))
def test_jaccard_of_sets(first: set[int], second: set[int]) -> None:
    found = jaccard(map(str, first), map(str, second))
    assert found == (len(first & second) / len(first | second) if first | second else 1)


# ---------------------------------------------------------------- rows

SHARED = "\n\nHuman: What is red?\n\nAssistant: A colour.\n\nHuman: And blue?"
TURNS = [{"role": "user", "content": "Hi"}]


def one(tmp_path: Path, row: dict[str, Any]) -> dict[str, float]:
    found = measure(str(write_jsonl(tmp_path / "d.jsonl", [row])))
    return dict(zip(METRICS, found.values[0], strict=True))


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "a b c", "rejected": "a b d"},
        {"chosen": "a b c", "rejected": "a b d"},
        {"chosen": f"{SHARED}\n\nAssistant: a b c", "rejected": f"{SHARED}\n\nAssistant: a b d"},
        {"prompt": TURNS, "chosen": said("a b c"), "rejected": said("a b d")},
        {"chosen": TURNS + said("a b c"), "rejected": TURNS + said("a b d")},
        {"prompt": "Q", "response_a": "a b c", "response_b": "a b d", "label": "a"},
        {"prompt": "Q", "response_a": "a b d", "response_b": "a b c", "label": "b", "status": "ok"},
        {"prompt": "Q", "response": "a b d", "revised": "a b c", "status": "ok"},
        {"response": " a b d\n", "revised": "a b c"},
    ],
)
def test_every_shape_of_rows_gives_the_same_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    found = one(tmp_path, row)
    assert found["jaccard"] == 0.5
    assert found["levenshtein"] == 1
    assert math.isnan(found["longer"])


def test_which_side_is_the_chosen_one(tmp_path: Path) -> None:
    for row in (
        {"prompt": "Q", "chosen": "long", "rejected": "s"},
        {"prompt": "Q", "response_a": "s", "response_b": "long", "label": "b"},
        {"prompt": "Q", "response": "s", "revised": "long"},
    ):
        assert one(tmp_path, row)["length_characters"] == 3


def test_rows_without_a_pair_are_left_out_and_counted(tmp_path: Path) -> None:
    base = {"prompt": "Q", "response_a": "x y", "response_b": "x"}
    labels = [("a", "ok"), ("tie", "tie"), (None, "refused"), (None, "error"), (None, "error"), ("b", "ok")]
    rows = [{**base, "label": label, "status": status} for label, status in labels]
    (found,) = compare([str(write_jsonl(tmp_path / "d.jsonl", rows))], resamples=100)
    assert found["left_out"] == {"tie": 1, "refused": 1, "error": 2}
    assert (found["rows"], found["pairs"], found["prompts"]) == (6, 2, 1)
    assert found["metrics"]["length_words"]["value"] == 0
    assert "4 of 6 rows left out (1 tie, 1 refused, 2 error)" in render([found])


def test_dialogues_that_go_on_from_different_prompts_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"{SHARED}\n\nAssistant: a", "rejected": f"{SHARED} Why?\n\nAssistant: b"},
        {"chosen": f"{SHARED}\n\nAssistant: a", "rejected": f"{SHARED}\n\nAssistant: b"},
    ]
    found = measure(str(write_jsonl(tmp_path / "d.jsonl", rows)))
    assert found.left_out == {"different prompts": 1}
    assert len(found.values) == 1


def test_a_failed_revision_is_no_pair(tmp_path: Path) -> None:
    rows = [{"response": "a", "revised": "b", "status": "ok"}, {"response": "a", "revised": None, "status": "refused"}]
    found = measure(str(write_jsonl(tmp_path / "d.jsonl", rows)))
    assert (len(found.values), found.left_out) == (1, {"refused": 1})


GOOD = {"prompt": "Q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Q", "chosen": "a"}, "no column 'rejected'"),
        ({**GOOD, "chosen": None}, "column 'chosen': expected text, or messages that end with an assistant's turn, got null"),
        ({**GOOD, "rejected": 3}, "column 'rejected': .*, got a number"),
        ({**GOOD, "rejected": [{"role": "user", "content": "x"}]}, "column 'rejected': .*, got a list"),
        ({**GOOD, "prompt": 7}, "column 'prompt': expected text or messages, got a number"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD, row])
    with pytest.raises(UsageError, match=rf"d\.jsonl line 2: {words}"):
        measure(str(path))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Q"}, "expected the columns 'chosen' and 'rejected'; or"),
        ({"response_a": "x", "response_b": "y", "label": "A"}, "column 'label': 'A' is not a label"),
        ({"response_a": "x", "response_b": None, "label": "a"}, "column 'response_b': expected text, got null"),
        ({"response": "x", "revised": ["y"]}, "column 'revised': expected text, got a list"),
        ({"chosen": [{"role": 1, "content": "x"}, *said("y")], "rejected": said("x")}, "column 'chosen': "),
    ],
)
def test_a_bad_first_row_is_named_too(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=rf"line 1: {re.escape(words)}"):
        measure(str(write_jsonl(tmp_path / "d.jsonl", [row])))


def test_a_set_without_a_row_or_a_pair_is_refused(tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    ties = write_jsonl(tmp_path / "ties.jsonl", [{"response_a": "x", "response_b": "y", "label": "tie"}])
    with pytest.raises(UsageError, match=r"empty\.jsonl: no rows"):
        measure(str(empty))
    with pytest.raises(UsageError, match=r"no row has a chosen and a rejected response \(1 tie\)"):
        measure(str(ties))


# ---------------------------------------------------------------- datasets


def planted(tmp_path: Path, prompts: int = 30, each: int = 4) -> Path:
    """Rows of one prompt are alike: `each` times the same pair, of similarity k/10 with k from 0 to 9."""
    rows = []
    for prompt in range(prompts):
        same = prompt % 10
        chosen = " ".join(f"w{n}" for n in range(10))
        rejected = " ".join([f"w{n}" for n in range(same)])
        rows += [{"prompt": f"Q{prompt}", "chosen": chosen, "rejected": rejected}] * each
    return write_jsonl(tmp_path / "planted.jsonl", rows)


def test_means_medians_and_intervals_by_prompt(tmp_path: Path) -> None:
    (found,) = compare([str(planted(tmp_path))])
    own = found["metrics"]["jaccard"]
    assert own["value"] == pytest.approx(0.45)
    assert own["median"] == pytest.approx(0.45)
    assert own["n"] == 120
    # Of 30 prompts, not of 120 rows: σ of k/10 is .287, so the mean's standard error is .0524.
    assert own["high"] - own["low"] == pytest.approx(2 * 1.96 * 0.287 / math.sqrt(30), rel=0.15)
    assert own["low"] < 0.45 < own["high"]
    assert found["metrics"]["longer"]["value"] == 1
    assert found["prompts"] == 30


def test_pairs_without_a_prompt_stand_for_themselves(tmp_path: Path) -> None:
    rows = [{"chosen": f"a{n} b", "rejected": "b"} for n in range(8)]
    assert compare([str(write_jsonl(tmp_path / "d.jsonl", rows))], resamples=100)[0]["prompts"] == 8


def test_real_dialogues_measure_the_same_as_the_training_set_made_of_them(tmp_path: Path) -> None:
    """The splitting leaves no part of the prompt in the responses: as dialogues, and as pairs with a prompt of their own."""
    rows = shared_rows("hh_harmless_half.jsonl.gz")[:200]
    whole = measure(str(write_jsonl(tmp_path / "whole.jsonl", rows)))
    labelled = []
    for n, row in enumerate(rows):
        heads = [row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected")]
        if heads[0][0] == heads[1][0]:
            a, b = (head[2].strip() for head in heads)
            made = {"id": str(n), "prompt": heads[0][0].strip(), "response_a": a, "response_b": b}
            labelled.append({**made, "status": "ok", "soft_label": 0.9, "label": "a"})
    pairs = list(training_pairs(labelled, PairSettings()))
    split = measure(str(write_jsonl(tmp_path / "split.jsonl", pairs)))
    assert len(whole.values) == len(pairs) > 150
    for name in METRICS:
        assert whole.of(name).tolist() == split.of(name).tolist()
    assert whole.prompts.tolist() == split.prompts.tolist()


def test_the_table_has_a_row_a_dataset_and_fits_100_columns(tmp_path: Path) -> None:
    one, two = planted(tmp_path), write_jsonl(tmp_path / "other.jsonl", [GOOD])
    text = render(compare([str(one), str(two)], resamples=100))
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"^planted\.jsonl +120 +0\.450 ", text, re.MULTILINE)
    assert re.search(r"^other\.jsonl +1 +0\.000 +– +0\.000 +1 +– +1$", text, re.MULTILINE)
    assert "\\w+" in text


def test_the_plot_is_whole_svg_the_same_each_time(tmp_path: Path) -> None:
    sources = [str(planted(tmp_path)), str(write_jsonl(tmp_path / "a & b <i>.jsonl", [GOOD, {**GOOD, "rejected": "a"}]))]
    out = tmp_path / "plot.svg"
    found = compare(sources, resamples=100, out=out)
    texts = "".join(ElementTree.parse(out).getroot().itertext())
    assert "planted.jsonl" in texts
    assert "a & b <i>.jsonl" in texts
    assert "120 pairs" in texts
    assert "token Jaccard similarity" in texts
    assert out.read_bytes() == plot([measure(source) for source in sources], found)


@pytest.mark.parametrize("name", ["plot.png", "missing/plot.svg"])
def test_a_plot_that_cannot_be_written_is_refused_first(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"plot must end in|no such folder"):
        compare([str(tmp_path / "not there.jsonl")], out=tmp_path / name)


def test_the_command(tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "d.jsonl", [{"q": "Q", "chosen": "a b", "rejected": "a"}, {"q": "R", "chosen": "c", "rejected": "d"}]
    )
    done = cli("contrast", data, data, "--map", "prompt=q", "-o", tmp_path / "p.svg", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["datasets"]
    assert [own["metrics"]["jaccard"]["value"] for own in found] == [0.25, 0.25]
    assert found[0]["prompts"] == 2
    assert (tmp_path / "p.svg").stat().st_size > 5000
    bad = cli("contrast", data, tmp_path / "none.jsonl")
    assert bad.returncode == 2
    assert "no such file" in bad.stderr
