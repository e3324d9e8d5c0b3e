"""The run files of training sets: their sources by hash, who labelled them, what was left out; and what follows from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.cli import app
from rlaif.provenance import labelers, run_of
from rlaif.records import UsageError
from tests.conftest import make_rows, read_jsonl, write_jsonl


def ran(*args: str | Path) -> None:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Comparisons that a labeler with a planted bias labelled; humans agree with all but the first ten of its labels."""
    write_jsonl(tmp_path / "data.jsonl", make_rows(40))
    ran("label", tmp_path / "data.jsonl", "-o", tmp_path / "first.jsonl", "--engine", "mock", "-E", "k=3")
    known = [row["label"] for row in read_jsonl(tmp_path / "first.jsonl")]
    humans = [{"a": "b", "b": "a"}[label] if n < 10 else label for n, label in enumerate(known)]
    rows = [{**row, "human": human} for row, human in zip(make_rows(40), humans, strict=True)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    ran("label", tmp_path / "data.jsonl", "-o", tmp_path / "labels.jsonl", "--engine", "mock", "-E", "k=3")
    return tmp_path / "labels.jsonl"


def test_pairs_tell_their_labeler_and_what_was_left_out(labels: Path) -> None:
    out = labels.with_name("train.jsonl")
    ran("pairs", labels, "-o", out, "--min-confidence", "0.7", "--form", "conversational")
    run = run_of(out)
    settings = json.loads(Path(f"{labels}.run.json").read_text())["settings"]
    assert run["made_by"] == "rlaif pairs"
    assert run["sources"] == [{"source": str(labels), "sha256": sha256(labels), "labeled_by": settings}]
    assert run["settings"] == {"min_confidence": 0.7, "hard": False, "drop_ties": False, "form": "conversational"}
    assert run["sha256"] == sha256(out)
    examples = len(read_jsonl(out))
    assert 0 < examples < 40
    assert (run["rows"], run["examples"], run["left_out"]) == (
        40,
        examples,
        {"below the minimum confidence": 40 - examples},
    )


@pytest.mark.parametrize(
    ("command", "sources", "settings"),
    [
        (("rl-cai", "labels.jsonl", "--mix", "human.jsonl"), ["labels.jsonl", "human.jsonl"], {"ratio": None, "seed": 0}),
        (("judge-on-policy", "labels.jsonl"), ["labels.jsonl"], {"min_confidence": 0.5}),
        (("kto", "labels.jsonl", "--balance", "--seed", "3"), ["labels.jsonl"], {"balance": True, "seed": 3}),
    ],
)
def test_a_built_set_tells_all_of_its_sources(
    labels: Path, command: tuple[str, ...], sources: list[str], settings: dict[str, Any]
) -> None:
    folder = labels.parent
    human = [{"prompt": f"H{n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(3)]
    write_jsonl(folder / "human.jsonl", human)
    ran("build", command[0], *(folder / arg if arg.endswith("l") else arg for arg in command[1:]), "-o", folder / "out.jsonl")
    run = run_of(folder / "out.jsonl")
    assert run["made_by"] == f"rlaif build {command[0]}"
    assert [(own["source"], own["sha256"]) for own in run["sources"]] == [
        (str(folder / name), sha256(folder / name)) for name in sources
    ]
    assert [bool(own["labeled_by"]) for own in run["sources"]] == [name == "labels.jsonl" for name in sources]
    assert settings.items() <= run["settings"].items()
    assert not {"out", "labelled", "judged", "source", "mix"} & run["settings"].keys()
    assert run["examples"] == len(read_jsonl(folder / "out.jsonl"))


def test_each_step_of_rest_has_a_run_file_of_its_own(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "prompt": f"Q{n}?", "response": "A.", "status": "ok", "score": n / 4} for n in range(5)]
    write_jsonl(tmp_path / "scores.jsonl", rows)
    ran("build", "rest", tmp_path / "scores.jsonl", "-o", tmp_path / "t.jsonl", "--thresholds", "0.25,0.75")
    for step in (1, 2):
        path = tmp_path / f"t.{step}.jsonl"
        assert run_of(path)["examples"] == len(read_jsonl(path)) == {1: 4, 2: 2}[step]
        assert run_of(path)["sources"][0]["labeled_by"] is None  # no run file tells who scored them


def test_a_set_made_from_a_set_tells_the_labeler_of_that(labels: Path) -> None:
    pairs, mixed = labels.with_name("pairs.jsonl"), labels.with_name("mixed.jsonl")
    ran("pairs", labels, "-o", pairs)
    plain = [{name: row[name] for name in ("id", "prompt", "chosen", "rejected")} for row in read_jsonl(pairs)]
    write_jsonl(pairs, plain)  # rows that are not those that the run file tells of
    assert run_of(pairs) == {}
    run = json.loads(Path(f"{pairs}.run.json").read_text())
    Path(f"{pairs}.run.json").write_text(json.dumps({**run, "sha256": sha256(pairs)}))
    other = labels.with_name("other.jsonl")
    write_jsonl(other, read_jsonl(labels))  # without a run file: nobody knows who labelled it
    ran("build", "rl-cai", other, "-o", mixed, "--mix", pairs)
    (found,) = labelers([str(mixed)])
    assert (found["data"], found["labels"], found["agreement"]) == (str(mixed), str(labels), None)
    assert found["settings"]["engine"]["engine"] == "mock"


def test_the_agreement_is_that_of_the_labelled_file(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = labels.with_name("train.jsonl")
    monkeypatch.chdir(labels.parent)
    ran("pairs", "labels.jsonl", "-o", "train.jsonl", "--min-confidence", "0.9")
    monkeypatch.chdir("/")  # the name that was given leads nowhere now: the file stands beside the pairs
    (found,) = labelers([str(out), str(out)], "human")
    agreement = found["agreement"]
    assert agreement["column"] == "human"
    assert agreement["accuracy"]["value"] == 0.75
    assert agreement["accuracy"]["n"] == agreement["kappa"]["n"] == 40
    assert agreement["accuracy"]["low"] < 0.75 < agreement["accuracy"]["high"]
    with pytest.raises(UsageError, match=r"labels\.jsonl: .*'nobody'"):
        labelers([str(out)], "nobody")


def test_files_without_a_run_file_have_no_labeler(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [{"prompt": "Q?", "chosen": "A.", "rejected": "B."}])
    assert labelers([str(path), "org/dataset"]) == []
    with pytest.raises(UsageError, match="no run file beside it"):
        labelers([str(path)], "human")
    (tmp_path / "train.jsonl.run.json").write_text("{")
    with pytest.raises(UsageError, match=r"train\.jsonl\.run\.json: cannot be read"):
        labelers([str(path)])


def test_a_folder_in_the_place_of_the_run_file_is_refused_before_anything_is_written(labels: Path) -> None:
    out = labels.with_name("train.jsonl")
    Path(f"{out}.run.json").mkdir()
    with pytest.raises(UsageError, match=r"train\.jsonl\.run\.json: a folder is in the way"):
        ran("pairs", labels, "-o", out)
    assert not out.exists()
