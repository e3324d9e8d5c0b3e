"""The project that `rlaif new` makes: each of its files is right, and its pipeline runs through as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from rlaif.cli import app
from rlaif.constitution import load_constitution
from rlaif.labeler import load_labeler
from rlaif.pipeline import recipe
from rlaif.pipeline.project import FILES, create
from rlaif.prompts import load_template
from rlaif.records import UsageError
from tests.conftest import in_process, read_jsonl
from tests.engines.tiny import save_tiny


@pytest.fixture
def project(tmp_path: Path) -> Path:
    in_process("new", tmp_path / "mine")
    return tmp_path / "mine"


def test_all_files_of_the_package_are_there_and_runs_are_kept_from_git(project: Path) -> None:
    expected = {path.name.replace("gitignore", ".gitignore") for path in FILES.iterdir()}
    assert {path.name for path in project.iterdir()} == expected
    assert {"pipeline.yaml", "constitution.yaml", "judge.jinja", "labeler.yaml", "prompts.jsonl", "human.jsonl"} < expected
    assert "runs/" in (project / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UsageError, match=r"is not empty|is a file"):
            in_process("new", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert create(tmp_path / "empty")
    with pytest.raises(UsageError, match="cannot be written to"):
        create(Path("/proc/none"))


def test_constitution_template_and_labeler_go_together(project: Path) -> None:
    said = in_process("constitution", "check", project / "constitution.yaml")
    assert "nothing wrong" in said
    constitution = load_constitution(str(project / "constitution.yaml"))
    shown = in_process(
        *("templates", "show", project / "judge.jinja"),
        *("--constitution", project / "constitution.yaml", "--principles", "all"),
    )
    assert all(principle.preference in shown for principle in constitution.principles)
    labeler = load_labeler(str(project / "labeler.yaml"))
    assert labeler.bench
    assert labeler.bench.constitution == constitution
    assert labeler.pairwise().template.hash == load_template(str(project / "judge.jinja")).hash


def test_rows_are_twelve_each_and_human_verdicts_are_not_those_of_a_trivial_labeler(project: Path) -> None:
    prompts, human = read_jsonl(project / "prompts.jsonl"), read_jsonl(project / "human.jsonl")
    assert len({row["prompt"] for row in prompts}) == len({row["prompt"] for row in human}) == 12
    assert not {row["prompt"] for row in prompts} & {row["prompt"] for row in human}
    firsts = sum(row["human"] == "a" for row in human)
    longer = sum((len(row["response_a"]) > len(row["response_b"])) == (row["human"] == "a") for row in human)
    assert 4 <= firsts <= 8
    assert 4 <= longer <= 8


@pytest.mark.parametrize("size", ["smoke", "full"])
def test_both_sizes_are_complete(project: Path, size: str) -> None:
    read = recipe.read(project / "pipeline.yaml", project / "runs" / size, size)
    assert [step.command for step in read.steps] == [
        *("sample", "rank", "label", "align", "report", "pairs", "train dpo", "report"),
    ]


def test_the_readme_tells_of_what_there_is(project: Path) -> None:
    readme = (project / "README.md").read_text(encoding="utf-8")
    pipeline = yaml.safe_load((project / "pipeline.yaml").read_text(encoding="utf-8"))
    for name in re.findall(r"^\| `([\w.]+)` \|", readme, re.MULTILINE):
        assert (project / name).is_file()
    assert "policy" in pipeline["settings"]
    steps = " ".join(pipeline["steps"].values())
    for name in ("judge.html", "training.html", "trained"):
        assert name in readme
        assert f"-o {name}" in steps
    for command in re.findall(r"rlaif ([a-z]+)", readme):
        assert command in [own.name or own.callback.__name__ for own in app.registered_commands if own.callback] + [
            group.name for group in app.registered_groups
        ]


def test_it_runs_through_with_a_mock_judge_and_a_tiny_model(project: Path, tmp_path: Path) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    labeler = yaml.safe_load((project / "labeler.yaml").read_text(encoding="utf-8"))
    (project / "mock.yaml").write_text(yaml.safe_dump({**labeler, "engine": "mock"}), encoding="utf-8")
    (project / "mock-sampler.yaml").write_text("engine: mock\n", encoding="utf-8")
    out = tmp_path / "out"
    changes = {"judge": project / "mock.yaml", "sampler": project / "mock-sampler.yaml", "policy": tiny}
    in_process("run", project / "pipeline.yaml", "-o", out, *(f"--set={name}={path}" for name, path in changes.items()))
    told = json.loads((out / "lineage.json").read_text(encoding="utf-8"))
    assert {step["status"] for step in told["steps"].values()} == {"done"}
    asked = told["steps"]["rank"]["asked"][0]
    assert asked["constitution"]["hash"] == load_constitution(str(project / "constitution.yaml")).hash
    assert asked["template_hash"] == load_template(str(project / "judge.jinja")).hash
    assert (out / "trained" / "model" / "model.safetensors").is_file()
    assert (out / "judge.html").is_file()
    assert told["steps"]["agreement"]["agreement"][0]["metrics"]["accuracy"]["n"] == 4
    in_process("card", out)
    assert "(column human, rows of measured.jsonl), with" in (out / "trained" / "model" / "README.md").read_text(
        encoding="utf-8"
    )
