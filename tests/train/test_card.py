"""The model card: it tells data, labeler and agreement as they are, breaks by no text, and names no folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from rlaif.cli import app
from rlaif.records import UsageError
from rlaif.train.card import LONGEST, LOSSES, UNSEEN, figures_table, front_matter, kind_of, nameless, table, text, write_card
from rlaif.train.config import LOSSES as ALL_LOSSES
from rlaif.train.config import Preference, Reward, Sft
from rlaif.train.run import run
from tests.conftest import make_rows, read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny

MARKDOWN = MarkdownIt("commonmark").enable("table")


def tables(markdown: str) -> list[list[list[str]]]:
    """The tables of a text as a Markdown reader sees them: rows of cells as plain text."""
    found: list[list[list[str]]] = []
    cell = False
    for token in MARKDOWN.parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            cell = True
        elif token.type == "inline" and cell:
            assert all(child.type in ("text", "text_special") for child in token.children or ()), token
            found[-1][-1].append("".join(child.content for child in token.children or ()))
            cell = False
    return found


def ran(*args: str | Path) -> None:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of labelled comparisons, of which humans say the opposite in every fourth row, pairs of them, and a model."""
    folder = tmp_path_factory.mktemp("made")
    write_jsonl(folder / "data.jsonl", make_rows(40))
    ran("label", folder / "data.jsonl", "-o", folder / "bare.jsonl", "--engine", "mock", "-E", "k=2")
    rows = read_jsonl(folder / "bare.jsonl")
    other = {"a": "b", "b": "a"}
    humans = [other[row["label"]] if n % 4 == 0 else row["label"] for n, row in enumerate(rows)]
    write_jsonl(folder / "data.jsonl", [{**row, "human": human} for row, human in zip(make_rows(40), humans, strict=True)])
    ran("label", folder / "data.jsonl", "-o", folder / "labels.jsonl", "--engine", "mock", "-E", "k=2")
    ran("pairs", folder / "labels.jsonl", "-o", folder / "train.jsonl", "--min-confidence", "0.6")
    save_tiny(folder / "tiny")
    return folder


def config(made: Path, out: Path, **changes: Any) -> Reward:
    given = {"name": "a run", "model": str(made / "tiny"), "data": str(made / "train.jsonl"), "out": str(out), "max_steps": 2}
    return Reward(**{**given, "batch_size": 2, "device": "cpu", "log_steps": 1, "human": "human", **changes})


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_a_card_that_tells_data_labeler_and_agreement(made: Path, tmp_path: Path) -> None:
    report = run("reward", config(made, tmp_path / "out", description="For | the test"))
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["rlaif", "trl", "reward-model"],
    }  # a local model is no base_model
    for folder in (made, tmp_path):
        assert str(folder) not in card
    assert "s3cret" not in card
    cells = [cell for found in tables(card) for row in found for cell in row]
    assert hashlib.sha256((made / "train.jsonl").read_bytes()).hexdigest() in cells
    rows = {row[0]: row[1:] for found in tables(card) for row in found}
    assert rows["stage-1, training"][:2] == ["train.jsonl", str(len(read_jsonl(made / "train.jsonl")))]
    assert rows["engine.planted.k"] == ["2"]
    assert rows["batch_size"] == ["2"]
    assert [row[1] for found in tables(card) for row in found if row[0] == "train"].count("loss") == 1

    (labeler,) = json.loads((tmp_path / "out" / "run.json").read_text())["labeler"]
    assert labeler == report["labeler"][0]
    accuracy = labeler["agreement"]["accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (0.75, 40)
    assert 0.5 < accuracy["low"] < 0.75 < accuracy["high"] < 1
    assert labeler["settings"]["engine"]["model"] == "planted"
    assert rows["accuracy"] == ["0.75", f"{accuracy['low']:.4g} to {accuracy['high']:.4g}", "40"]
    assert float(rows["kappa"][0]) == pytest.approx(labeler["agreement"]["kappa"]["value"], abs=1e-3)
    assert {path.name for path in (tmp_path / "out" / "plots").iterdir()} >= {"loss.svg", "accuracy.svg", "margins.svg"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("gone", "which is not there any more"),
        ("changed", "labels.jsonl has changed since"),
        ("rows changed", "no run file beside it says which labelled file"),
        ("no run file", "no run file beside it says which labelled file"),
        ("no column", "labels.jsonl: .*'people'"),
    ],
)
def test_an_agreement_that_cannot_be_measured_stops_the_run_before_it_begins(
    made: Path, tmp_path: Path, change: str, said: str
) -> None:
    labels, pairs = tmp_path / "labels.jsonl", tmp_path / "train.jsonl"
    for path in (labels, Path(f"{labels}.run.json")):
        path.write_bytes((made / path.name).read_bytes())
    ran("pairs", labels, "-o", pairs)
    if change == "gone":
        labels.unlink()
    elif change == "no run file":
        Path(f"{pairs}.run.json").unlink()
    elif change != "no column":
        path = labels if change == "changed" else pairs
        write_jsonl(path, read_jsonl(path)[1:])
    column = "people" if change == "no column" else "human"
    with pytest.raises(UsageError, match=said):
        run("reward", config(made, tmp_path / "out", data=str(pairs), model="nowhere/model", human=column))
    assert not (tmp_path / "out").exists()


def test_data_whose_labeler_is_unknown_says_so(tmp_path: Path) -> None:
    write_card(tmp_path / "README.md", report())
    assert "No run file beside the data tells who labelled it." in (tmp_path / "README.md").read_text()


# ------------------------------------------------------------ any report


def report(**changes: Any) -> dict[str, Any]:
    own = Preference(name="n", data="a.jsonl", out="o", model="org/model")
    facts = {"source": "a.jsonl", "sha256": "0" * 64, "rows": 3, "left_out": {}}
    return {
        "kind": "dpo",
        "settings": own.model_dump(mode="json"),
        "data": {"stage-1": {"train": facts, "held_out": None}},
        "parts": [{"name": "train", "steps": 2, "seconds": 1.0}],
        "versions": {"rlaif": "0"},
        "evaluation": None,
        **changes,
    }


ODD = st.text(st.characters(), max_size=40) | st.text("|\\`*_[]<>&#-~\n\r\t $!:.", max_size=12)


def plain(value: str) -> str:
    """What a reader should see of a text."""
    line = UNSEEN.sub("\ufffd", " ".join(nameless(value).split()))
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


@given(st.lists(st.tuples(ODD, ODD), max_size=3))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_a_table(rows: list[tuple[str, str]]) -> None:
    (found,) = tables(table(("left", "right"), rows))
    assert found[0] == ["left", "right"]
    assert found[1:] == [[plain(left).strip(), plain(right).strip()] for left, right in rows]


@given(ODD, ODD, ODD)
@settings(max_examples=60, deadline=None)
def test_no_text_breaks_a_card(tmp_path_factory: pytest.TempPathFactory, name: str, value: str, label: str) -> None:
    path = tmp_path_factory.getbasetemp() / "README.md"
    given_ = report()
    given_["settings"] |= {"name": name, "description": value, "model": value, "beta": value}
    given_["data"] = {
        "stage-1": {"train": {"source": name, "sha256": None, "rows": 1, "left_out": {value: 2}}, "held_out": None}
    }
    given_["labeler"] = [{"data": name, "labels": value, "settings": {label: value}, "agreement": {"column": label}}]
    given_["evaluation"] = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 7}, value or "x": {name or "y": 1}}
    write_card(path, given_)
    text_ = path.read_text(encoding="utf-8")
    opening, front, body = text_.split("---\n", 2)
    assert opening == ""
    assert yaml.safe_load(front) == front_matter(given_)
    assert [token.content for token in MARKDOWN.parse(body) if token.type == "fence"]  # how to load it comes last, and is there
    heads = [row[0] for row in tables(body)]
    for head in (["part", "file", "rows", "left out", "SHA-256"], ["setting", "value"], ["package", "version"]):
        assert head in heads
    assert all(len({len(row) for row in found}) == 1 for found in tables(body))


@given(st.from_regex(r"\A[A-Za-z0-9._~|:#{}\[\]'\" -]{1,20}(/[A-Za-z0-9._:#' -]{1,20})?\Z"))
def test_the_front_matter_is_what_was_put_in(model: str) -> None:
    given_ = report()
    given_["settings"]["model"] = model
    front = front_matter(given_)
    assert yaml.safe_load(yaml.safe_dump(front, sort_keys=False)) == front
    assert front.get("base_model") in (None, model)


@pytest.mark.parametrize(
    ("given_", "left"),
    [
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("/home/me/my rows.jsonl", "my rows.jsonl"),
        ("C:\\Users\\me\\rows.jsonl", "rows.jsonl"),
        ("read from /home/me/rows.jsonl, and /etc", "read from rows.jsonl, and etc"),
        ("file:///home/me/x", "x"),
        ("path=/home/me/x:/home/you/y", "path=y"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("https://host:80/v1/models", "https://host:80/v1/models"),
        ("org/model", "org/model"),
        ("either / or, 1/2, and/or", "either / or, 1/2, and/or"),
    ],
)
def test_a_path_is_told_by_its_name_alone(given_: str, left: str) -> None:
    assert nameless(given_) == left


@given(st.lists(st.from_regex(r"\A[a-z0-9_-]{1,8}\Z"), min_size=2, max_size=4), st.sampled_from(["", "see ", "(", "x=", "'"]))
def test_no_folder_of_an_absolute_path_is_told(parts: list[str], before: str) -> None:
    path = "/" + "/".join(parts)
    assert text(f"{before}{path}") == text(f"{before}{parts[-1]}")


# ------------------------------------------------------------ what it says


def test_figures_are_told_with_their_intervals_however_they_are_nested() -> None:
    found = {
        "accuracy": {"value": 0.8125, "low": 0.7, "high": 0.9, "n": 64},
        "heads": {"safe": {"ece": {"value": None, "low": None, "high": None, "n": 0}}},
        "clear": True,
        "losses": [{"part": "stage-1", "loss": {"dpo": 1.0}, "note": None}],
        "bins": [{"low": 0.5, "n": 3}, {"low": 0.6, "n": 4}],
        "words": "held out",
    }
    (rows,) = tables(figures_table(found))
    assert rows[1:] == [
        ["accuracy", "0.8125", "0.7 to 0.9", "64"],
        ["heads.safe.ece", "", "", "0"],
        ["clear", "yes", "", ""],
        ["losses.stage-1.part", "stage-1", "", ""],
        ["losses.stage-1.loss.dpo", "1", "", ""],
        ["words", "held out", "", ""],
    ]


def test_every_loss_has_its_words_and_its_paper() -> None:
    assert set(LOSSES) == set(ALL_LOSSES)
    assert all("arXiv" in words for name, words in LOSSES.items() if name != "sft")
    mixed = Preference(name="n", data="a", out="o", loss={"dpo": 1.0, "sft": 0.25}).model_dump(mode="json")
    assert "1 · direct preference optimization (arXiv 2305.18290) + 0.25 · the likelihood" in kind_of(report(settings=mixed))
    distilled = Sft(name="n", data="a", out="o", context="urial").model_dump(mode="json")
    assert "distilling a context" in kind_of(report(kind="sft", settings=distilled))


def test_the_base_model_is_told_unless_it_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given_ = report()
    assert front_matter(given_)["base_model"] == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert "base_model" not in front_matter(given_)
    given_["settings"]["model"] = "embedded"
    assert front_matter(given_)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    given_["settings"]["lora"] = {"merge": False}
    assert front_matter(given_)["library_name"] == "peft"


def test_stages_are_told_without_their_files_folders(tmp_path: Path) -> None:
    own = Preference(name="n", out="o", stages=({"data": "/x/a.jsonl", "beta": 0.3}, {"data": "b.jsonl"}), max_steps=1)
    write_card(tmp_path / "README.md", report(settings=own.model_dump(mode="json")))
    rows = {row[0]: row[1:] for found in tables((tmp_path / "README.md").read_text()) for row in found}
    assert rows["stages.1.beta"] == ["0.3"]
    assert "/x/" not in (tmp_path / "README.md").read_text()
