"""Pipelines at work: what is done again when something changes, by counting; kills, interrupts, two at once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif.pipeline import recipe
from rlaif.pipeline.child import Steps
from rlaif.pipeline.lineage import Lineage
from rlaif.pipeline.status import labelers, render, trace
from rlaif.pipeline.work import HELD, Work
from rlaif.records import RlaifError, UsageError
from rlaif.runner import StoppedError
from rlaif.yamlfile import shipped
from tests.conftest import clean_env, cli, make_rows, read_jsonl, write_jsonl
from tests.pipeline.conftest import Run
from tests.server import Server

PIPELINE = """
description: "Two labelers on the same rows"
settings: {judge: judge.yaml, other: other.yaml, confidence: 0.5, count: 8}
steps:
  label: label rows.jsonl -o labels.jsonl --labeler ${judge} --limit ${count}
  other: label rows.jsonl -o others.jsonl --labeler ${other} --limit ${count}
  agreement: align labels.jsonl --human human -o agreement.json
  pairs: pairs labels.jsonl -o train.jsonl --min-confidence ${confidence}
  check: check train.jsonl -o check.json
  report: report labels.jsonl others.jsonl -o pages/report.html
"""


@pytest.fixture
def asked(tmp_path: Path, server: Server) -> Path:
    """The pipeline, whose labelers are a real server: its requests are counted."""
    rows = [{**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b"} for row in make_rows(10)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for name, own in (("judge", "general"), ("other", "helpful-base")):
        (tmp_path / f"{name}.yaml").write_text(f"engine: openai\nbase_url: {server.url}\nmodel: planted\ntemplate: {own}\n")
    (tmp_path / "p.yaml").write_text(PIPELINE)
    return tmp_path / "p.yaml"


def begun(lineage: Lineage) -> dict[str, str]:
    """When each step was begun last."""
    return {name: f"{own['started_at']} {own['seconds']} {own['key']}" for name, own in lineage.steps.items()}


def ran(work: Work, steps: Steps) -> set[str]:
    """The steps that a run does, by the lines that it says."""
    told: list[str] = []
    work._say = told.append  # type: ignore[method-assign]
    work.run(steps)
    heads = [line for line in told if line.startswith("[")]
    assert len(heads) == len(work.pipeline.steps)
    return {line.split("] ")[1].split(":")[0] for line in heads if "done before" not in line}


def again(file: Path, folder: Path, steps: Steps, *changes: str, anew: str | None = None) -> set[str]:
    read = recipe.read(file, folder, None, changes)
    return ran(Work(read, folder, frozenset(read.after(anew)) if anew else frozenset()), steps)


def test_exactly_the_steps_that_depend_on_a_change_are_done_again(asked: Path, steps: Steps, server: Server) -> None:
    folder = asked.parent / "out"
    everything = {"label", "other", "agreement", "pairs", "check", "report"}
    assert again(asked, folder, steps) == everything
    assert len(server.bodies) == 2 * 2 * 8  # two labelers, both orders, eight rows
    assert again(asked, folder, steps) == set()

    assert again(asked, folder, steps, "confidence=0.6") == {"pairs", "check"}
    assert again(asked, folder, steps) == {"pairs", "check"}
    assert len(server.bodies) == 32  # nothing was asked

    judge = asked.parent / "judge.yaml"
    judge.write_text(judge.read_text().replace("general", "helpful-detailed"))
    assert again(asked, folder, steps) == everything - {"other", "check"}  # of which the same training set came
    assert len(server.bodies) == 32 + 16

    assert again(asked, folder, steps, "count=10") == everything
    assert len(server.bodies) == 48 + 2 * 2 * 2  # only the two new rows, of each labeler

    judge.write_text(judge.read_text() + "\n# a word\n")  # another file, the same labels: what follows from them stays
    assert again(asked, folder, steps, "count=10") == {"label"}
    assert len(server.bodies) == 56


def test_a_changed_file_is_noticed_wherever_it_is(asked: Path, steps: Steps) -> None:
    folder = asked.parent / "out"
    template, judge = asked.parent / "own.jinja", asked.parent / "judge.yaml"
    shutil.copy(Path(__file__).parents[2] / "prompts" / "pairwise" / "general.jinja", template)
    judge.write_text(judge.read_text().replace("template: general", "template: own.jinja"))
    again(asked, folder, steps)

    template.write_text(template.read_text().replace("{% block", " {% block", 1))  # named by a file that is named
    assert "label" in again(asked, folder, steps)

    rows = read_jsonl(asked.parent / "rows.jsonl")
    write_jsonl(asked.parent / "rows.jsonl", [{**rows[0], "response_a": "Another one."}, *rows[1:]])
    assert "rows.jsonl has changed since" in render(Lineage.load(folder))
    assert "it has CHANGED since" in trace(Lineage.load(folder), "train.jsonl")
    assert {"label", "other"} <= again(asked, folder, steps)
    assert "CHANGED" not in trace(Lineage.load(folder), "train.jsonl")

    made = folder / "train.jsonl"
    whole = made.read_bytes()
    made.write_bytes(whole[:-20])  # an output that somebody else wrote to
    assert "train.jsonl has changed since" in render(Lineage.load(folder))
    assert again(asked, folder, steps) == {"pairs"}
    assert made.read_bytes() == whole


def test_from_a_step_on_everything_that_depends_on_it_is_done_again(asked: Path, steps: Steps) -> None:
    folder = asked.parent / "out"
    again(asked, folder, steps)
    assert again(asked, folder, steps, anew="pairs") == {"pairs", "check"}
    with pytest.raises(UsageError, match="no step 'nothing': choose one of label"):
        again(asked, folder, steps, anew="nothing")


def test_a_failed_step_stops_the_run_which_goes_on_when_it_can(asked: Path, steps: Steps, server: Server) -> None:
    folder = asked.parent / "out"
    server.key = "another"
    with pytest.raises(RlaifError, match=r"^step label: the server refused the key"):
        again(asked, folder, steps)
    lineage = Lineage.load(folder)
    assert lineage.steps["label"]["status"] == "failed"
    assert list(lineage.steps) == ["label"]
    shown = render(lineage)
    assert "refused the key" in shown
    assert shown.count("waiting") == 5
    server.key = None
    assert len(again(asked, folder, steps)) == 6
    assert Lineage.load(folder).steps["label"]["error"] is None


def test_the_lineage_names_labeler_agreement_and_every_input(asked: Path, steps: Steps, run: Run) -> None:
    lineage = run(asked, asked.parent / "out")
    text = trace(lineage, "train.jsonl")
    assert lineage.ancestors("train.jsonl") == ["label", "pairs"]
    figures = json.loads((asked.parent / "out" / "agreement.json").read_text())
    accuracy = next(own for own in figures if not own["baseline"])["metrics"]["accuracy"]["value"]
    assert f"agrees with human in {accuracy:.3f}" in text
    assert "the same template and knobs" in text
    (own,) = labelers(lineage, ["label"])
    assert own["settings"]["engine"]["model"] == "planted"
    for path, told in lineage.steps["label"]["inputs"].items():
        assert f"input {path}  sha256 {told['sha256']}" in text
    assert set(lineage.steps["label"]["inputs"]) == {"../rows.jsonl", "../judge.yaml"}
    with pytest.raises(UsageError, match=r"no step has made rows\.jsonl; they have made labels\.jsonl"):
        trace(lineage, "rows.jsonl")


def test_a_labeler_that_was_not_measured_is_said_to_be_none(asked: Path, run: Run) -> None:
    asked.write_text(PIPELINE.replace("labels.jsonl --human", "others.jsonl --human"))
    lineage = run(asked, asked.parent / "out")
    text = trace(lineage, "train.jsonl")
    assert "with other templates or knobs" in text  # the same model was, with another template
    (asked.parent / "rest").mkdir()
    asked.write_text(PIPELINE.replace("  agreement: align labels.jsonl --human human -o agreement.json\n", ""))
    assert "was not measured" in trace(run(asked, asked.parent / "other"), "train.jsonl")


def test_nothing_that_is_written_down_holds_a_path_of_this_machine(asked: Path, run: Run) -> None:
    lineage = run(asked, asked.parent / "out", [f"judge={asked.parent / 'judge.yaml'}"])
    assert str(asked.parent) not in (lineage.folder / "lineage.json").read_text()
    told = [*lineage.folder.glob("*.run.json"), lineage.folder / ".hashes.json"]
    assert str(asked.parent) not in "".join(path.read_text() for path in told)


def test_a_run_in_a_folder_of_somebody_else_is_refused(asked: Path, run: Run) -> None:
    folder = asked.parent / "out"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="the folder is not empty, and no pipeline has run there"):
        run(asked, folder)
    with pytest.raises(UsageError, match="is a file"):
        run(asked, asked)


def test_of_two_runs_in_one_folder_the_second_is_told(asked: Path, run: Run) -> None:
    folder = asked.parent / "out"
    folder.mkdir()
    with (folder / HELD).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cli("run", asked, "-o", folder)
        assert done.returncode == 2
        assert "another process runs there" in done.stderr
    run(asked, folder)


# ---------------------------------------------------------------- kills

TRAINED = """
description: "Labels, pairs, a model, its answers"
settings: {model: ./tiny, steps: 3}
steps:
  label: label rows.jsonl -o labels.jsonl --engine mock -E latency=0.02 --concurrency 4
  pairs: pairs labels.jsonl -o train.jsonl --form conversational
  dpo: >-
    train dpo dpo -o dpo --set data=train.jsonl --set model=${model} --set eval_share=0 --set max_steps=${steps}
    --set batch_size=2 --set accumulate=1 --set save_steps=1 --set max_length=256
  sample: sample rows.jsonl -o answers.jsonl --engine transformers --model dpo/model --max-tokens 8 -E dtype=fp32
  report: report dpo -o report.html
"""


@pytest.fixture
def trained(tmp_path: Path, tiny: Path) -> Path:
    rows = [{**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b"} for row in make_rows(12)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    shutil.copytree(tiny, tmp_path / "tiny")
    (tmp_path / "p.yaml").write_text(TRAINED)
    return tmp_path / "p.yaml"


@contextlib.contextmanager
def started(file: Path, folder: Path, *changes: str) -> Iterator[subprocess.Popen[str]]:
    told = [word for change in changes for word in ("--set", change)]
    words = [sys.executable, "-m", "rlaif.cli", "run", str(file), "-o", str(folder), *told]
    env = clean_env({"OMP_NUM_THREADS": "1"})
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(folder: Path, step: str, process: subprocess.Popen[str]) -> None:
    """Until the step is at work."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(UsageError, KeyError):
            if Lineage.load(folder).steps[step]["status"] == "running":
                return
        time.sleep(0.005)
    raise AssertionError(f"{step} was never at work: {process.stderr.read() if process.stderr else ''}")


def test_a_recipe_killed_in_every_step_makes_the_same(tmp_path: Path, tiny: Path, labeler: Path, run: Run) -> None:
    """Distilled RLAIF, `kill -9` in each of its nine steps in turn."""
    file, whole, broken = shipped("pipelines") / "rlaif-distilled.yaml", tmp_path / "whole", tmp_path / "broken"
    changes = [f"policy={tiny}", f"judge={labeler}", "engine=mock"]
    run(file, whole, changes)
    for step in recipe.read(file, broken, None, changes).steps:
        with started(file, broken, *changes) as process:
            wait_for(broken, step.name, process)
            os.kill(process.pid, signal.SIGKILL)
    assert "interrupted" in render(Lineage.load(broken))
    run(file, broken, changes)
    rows = ("sampled.jsonl", "ranked.jsonl", "pairs.jsonl", "check.json", "measured.jsonl", "agreement.json")
    for name in (*rows, "reward/model/model.safetensors", "ppo/model/model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (broken / "replaced").exists()


def test_a_changed_setting_trains_anew_and_keeps_what_was_there(trained: Path, run: Run) -> None:
    folder = trained.parent / "out"
    before = run(trained, folder)
    weights = (folder / "dpo/model/model.safetensors").read_bytes()
    answers = read_jsonl(folder / "answers.jsonl")
    after = run(trained, folder, ["steps=4"])
    assert (folder / "dpo/model/model.safetensors").read_bytes() != weights
    (kept,) = (folder / "replaced").glob("dpo-*")
    assert (kept / "model/model.safetensors").read_bytes() == weights
    assert before.steps["dpo"]["outputs"] != after.steps["dpo"]["outputs"]
    assert read_jsonl(folder / "answers.jsonl") != answers  # the new model's, though its folder has the same name


def test_a_step_may_become_another_command_with_the_same_output(asked: Path, run: Run) -> None:
    folder = asked.parent / "out"
    scores = asked.parent / "scores.yaml"
    cli("label", asked.parent / "rows.jsonl", "-o", asked.parent / "labels.jsonl", "--engine", "mock")
    for command in ("pairs labels.jsonl", "sample rows.jsonl --engine mock", "label rows.jsonl --engine mock"):
        scores.write_text(f"steps: {{a: {command} -o made.jsonl}}")
        assert run(scores, folder).steps["a"]["status"] == "done"
    assert "soft_label" in read_jsonl(folder / "made.jsonl")[0]


def test_ctrl_c_ends_the_step_at_work_and_the_same_command_goes_on(trained: Path, run: Run) -> None:
    trained.write_text(TRAINED.replace("latency=0.02", "latency=2"))
    folder = trained.parent / "out"
    with started(trained, folder) as process:
        wait_for(folder, "label", process)
        step_of(process.pid)  # it has begun
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
        assert process.stderr
        assert "interrupted: the same command goes on from there" in process.stderr.read()
    lineage = Lineage.load(folder)
    assert list(lineage.steps) == ["label"]
    assert lineage.steps["label"]["status"] == "interrupted"
    trained.write_text(TRAINED)
    run(trained, folder)
    assert len(read_jsonl(folder / "labels.jsonl")) == 12


def test_a_step_whose_process_is_killed_is_told_as_such(trained: Path, run: Run) -> None:
    trained.write_text(TRAINED.replace("latency=0.02", "latency=5"))
    folder = trained.parent / "out"
    with started(trained, folder) as process:
        wait_for(folder, "label", process)
        os.kill(step_of(process.pid), signal.SIGKILL)
        assert process.wait(60) == 1
        assert process.stderr
        assert "was killed (signal 9)" in process.stderr.read()


def step_of(pid: int) -> int:
    """The process of the step at work: a child of the one child of the process that runs the pipeline."""
    while True:
        parents = {int(own.name): _parent(own) for own in Path("/proc").iterdir() if own.name.isdigit()}
        found = [own for own, parent in parents.items() if parents.get(parent) == pid]
        if found:
            return found[0]
        time.sleep(0.01)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def test_an_interrupted_run_is_no_finished_one(asked: Path, steps: Steps) -> None:
    work = Work(recipe.read(asked, asked.parent / "out"), asked.parent / "out")

    class Interrupted(Steps):
        def run(self, *args: object) -> object:  # type: ignore[override]
            os.kill(os.getpid(), signal.SIGINT)
            return steps.run(*args)  # type: ignore[arg-type]

    with pytest.raises(StoppedError, match="interrupted"):
        work.run(Interrupted())
    assert list(Lineage.load(asked.parent / "out").steps) == ["label"]
