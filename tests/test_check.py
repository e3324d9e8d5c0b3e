"""Check of training sets: planted duplicates and contamination, every shape of rows, limits, exit codes, bad input."""

from __future__ import annotations

import json
import random
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.check import CROWD, FORMS, MEASURES, NearIndex, Settings, Shingler, bands, check, render, similarity
from rlaif.records import UsageError
from tests.conftest import cli, shared_rows, write_jsonl

VOCABULARY = [f"word{n}" for n in range(4000)]


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=count))


def edited(rng: random.Random, source: str, edits: int) -> str:
    """The text with so many words replaced by new ones, far enough apart that each changes five shingles of its own."""
    found = source.split()
    for place in range(5, 5 + 7 * edits, 7):
        found[place] = f"edit{rng.randrange(10**9)}"
    return " ".join(found)


def shingles(source: str) -> set[tuple[str, ...]]:
    found = re.findall(r"\w+", source.lower())
    return {tuple(found[i : i + 5]) for i in range(max(1, len(found) - 4))}


def true_jaccard(one: str, two: str) -> float:
    a, b = shingles(one), shingles(two)
    return len(a & b) / len(a | b)


def checked(tmp_path: Path, rows: list[dict[str, Any]], name: str = "train.jsonl", **settings: Any) -> dict[str, Any]:
    return check(str(write_jsonl(tmp_path / name, rows)), Settings(**settings))


def share(found: dict[str, Any], name: str) -> tuple[int, int]:
    return found["measures"][name]["count"], found["measures"][name]["n"]


# ---------------------------------------------------------------- sets of shingles


@given(
    one=st.lists(st.sampled_from("abcd"), min_size=1, max_size=30),
    two=st.lists(st.sampled_from("abcd"), min_size=1, max_size=30),
)
def test_similarity_is_the_jaccard_of_word_five_grams(one: list[str], two: list[str]) -> None:
    shingler = Shingler()
    first, second = " ".join(one), " ".join(two).upper()
    a, b = shingler.shingles([first]), shingler.shingles([second])
    assert similarity(a, b) == similarity(b, a) == pytest.approx(true_jaccard(first, second))
    assert similarity(a, a) == 1


def test_no_shingle_reaches_from_one_text_into_the_next() -> None:
    shingler = Shingler()
    apart = shingler.shingles(["a b c d e f", "g h i j k"])
    assert len(apart) == 2 + 1
    assert len(shingler.shingles(["a b c d e f g h i j k"])) == 7
    assert set(shingler.shingles(["g h i j k", None, "", "...", "a b c d e f"])) == set(apart)


@pytest.mark.parametrize("near", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_the_bands_find_what_is_at_the_threshold(near: float) -> None:
    count, size = bands(near)
    assert count * size <= 64
    assert 1 - (1 - near**size) ** count >= 0.98
    assert count >= 2


def test_what_is_found_is_near_and_hardly_anything_is_missed() -> None:
    """400 texts, each with a copy at a known similarity, from .4 to 1: those of .8 and more are found, and none below."""
    rng, shingler, index = random.Random(1), Shingler(), NearIndex(0.8)
    sources = [text(rng, 200) for _ in range(400)]
    for number, source in enumerate(sources):
        index.add(number, shingler.shingles([source]))
    missed = total = 0
    for number, source in enumerate(sources):
        copy = edited(rng, source, number % 16)
        truth = true_jaccard(source, copy)
        found = dict(index.find(shingler.shingles([copy])))
        assert set(found) <= {number}
        assert all(value == pytest.approx(truth) and value >= 0.8 for value in found.values())
        if truth >= 0.8:
            total += 1
            missed += number not in found
    assert total > 80
    assert missed <= 0.05 * total


# ---------------------------------------------------------------- duplicates


def test_exact_duplicates_after_white_space_and_case(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is red?", "completion": "A colour"},
        {"prompt": " what  IS\nred? ", "completion": "a COLOUR"},
        {"prompt": "What is red?", "completion": "A colour!"},  # another sign: not exactly the same, but the same words
        {"prompt": "What is red? A", "completion": "colour"},  # another cut
        {"prompt": "What is red?", "completion": "A colour"},
    ]
    found = checked(tmp_path, rows)
    assert share(found, "duplicates") == (2, 5)
    assert [re.sub(r"\S+/", "", line) for line in found["measures"]["duplicates"]["examples"]] == [
        "train.jsonl line 2 is line 1",
        "train.jsonl line 5 is line 1",
    ]
    assert share(found, "near") == (1, 5)
    assert found["measures"]["near"]["examples"][0].endswith("train.jsonl line 3 is near line 1: 1.00")


def test_swapped_sides_are_no_exact_duplicate_but_near(tmp_path: Path) -> None:
    rng = random.Random(0)
    p, a, b = text(rng, 20), text(rng, 30), text(rng, 30)
    found = checked(tmp_path, [{"prompt": p, "chosen": a, "rejected": b}, {"prompt": p, "chosen": b, "rejected": a}])
    assert share(found, "duplicates") == (0, 2)
    assert share(found, "near") == (1, 2)


@pytest.mark.parametrize(("near", "edits"), [(0.8, 4), (0.6, 9), (0.9, 1)])
def test_planted_near_duplicates_are_found(tmp_path: Path, near: float, edits: int) -> None:
    """Of 600 rows 150 are edited copies. k edits of 5 shingles each, of 196: the similarity is (196−5k)/(196+5k)."""
    rng = random.Random(2)
    texts = [text(rng, 200) for _ in range(450)]
    copies = [edited(rng, source, edits) for source in texts[:150]]
    expected = (196 - 5 * edits) / (196 + 5 * edits)
    assert true_jaccard(texts[0], copies[0]) == pytest.approx(expected)
    assert expected >= near
    rows = [{"text": one} for one in (*texts, *copies)]
    rng.shuffle(rows)
    found = checked(tmp_path, rows, near=near)
    count, n = share(found, "near")
    assert n == 600
    assert 145 <= count <= 150
    assert share(found, "duplicates") == (0, 600)
    told = [float(line.rpartition(" ")[2]) for line in found["measures"]["near"]["examples"]]
    assert told == pytest.approx([expected] * 3, abs=0.006)


def test_none_below_the_threshold_is_reported(tmp_path: Path) -> None:
    """Copies just below .8, which the bands often take for candidates: only the exact similarity keeps them out."""
    rng = random.Random(3)
    texts = [text(rng, 200) for _ in range(300)]
    rows = [{"text": one} for one in (*texts, *(edited(rng, one, 5) for one in texts))]
    assert 0.77 < true_jaccard(rows[0]["text"], rows[300]["text"]) < 0.8
    assert share(checked(tmp_path, rows), "near") == (0, 600)
    assert share(checked(tmp_path, rows, near=0.75), "near")[0] >= 290


def test_a_template_costs_no_more_than_other_rows_and_is_told(tmp_path: Path) -> None:
    rng = random.Random(4)
    shared = text(rng, 150)
    rows = [{"text": f"{shared} {text(rng, 40)}"} for _ in range(1500)]
    assert 0.5 < true_jaccard(rows[0]["text"], rows[1]["text"]) < 0.8
    start = time.perf_counter()
    found = checked(tmp_path, rows)
    assert time.perf_counter() - start < 60
    assert share(found, "near") == (0, 1500)
    (note,) = found["notes"]
    assert re.match(rf"\d+ rows look like over {CROWD} others", note)


# ---------------------------------------------------------------- contamination


def contaminated(tmp_path: Path) -> tuple[list[dict[str, Any]], Path]:
    """200 training prompts: 10 exactly those of an evaluation set, 20 near to one, 30 with one inside, 140 of their own."""
    rng = random.Random(5)
    prompts = [text(rng, 60) for _ in range(100)]
    same = [one.upper() for one in prompts[:10]]
    near = [edited(rng, one, 1) for one in prompts[10:30]]
    inside = [f"{text(rng, 100)} {one} {text(rng, 100)}" for one in prompts[30:60]]
    own = [text(rng, 60) for _ in range(140)]
    rows = [{"prompt": one, "completion": f"answer {n}"} for n, one in enumerate((*same, *near, *inside, *own))]
    rng.shuffle(rows)
    return rows, write_jsonl(tmp_path / "eval.jsonl", [{"prompt": one, "answer": 1} for one in prompts])


def test_planted_contamination_is_found(tmp_path: Path) -> None:
    rows, evaluation = contaminated(tmp_path)
    found = checked(tmp_path, rows, against=[str(evaluation)])
    assert share(found, "overlap") == (60, 200)
    assert share(found, "overlap_exact") == (10, 200)
    assert share(found, "overlap_near") == (20, 200)
    assert share(found, "overlap_ngrams")[0] == 30 + 20  # of 53 8-grams, an edit changes 6: .89 are still there
    assert share(found, "evaluation_met") == (60, 100)
    assert found["evaluation"] == {str(evaluation): {"prompts": 100, "met": 60}}
    example = found["measures"]["overlap_exact"]["examples"][0]
    train_line, line = (int(number) for number in re.findall(r"line (\d+)", example))
    assert rows[train_line - 1]["prompt"] == json.loads(evaluation.read_text().splitlines()[line - 1])["prompt"].upper()


def test_the_share_of_n_grams_decides(tmp_path: Path) -> None:
    rng = random.Random(6)
    prompt = text(rng, 40)
    evaluation = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": prompt}])
    words = prompt.split()
    for count, near, hit in ((40, 1.0, 1), (39, 1.0, 0), (37, 0.9, 1), (36, 0.9, 0)):  # (count − 7) of 33 8-grams
        row = {"prompt": " ".join([*words[:count], *text(rng, 200).split()]), "completion": "x"}
        assert share(checked(tmp_path, [row], against=[str(evaluation)], near=near), "overlap_ngrams") == (hit, 1), count
    short = {"prompt": " ".join([text(rng, 50), *words[:6]]), "completion": "x"}
    assert share(checked(tmp_path, [short], against=[str(evaluation)], ngram=3, near=0.3), "overlap_ngrams") == (0, 1)


def test_a_prompt_is_the_same_in_every_shape(tmp_path: Path) -> None:
    """Text, messages and dialogues, in the training set and in the evaluation set."""
    turns = [{"role": "user", "content": "What is red?"}]
    dialogue = "\n\nHuman: What is red?\n\nAssistant:"
    said = [{"role": "assistant", "content": "A colour"}]
    evaluations = [
        {"prompt": "What is red?"},
        {"prompt": turns},
        {"prompt": dialogue},
        {"chosen": f"{dialogue} A", "rejected": f"{dialogue} B"},
        {"messages": [*turns, *said]},
        {"text": "what is  RED?"},
    ]
    rows = [
        {"prompt": "What is red?", "completion": "A colour"},
        {"prompt": turns, "completion": said},
        {"prompt": dialogue, "chosen": " A colour", "rejected": " B"},
        {"prompt": turns, "chosen": said, "rejected": said},
        {"chosen": turns + said, "rejected": turns + said},
        {"chosen": f"{dialogue} A", "rejected": f"{dialogue} B"},
        {"messages": turns + said},
        {"text": f"{dialogue} A"},
        {"text": "What is red?"},
    ]
    for n, own in enumerate(evaluations):
        path = write_jsonl(tmp_path / "eval.jsonl", [own])
        for k, row in enumerate(rows):
            assert share(checked(tmp_path, [row], against=[str(path)]), "overlap_exact") == (1, 1), (n, k)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "What is red?"}, {"prompt": "What is blue?"}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"prompt": "what is blue?"}, {"prompt": "Who?"}, {"prompt": " "}])
    rows = [{"prompt": "what is Blue?", "completion": "x"}, {"prompt": "who?", "completion": "x"}]
    found = checked(tmp_path, rows, against=[str(one), str(two)])
    assert found["evaluation"] == {str(one): {"prompts": 2, "met": 1}, str(two): {"prompts": 1, "met": 1}}
    assert f"{one}: 1 of 2 prompts met" in " ".join(render(found, 1000).split("\n"))


# ---------------------------------------------------------------- quality


def test_empty_and_identical_sides_lengths_and_soft_labels(tmp_path: Path) -> None:
    sides = [("aa", "b"), ("", "b"), ("Same  one", "same one "), ("ccc", "dddd"), ("e" * 50, "f"), ("gg", "hh")]
    rows = [{"prompt": f"Q{n}", "chosen": c, "rejected": r, "soft_label": 0.5 + n / 10} for n, (c, r) in enumerate(sides)]
    rows.append({"prompt": " ", "chosen": "i", "rejected": "jj", "soft_label": 1})
    found = checked(tmp_path, rows, max_tokens=12)
    assert share(found, "empty") == (2, 7)
    assert [line.rpartition(" ")[2] for line in found["measures"]["empty"]["examples"]] == ["2", "7"]
    assert share(found, "identical") == (1, 7)
    assert share(found, "over_length") == (1, 7)  # 52 characters are 13 tokens
    assert found["measures"]["over_length"]["examples"][0].endswith("line 5: 13 tokens")
    longer = found["measures"]["longer"]
    assert (longer["count"], longer["n"]) == (3, 6)
    assert longer["low"] < 0.5 < longer["high"]
    assert found["soft_label"]["quartiles"] == pytest.approx([0.5, 0.65, 0.8, 0.95, 1.0])
    assert sum(found["soft_label"]["histogram"]) == 7
    assert "label_true" not in found["measures"]


def test_label_balance(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "completion": f"A{n}", "label": n % 4 == 0} for n in range(20)]
    found = checked(tmp_path, rows, limits={"imbalance": 0.7})
    assert share(found, "label_true") == (5, 20)
    assert share(found, "imbalance") == (15, 20)
    assert found["over"] == ["imbalance"]


def test_rows_without_a_prompt_and_without_an_answer(tmp_path: Path) -> None:
    found = checked(tmp_path, [{"messages": [{"role": "user", "content": "Hi"}]}])
    assert (found["form"], share(found, "empty")) == ("messages", (1, 1))
    found = checked(tmp_path, [{"text": "Just a text."}, {"text": ""}])
    assert (found["form"], share(found, "empty")) == ("text", (1, 2))
    found = checked(tmp_path, [{"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"}])
    assert share(found, "different_prompts") == (1, 1)


def test_the_longer_rate_of_real_pairs() -> None:
    """As the data's own count has it, with dialogues split as they are for labelling."""
    rows = shared_rows("hh_harmless_half.jsonl.gz")
    found = check(str(Path(__file__).parents[1].parent / "shared" / "data" / "hh_harmless_half.jsonl.gz"), Settings())
    tails = [[row[side].rpartition("\n\nAssistant:")[2].strip() for side in ("chosen", "rejected")] for row in rows]
    unequal = [(len(a), len(b)) for a, b in tails if len(a) != len(b)]
    assert share(found, "longer") == (sum(a > b for a, b in unequal), len(unequal))
    assert found["measures"]["longer"]["high"] < 0.5


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_a_tokenizer_counts_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": "a b", "chosen": "a " * n, "rejected": "b\ud800"} for n in range(1, 6)]
    found = checked(tmp_path, rows, max_tokens=5, tokenizer=str(tmp_path / "tokenizer"))
    assert share(found, "over_length") == (2, 5)
    assert found["notes"] == []
    with pytest.raises(UsageError, match="--tokenizer"):
        checked(tmp_path, rows, max_tokens=5, tokenizer=str(tmp_path / "none"))


def test_every_measure_has_a_name_and_every_form_is_read(tmp_path: Path) -> None:
    assert set(FORMS) == {"preference", "completion", "messages", "text"}
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "bc"}]
    found = checked(tmp_path, rows, against=[str(write_jsonl(tmp_path / "e.jsonl", rows))], max_tokens=3)
    assert set(found["measures"]) == set(MEASURES) - {"label_true", "imbalance"}
    _, table, notes, *_ = render(found).split("\n\n")
    assert max(map(len, (*table.splitlines(), *notes.splitlines()))) <= 100
    assert json.loads(json.dumps(found, allow_nan=False)) == found


# ---------------------------------------------------------------- limits and exit codes


def test_a_limit_is_crossed_only_above_it(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n % 8}", "completion": f"A{n % 8}"} for n in range(10)]
    assert checked(tmp_path, rows, limits={"duplicates": 0.2})["over"] == []
    found = checked(tmp_path, rows, limits={"duplicates": 0.19, "near": 0.0, "empty": 0.0})
    assert found["over"] == ["duplicates"]
    table = render(found)
    assert re.search(r"^exact duplicates +0\.200 +2 +10 +0\.19 +over$", table, re.MULTILINE)
    assert re.search(r"^an empty side +0\.000 +0 +10 +0 +ok$", table, re.MULTILINE)


def test_exit_codes(tmp_path: Path) -> None:
    rows, evaluation = contaminated(tmp_path)
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    good = cli("check", train, "--against", evaluation, "--max-overlap", "0.3", "--max-duplicates", "0")
    assert good.returncode == 0, good.stderr
    assert "evaluation overlap" in good.stdout
    over = cli("check", train, "--against", evaluation, "--max-overlap", "0.29", "--json")
    assert over.returncode == 1
    assert "over the limit: evaluation overlap 0.300 > 0.29" in over.stderr
    assert json.loads(over.stdout)["over"] == ["overlap"]
    bad = cli("check", tmp_path / "none.jsonl")
    assert bad.returncode == 2
    assert "no such file" in bad.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"limits": {"identical": 0.1}}, "a limit on 'chosen = rejected' does not go with this file"),
        ({"limits": {"imbalance": 0.1}}, "a limit on 'the more frequent label' does not go with this file"),
        ({"limits": {"overlap": 0.1}}, "--max-overlap goes with --against"),
        ({"limits": {"over_length": 0.1}}, "--max-over-length goes with --max-tokens"),
        ({"tokenizer": "embedded"}, "--tokenizer goes with --max-tokens"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        checked(tmp_path, [{"prompt": "Q", "completion": "A"}], **settings)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "train.jsonl: no rows"),
        (
            [{"question": "Q"}],
            "line 1: expected the columns 'chosen' and 'rejected'; or 'prompt' and 'completion'; or 'messages'",
        ),
        ([{"prompt": "Q", "completion": "A"}, {"prompt": "Q"}], "line 2: no column 'completion'"),
        ([{"prompt": "Q", "completion": None}], "line 1: column 'completion': expected text"),
        ([{"prompt": None, "completion": "A"}], "line 1: column 'prompt': expected text or messages, got null"),
        ([{"prompt": "Q", "completion": "A", "label": 1}], "line 1: column 'label': expected true or false, got 1"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B", "soft_label": 1.5}], "line 1: column 'soft_label': 1.5"),
        ([{"prompt": 3, "chosen": "A", "rejected": "B"}], "line 1: column 'prompt': expected text or messages, got a number"),
        ([{"messages": [{"role": "user"}]}], "line 1: column 'messages': expected messages with a role and a text"),
        ([{"messages": []}], "line 1: column 'messages': "),
        ([{"text": 1}], "line 1: column 'text': expected text, got a number"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        checked(tmp_path, rows)


def test_a_bad_evaluation_set_is_named(tmp_path: Path) -> None:
    train = [{"prompt": "Q", "completion": "A"}]
    for rows, words in (([], "eval.jsonl: no rows"), ([{"question": "Q"}], "line 1: expected the columns 'prompt'; or")):
        path = write_jsonl(tmp_path / "eval.jsonl", rows)
        with pytest.raises(UsageError, match=re.escape(words)):
            checked(tmp_path, train, against=[str(path)])


# ---------------------------------------------------------------- size


def test_the_work_grows_as_the_rows(tmp_path: Path) -> None:
    """2,000 and 8,000 rows: four times the work, give or take a busy machine, where comparing all pairs would take sixteen."""
    times = []
    for count in (2000, 8000):
        rng = np.random.default_rng(7)
        rows = [{"text": " ".join(VOCABULARY[n] for n in rng.integers(0, 4000, 120))} for _ in range(count)]
        path = write_jsonl(tmp_path / "train.jsonl", rows)
        start = time.process_time()
        check(str(path), Settings())
        times.append(time.process_time() - start)
    assert times[1] < 8 * times[0] + 1
