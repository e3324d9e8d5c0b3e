"""A run's folder: one run, one process at a time, and nothing else's; a run goes on with the same settings and data only."""

from __future__ import annotations

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.records import UsageError
from rlaif.train.config import Reward
from rlaif.train.data import Rows
from rlaif.train.folder import Folder, hashes
from tests.conftest import write_jsonl
from tests.engines.tiny import save_tiny

ROWS = [{"prompt": f"Question {n}?", "chosen": f"Answer {n}", "rejected": "No"} for n in range(8)]
HASHES = {"stage-1/train": "a" * 64, "stage-1/held_out": None}


def folder(path: Path, resume: bool = False, hashed: dict[str, str | None] | None = None, **settings: Any) -> Folder:
    given = Reward(data="data.jsonl", out=str(path), **settings).model_dump(mode="json")
    return Folder(path, given, hashed or HASHES, resume)


def begun(path: Path, **settings: Any) -> Path:
    with folder(path, **settings).held():
        (path / "parts").mkdir(exist_ok=True)
    return path


def finished(path: Path) -> Path:
    begun(path)
    (path / "model").mkdir()
    (path / "run.json").write_text('{"kind": "reward"}')
    return path


def test_a_new_run_begins_in_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "new" / "inner", tmp_path / "empty"):
        assert folder(path).report() is None
        begun(path)
        assert (path / "config.yaml").is_file()
        assert json.loads((path / "data.json").read_text()) == HASHES


def test_without_resume_a_run_is_left_alone(tmp_path: Path) -> None:
    for path in (begun(tmp_path / "begun"), finished(tmp_path / "finished")):
        with pytest.raises(UsageError, match="holds a run already: --resume"):
            folder(path).report()
        with pytest.raises(UsageError, match="holds a run already"), folder(path).held():
            pass


def test_resume_goes_on_with_what_was_begun(tmp_path: Path) -> None:
    path = begun(tmp_path / "run", learning_rate=1e-5, stages=({"epochs": 0.1},), lora={"targets": ("q_proj", "v_proj")})
    again = folder(path, resume=True, learning_rate=1e-5, stages=({"epochs": 0.1},), lora={"targets": ("q_proj", "v_proj")})
    assert again.report() is None
    with again.held():
        pass


def test_resume_needs_a_run(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError, match="there is no run to resume"):
            folder(path, resume=True).report()
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = begun(tmp_path / "run", learning_rate=1e-5)
    with pytest.raises(UsageError, match=r"other settings \(learning_rate, seed\)"):
        folder(path, resume=True, learning_rate=2e-5, seed=3).report()


def test_names_and_the_folders_own_place_may_change(tmp_path: Path) -> None:
    path = begun(tmp_path / "run")
    moved = path.rename(tmp_path / "moved")
    assert folder(moved, resume=True, name="other", description="words").report() is None


@pytest.mark.parametrize("end", ["begun", "finished"])
def test_changed_data_is_noticed(end: str, tmp_path: Path) -> None:
    path = begun(tmp_path / "run") if end == "begun" else finished(tmp_path / "run")
    with pytest.raises(UsageError, match="the data has changed since the run began"):
        folder(path, resume=True, hashed={**HASHES, "stage-1/train": "b" * 64}).report()


def test_a_finished_run_gives_its_report(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    assert folder(path, resume=True).report() == {"kind": "reward"}
    (path / "run.json").unlink()  # as where it was killed before the end
    assert folder(path, resume=True).report() is None


def test_strangers_files_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "config.yaml").write_text("out: .")
    with pytest.raises(UsageError, match="not empty, and holds no run"):
        folder(tmp_path).report()
    with pytest.raises(UsageError, match="is a file; out is a folder"):
        folder(tmp_path / "thesis.tex").report()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UsageError, match="cannot be written to"), folder(path).held():
            pass


def test_a_run_that_failed_before_its_first_step_may_begin_otherwise(tmp_path: Path) -> None:
    for seed in (1, 2):
        with folder(tmp_path / "run", seed=seed, hashed={"stage-1/train": str(seed)}).held():
            pass
    with folder(tmp_path / "run", resume=True, seed=3, hashed={"stage-1/train": "3"}).held():
        pass
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 3
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {"stage-1/train": "3"}


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "run.json"])
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    (path / name).write_text("{")
    with pytest.raises(UsageError, match=name):
        folder(path, resume=True).report()


# ---------------------------------------------------------------- one process at a time


def _hold(path: Path, line: Connection) -> None:
    with folder(path).held():
        line.send("held")
        line.recv()


def test_another_process_has_it_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path / "run", there), daemon=True)
    other.start()
    assert here.poll(30)
    for resume in (False, True):
        with pytest.raises(UsageError, match="another process trains here"), folder(tmp_path / "run", resume).held():
            pass
    other.kill()
    other.join()
    with folder(tmp_path / "run", resume=True).held():
        pass


def test_two_that_begin_at_once_do_not_mix(tmp_path: Path) -> None:
    first, second = folder(tmp_path / "run", seed=1), folder(tmp_path / "run", seed=2)
    assert first.report() is None
    assert second.report() is None
    with first.held():
        (tmp_path / "run" / "parts").mkdir()
    with pytest.raises(UsageError, match="holds a run already"), second.held():
        pass


# ---------------------------------------------------------------- hashes of rows


def test_each_change_of_the_rows_changes_their_hash() -> None:
    def hashed(rows: list[dict[str, Any]], held: list[dict[str, Any]] | None = None) -> str:
        return json.dumps(hashes({"stage-1": (Rows("d", rows), Rows("d", held) if held else None)}))

    changes = [
        hashed(ROWS),
        hashed(ROWS[:-1]),
        hashed(ROWS[::-1]),
        hashed([{**ROWS[0], "chosen": "Other"}, *ROWS[1:]]),
        hashed([{**row, "soft_label": 1.0} for row in ROWS]),
        hashed(ROWS[1:], ROWS[:1]),
    ]
    assert len(set(changes)) == len(changes)
    assert hashed([dict(reversed(row.items())) for row in ROWS]) == changes[0]


# ---------------------------------------------------------------- whole runs


def test_a_whole_run_keeps_to_this(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif.train.run import run

    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    config = Reward(model=str(save_tiny(tmp_path / "tiny")), data=str(data), out=str(tmp_path / "run"), device="cpu")
    report = run("reward", config)

    def loading(*_: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("rlaif.train.reward.trainer", loading)
    monkeypatch.setattr("rlaif.train.run.load_tokenizer", loading)
    assert run("reward", config, resume=True) == json.loads(json.dumps(report))
    with pytest.raises(UsageError, match="holds a run already"):
        run("reward", config)
    with pytest.raises(UsageError, match="epochs"):
        run("reward", config.changed(epochs=2), resume=True)
    write_jsonl(data, ROWS[:-1])
    with pytest.raises(UsageError, match="the data has changed"):
        run("reward", config, resume=True)
