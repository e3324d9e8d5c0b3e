"""Training rows: bad ones are named before a model loads, both forms say the same, and the held-out part is whole prompts."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlaif.cli import main
from rlaif.pairs import PairSettings, training_pairs
from rlaif.records import Row, UsageError
from rlaif.train import data
from rlaif.train.data import Rows, encoder, fitting, held_out
from tests.conftest import write_jsonl
from tests.engines.tiny import tiny_tokenizer

PAIR: Row = {"prompt": "Question?", "chosen": "Yes", "rejected": "No"}
SOFT: Row = {**PAIR, "soft_label": 0.8}
ANSWER: Row = {"prompt": "Question?", "completion": "Yes", "label": True}
TALK: Row = {
    "prompt": [{"role": "user", "content": "Question?"}],
    "chosen": [{"role": "assistant", "content": "Yes"}],
    "rejected": [{"role": "assistant", "content": "No"}],
}

BAD: dict[str, tuple[str, list[Row], str]] = {
    "no column": ("dpo", [PAIR, {"prompt": "Q", "chosen": "Yes"}], "line 2: no column 'rejected'; there are: prompt, chosen"),
    "no completion": ("sft", [{"prompt": "Q"}], "line 1: no column 'completion'"),
    "no label": ("kto", [{"prompt": "Q", "completion": "A"}], "line 1: no column 'label'"),
    "one class": ("kto", [ANSWER, ANSWER], "column 'label': every row is desirable"),
    "the other class": ("kto", [{**ANSWER, "label": False}], "column 'label': every row is undesirable"),
    "label a number": ("kto", [ANSWER, {**ANSWER, "label": 0}], "line 2: column 'label': expected true or false, got a number"),
    "soft label above 1": (
        "reward",
        [SOFT, {**SOFT, "soft_label": 1.2}],
        "line 2: column 'soft_label': expected a probability",
    ),
    "soft label below 0": ("dpo", [{**SOFT, "soft_label": -0.1}], "line 1: column 'soft_label': expected a probability"),
    "soft label NaN": ("reward", [{**SOFT, "soft_label": float("nan")}], "line 1: column 'soft_label': expected a number"),
    "soft label text": (
        "dpo",
        [SOFT, {**SOFT, "soft_label": "0.7"}],
        "line 2: column 'soft_label': expected a number, got '0.7'",
    ),
    "soft label true": ("reward", [{**SOFT, "soft_label": True}], "line 1: column 'soft_label': expected a number, got True"),
    "soft label null": ("dpo", [{**SOFT, "soft_label": None}], "line 1: column 'soft_label': expected a number, got None"),
    "soft labels of some": ("reward", [SOFT, PAIR], "line 2: column 'soft_label' is in some rows and not in others"),
    "a group of nothing": ("reward", [{**SOFT, "group": [1]}], "line 1: column 'group': expected text or a whole number"),
    "nothing at all": ("sft", [], "no rows"),
    "identical": ("dpo", [PAIR, {**PAIR, "rejected": "Yes"}], "line 2: columns 'chosen' and 'rejected' are identical"),
    "forms mixed": ("reward", [PAIR, TALK], "line 2: texts and lists of messages in one file"),
    "other prompts": (
        "dpo",
        [{"chosen": "\n\nHuman: A\n\nAssistant: B", "rejected": "\n\nHuman: C\n\nAssistant: D"}],
        "different",
    ),
    "prompt null": (
        "sft",
        [{"prompt": None, "completion": "A"}],
        "line 1: column 'prompt': expected text or messages, got null",
    ),
    "prompt empty": ("dpo", [{**PAIR, "prompt": " \n"}], "line 1: column 'prompt' is empty"),
    "response empty": ("dpo", [PAIR, {**PAIR, "chosen": ""}], "line 2: column 'chosen' is empty"),
    "response a number": ("reward", [{**PAIR, "rejected": 3}], "line 1: column 'rejected': expected text, or messages"),
    "a user's response": ("dpo", [{**TALK, "chosen": TALK["prompt"]}], "line 1: column 'chosen': expected text, or messages"),
    "messages without an end": ("sft", [{"messages": TALK["prompt"]}], "line 1: column 'messages': expected turns that end"),
    "text alone": ("sft", [{"text": "words"}], "column 'text' alone: there is no completion"),
}


def refused(kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says on stderr of settings that it does not take; it makes no folder."""
    out = Path(settings["data"]).parent / "out"
    config = Path(settings["data"]).parent / "run.yaml"
    config.write_text(yaml.safe_dump({"model": "/nowhere/model", "out": str(out), "device": "cpu", **settings}))
    monkeypatch.setattr(sys, "argv", ["rlaif", "train", kind, str(config)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert said.out == ""
    assert ended.value.code == 2, said.err
    assert not out.exists()
    return said.err


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named_before_a_model_loads(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, rows, said = BAD[case]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    err = refused(kind, {"data": str(path)}, monkeypatch, capsys)
    assert err.startswith(f"rlaif: {path}")
    assert said in err
    assert err.count("\n") == 1


def test_bad_data_of_a_later_stage_or_held_out_is_found_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", [PAIR])
    bad = write_jsonl(tmp_path / "bad.jsonl", [PAIR, {**PAIR, "chosen": None}])
    for settings in (
        {"data": str(good), "stages": [{}, {"data": str(bad)}]},
        {"data": str(good), "eval": str(bad)},
    ):
        assert f"{bad} line 2: column 'chosen'" in refused("dpo", settings, monkeypatch, capsys)
    assert "no such file" in refused("dpo", {"data": str(tmp_path / "missing.jsonl")}, monkeypatch, capsys)
    assert "leaves one side empty" in refused("dpo", {"data": str(good), "eval_share": 0.5}, monkeypatch, capsys)


@pytest.mark.parametrize(("kind", "row"), [("sft", ANSWER), ("reward", PAIR), ("dpo", TALK), ("kto", PAIR)])
def test_rows_that_are_all_too_long_are_found_by_the_tokenizer_alone(
    kind: str, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")  # no weights there, nor a config
    path = write_jsonl(tmp_path / "train.jsonl", [row, {**row, "prompt": row["prompt"]}])
    settings = {"data": str(path), "model": str(tmp_path / "tokenizer"), "max_length": 8}
    err = refused(kind, settings, monkeypatch, capsys)
    assert f"{path}: all " in err
    assert "rows are longer than max_length, 8 tokens" in err


@pytest.mark.parametrize("bad", [{"chosen": ""}, {"chosen": "B", "rejected": "B"}, {"soft_label": 2.0}, {"prompt": None}])
def test_bad_rows_may_be_left_out_and_are_counted(tmp_path: Path, bad: Row) -> None:
    good = {**PAIR, "soft_label": 0.5}
    path = write_jsonl(tmp_path / "train.jsonl", [good, {**good, **bad}, {**good, "prompt": "Another?"}])
    with pytest.raises(UsageError, match="line 2"):
        data.pairs(str(path), wanted=["soft_label"])
    found = data.pairs(str(path), wanted=["soft_label"], drop_bad=True)
    assert [row["prompt"] for row in found.rows] == [PAIR["prompt"], "Another?"]
    assert found.facts()["left_out"] == {"that cannot be trained on": 1}
    only = write_jsonl(tmp_path / "bad.jsonl", [{**good, **bad}])
    with pytest.raises(UsageError, match="no rows that can be trained on, of 1"):
        data.pairs(str(only), wanted=["soft_label"], drop_bad=True)


def test_a_missing_column_is_no_bad_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [PAIR, {"prompt": "Q", "chosen": "A"}])
    with pytest.raises(UsageError, match="line 2: no column 'rejected'"):
        data.pairs(str(path), drop_bad=True)


# ---------------------------------------------------------------- both forms

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=20).filter(
    lambda text: text.strip() and not any(mark in text for mark in ("Human:", "Assistant:", "System:"))
)
TURN = WORDS.map(str.strip).filter(bool)
TALKS = (
    st.lists(TURN, min_size=1, max_size=5)
    .filter(lambda turns: len(turns) % 2 == 1)
    .map(lambda turns: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)])
)
SYSTEMS = st.none() | TURN.map(lambda text: {"role": "system", "content": text})
PROMPTS = WORDS | st.builds(lambda system, turns: [system, *turns] if system else turns, SYSTEMS, TALKS)
LABELLED = st.builds(
    lambda n, prompt, a, b, soft: {
        "id": str(n),
        "prompt": prompt,
        "response_a": a,
        "response_b": b,
        "status": "ok",
        "soft_label": soft,
        "label": "a" if soft > 0.5 else "b",
    },
    st.integers(0, 9),
    PROMPTS,
    WORDS,
    WORDS,
    st.floats(0, 1).filter(lambda soft: abs(soft - 0.5) > 1e-6),
).filter(lambda row: row["response_a"].strip() != row["response_b"].strip())


@given(rows=st.lists(LABELLED, min_size=1, max_size=4))
def test_both_forms_of_the_same_pairs_are_the_same_rows(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as place:
        files = {}
        for form in ("plain", "conversational"):
            made = list(training_pairs(rows, PairSettings(conversational=form == "conversational")))
            files[form] = str(write_jsonl(Path(place) / f"{form}.jsonl", made))
        for wanted in ("plain", "conversational"):
            own = data.pairs(files[wanted], wanted, wanted=["soft_label"])  # type: ignore[arg-type]
            assert own.rows == data.pairs(files[wanted], "auto", wanted=["soft_label"]).rows
            assert own.conversational == (wanted == "conversational")
            for file in files.values():
                assert data.pairs(file, wanted, wanted=["soft_label"]).rows == own.rows  # type: ignore[arg-type]


def test_whole_dialogues_are_pairs_of_their_last_answers(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    path = str(write_jsonl(tmp_path / "hh.jsonl", [{"chosen": f"{start} Because.", "rejected": f"{start} No."}]))
    (row,) = data.pairs(path).rows
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert row["chosen"] == [{"role": "assistant", "content": "Because."}]
    (plain,) = data.pairs(path, "plain").rows
    assert plain["prompt"] + plain["rejected"] == f"{start} No.".strip()


def test_messages_are_a_prompt_and_its_last_answer(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    (row,) = data.answers(str(write_jsonl(tmp_path / "m.jsonl", [{"messages": turns}]))).rows
    assert row == {"prompt": turns[:2], "completion": turns[2:]}


# ---------------------------------------------------------------- parts

SIMPLE = st.lists(st.fixed_dictionaries({"prompt": st.sampled_from("abcdefgh"), "n": st.integers()}), min_size=1, max_size=30)


@given(rows=SIMPLE, share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_held_out_are_whole_prompts_and_nothing_is_lost(rows: list[Row], share: float, seed: int) -> None:
    numbered = [{**row, "n": n} for n, row in enumerate(rows)]
    try:
        kept, held = held_out(Rows("d", numbered), share, seed)
    except UsageError:
        return  # one side would be empty
    assert held
    assert {row["prompt"] for row in kept.rows}.isdisjoint(row["prompt"] for row in held.rows)
    assert sorted(kept.rows + held.rows, key=lambda row: row["n"]) == numbered
    for side in (kept, held):
        assert [row["n"] for row in side.rows] == sorted(row["n"] for row in side.rows)
    fewer = [row for row in numbered if row["prompt"] != numbered[0]["prompt"]]
    try:
        again, _ = held_out(Rows("d", fewer), share, seed)
    except UsageError:
        return
    assert again.rows == [row for row in kept.rows if row in fewer]  # where a prompt goes does not hang on the others


def test_the_share_is_about_that_of_the_prompts() -> None:
    rows = Rows("d", [{"prompt": f"Question {n}?"} for n in range(4000)])
    found = [len(held.rows) / 4000 for seed in range(5) if (held := held_out(rows, 0.2, seed)[1])]
    assert found == pytest.approx([0.2] * 5, abs=0.03)
    assert len(set(found)) > 1
    assert held_out(rows, 0.0, 1) == (rows, None)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), most=st.integers(8, 50))
def test_what_fits_stays_in_order_and_the_rest_is_counted(lengths: list[int], most: int) -> None:
    rows = [{"prompt": "ab", "completion": "x" * length, "n": n} for n, length in enumerate(lengths)]
    encode = encoder(tiny_tokenizer())
    long = [length + 3 > most for length in lengths]  # the prompt's two bytes and the end
    if all(long):
        with pytest.raises(UsageError, match=f"d: all {len(rows)} rows are longer than max_length, {most} tokens"):
            fitting(Rows("d", rows), ["completion"], most, encode)
        return
    found = fitting(Rows("d", rows), ["completion"], most, encode)
    assert found.rows == [row for row, over in zip(rows, long, strict=True) if not over]
    assert found.facts()["left_out"][f"over {most} tokens"] == sum(long)


@pytest.mark.parametrize("row", [PAIR, TALK])
def test_tokens_are_those_of_the_text_that_is_trained_on(row: Row) -> None:
    tokenizer = tiny_tokenizer()
    ids = encoder(tokenizer)(row["prompt"], row["chosen"])
    text = tokenizer.decode(ids)
    if row is PAIR:
        assert text == "Question?Yes<|end|>"
    else:
        assert text == "<|turn|>user: Question?<|end|>\n<|turn|>assistant: Yes<|end|>\n"
