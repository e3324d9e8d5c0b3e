"""What a run tells while it trains: lines of metrics that a kill cannot spoil, and one progress line that is ours."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rlaif.cli import main
from rlaif.train.record import Recorder, lines, take_back, tokens_read
from tests.conftest import read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny


def state(step: int, main: bool = True) -> Any:
    return SimpleNamespace(global_step=step, max_steps=20, epoch=step / 10, is_world_process_zero=main)


def train(recorder: Recorder, steps: range, first: int = 0, main: bool = True) -> None:
    recorder.on_train_begin(None, state(first, main), None)
    for step in steps:
        recorder.on_step_end(None, state(step, main), None)
        recorder.on_log(None, state(step, main), None, {"loss": 1 / step, "epoch": 0.5, "num_tokens": 10.0 * step})
    recorder.on_train_end(None, state(steps[-1], main), None)


def test_each_log_is_a_line_with_its_part_and_step(tmp_path: Path) -> None:
    train(Recorder(tmp_path / "m.jsonl", "stage-1"), range(1, 4))
    assert read_jsonl(tmp_path / "m.jsonl") == [
        {"part": "stage-1", "step": step, "epoch": step / 10, "loss": 1 / step, "num_tokens": 10.0 * step} for step in (1, 2, 3)
    ]


def test_what_says_nothing_of_the_model_is_no_line(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "m.jsonl", "train")
    recorder.on_log(None, state(9), None, {"train_runtime": 3.0, "train_loss": 0.1, "epoch": 1.0, "total_flos": 1e9})
    assert not (tmp_path / "m.jsonl").exists()


def test_only_the_main_process_writes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Recorder(tmp_path / "m.jsonl", "train"), range(1, 4), main=False)
    assert not (tmp_path / "m.jsonl").exists()
    assert capsys.readouterr() == ("", "")


def test_a_loss_that_is_no_number_shows(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "m.jsonl", "train")
    for loss in (math.nan, math.inf):
        recorder.on_log(None, state(1), None, {"loss": loss})
    assert [row["loss"] for row in read_jsonl(tmp_path / "m.jsonl")] == ["nan", "inf"]


@given(killed=st.integers(1, 20), checkpoint=st.integers(1, 20), cut=st.integers(0, 30))
def test_going_on_from_a_checkpoint_the_lines_are_those_of_one_run(
    killed: int, checkpoint: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("record")
    one, two = place / "one.jsonl", place / "two.jsonl"
    checkpoint = min(checkpoint, killed)
    train(Recorder(one, "train"), range(1, 21))
    train(Recorder(two, "train"), range(1, killed + 1))
    with two.open("a") as file:  # the kill came while a line was written
        file.write(json.dumps({"part": "train", "step": killed + 1})[:cut])
    take_back(two, "train", checkpoint)
    assert tokens_read(two, "train", checkpoint) == 10 * checkpoint
    if checkpoint < 20:
        train(Recorder(two, "train"), range(checkpoint + 1, 21), first=checkpoint)
    assert two.read_text() == one.read_text()


def test_a_part_that_begins_anew_has_no_lines_left_and_others_keep_theirs(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for part in ("stage-1", "stage-2"):
        recorder = Recorder(path, part)
        recorder.on_train_begin(None, state(0), None)
        recorder.on_log(None, state(0), None, {"eval_loss": 2.0})  # before the first step
        recorder.close()
    take_back(path, "stage-2", 0)
    assert [line["part"] for line in lines(path)] == ["stage-1"]
    assert tokens_read(path, "stage-1", 5) == 0


# ---------------------------------------------------------------- the progress line


def test_without_a_terminal_there_is_one_line_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Recorder(tmp_path / "m.jsonl", "train"), range(1, 11))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("train 10/20 · loss 0.1000 · ")
    assert "steps/s · " in err
    assert err.endswith(" s left\n")


def test_lines_come_in_time_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlaif.progress.EVERY", 0.0)
    train(Recorder(tmp_path / "m.jsonl", "train"), range(1, 4))
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == "train 0/20"


def test_on_a_terminal_a_bar_shows_loss_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr("rlaif.progress.Console", lambda stderr: console)
    train(Recorder(tmp_path / "m.jsonl", "train"), range(1, 11))
    shown = screen.getvalue()
    assert "10/20" in shown
    assert "loss 0.1000" in shown
    assert "steps/s" in shown
    assert "0:00:" in shown


def test_the_command_says_nothing_but_its_progress_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "tiny")
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"Q{n}?", "chosen": "Yes", "rejected": "No"} for n in range(8)])
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"model": str(model), "data": str(data), "out": str(tmp_path / "out"), "device": "cpu"}))
    monkeypatch.setattr(sys, "argv", ["rlaif", "train", "dpo", str(config), "--set", "log_steps=1"])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(rf"{tmp_path}/out/model: 2 steps in \d+ s\n", out)
    assert re.fullmatch(r"train 2/2 · loss \d\.\d{4} · [\d.]+ steps/s\n", err)
