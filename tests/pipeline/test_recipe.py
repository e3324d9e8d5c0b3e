"""Pipeline files: how they are filled in, what depends on what, and what is said of one that is wrong before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.pipeline import recipe
from rlaif.pipeline.lineage import Hashes, key, named_in
from rlaif.pipeline.recipe import FILES, Pipeline
from rlaif.records import UsageError
from tests.conftest import cli


def write(folder: Path, text: str) -> Path:
    for name in ("rows.jsonl", "judge.yaml"):
        (folder / name).touch()
    path = folder / "p.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str, *changes: str, size: str | None = None) -> Pipeline:
    return recipe.read(write(folder, text), folder / "out", size, changes)


STEPS = """
settings: {judge: judge.yaml, n: 2, more: [--tries, 3], wanted: null}
sizes:
  smoke: {n: 4, wanted: 1}
  full: {more: []}
steps:
  sample: sample rows.jsonl -o sampled.jsonl --n ${n} ${more} --seed ${wanted}
  rank: rank sampled.jsonl -o ranked.jsonl --labeler ${judge}
  reward: train reward reward -o reward --set data=ranked.jsonl --set model=./start
  ppo: >-
    train ppo ppo -o ppo --set data=sampled.jsonl --set 'reward=[{kind: model, model: reward/model}]'
"""


def test_settings_sizes_and_changes_fill_the_steps(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    sample = read(tmp_path, STEPS).step("sample")  # the first size
    assert sample.words[4:] == ("--n", "4", "--tries", "3", "--seed", "1")
    sample = read(tmp_path, STEPS, "n=7", "wanted=5", size="full").step("sample")
    assert sample.words[4:] == ("--n", "7", "--seed", "5")


def test_steps_know_what_they_use_and_who_makes_it(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    pipeline = read(tmp_path, STEPS)
    assert pipeline.step("sample").uses == {"../rows.jsonl": None}
    assert pipeline.step("rank").uses == {"sampled.jsonl": "sample", "../judge.yaml": None}
    assert pipeline.step("reward").uses == {"ranked.jsonl": "rank", "../start": None}
    assert pipeline.step("ppo").uses == {"sampled.jsonl": "sample", "reward/model": "reward"}
    assert pipeline.after("rank") == {"rank", "reward", "ppo"}
    assert [step.name for step in pipeline.steps if step.trains] == ["reward", "ppo"]
    assert [step.name for step in pipeline.steps if step.asks] == ["sample", "rank"]
    assert pipeline.step("reward").command == "train reward"


def test_files_of_a_change_stand_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "start").mkdir()
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.yaml").touch()
    monkeypatch.chdir(here)
    assert "../here/mine.yaml" in read(tmp_path, STEPS, "judge=mine.yaml").step("rank").uses


def test_a_step_is_repeated_for_values_and_a_setting_that_is_a_list(tmp_path: Path) -> None:
    text = """
settings: {losses: [dpo, ipo]}
steps:
  a: pairs rows.jsonl -o easy.jsonl
  b: pairs rows.jsonl -o hard.jsonl
  t:
    for: {set: [easy, hard], loss: "${losses}"}
    run: train dpo dpo -o ${set}-${loss} --set data=${set}.jsonl --set loss=${loss}
"""
    pipeline = read(tmp_path, text)
    assert [step.name for step in pipeline.steps[2:]] == ["t-easy-dpo", "t-easy-ipo", "t-hard-dpo", "t-hard-ipo"]
    assert pipeline.step("t-hard-ipo").uses == {"hard.jsonl": "b"}
    assert pipeline.step("t-hard-ipo").makes == ("hard-ipo",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: {}", "steps: "),
        ("steps: {a: lable rows.jsonl -o b.jsonl}", "step a: 'lable' is no command: choose one of ablate"),
        ("steps: {a: build clare rows.jsonl -o b.jsonl}", "step a: 'clare' is no command: choose one of best-of-n"),
        ("steps: {a: label rows.jsonl -o b.jsonl --engin mock}", "step a: No such option: --engin"),
        ("steps: {a: label rows.jsonl}", "step a: Missing option"),
        ("steps: {a: label rows.jsonl -o b.jsonl --samples many}", "step a: Invalid value for '--samples'"),
        ("steps: {a: label rows.jsonl -o b.jsonl --help}", "step a: --help is no step"),
        (
            "steps: {a: label none.jsonl -o b.jsonl}",
            "step a: no file none.jsonl: none stands beside p.yaml, and no step before",
        ),
        ("steps: {a: label rows.jsonl -o b.jsonl --labeler no.yaml}", "step a: no file no.yaml"),
        ("steps: {a: pairs b.jsonl -o c.jsonl, b: label rows.jsonl -o b.jsonl}", "step a: no file b.jsonl"),
        ("steps: {a: 'label \"rows.jsonl -o b.jsonl'}", "step a: No closing quotation"),
        ("steps: {a: 'label ${rows} -o b.jsonl'}", "step a: there is no setting 'rows'; there are samples"),
        ("settings: {rows: null}\nsteps: {a: 'label ${rows} -o b.jsonl'}", "the setting 'rows' has to be given: --set rows="),
        ("steps: {a: label rows.jsonl -o ../b.jsonl}", "a name in the run's folder"),
        ("steps: {a: label rows.jsonl -o /tmp/b.jsonl}", "a name in the run's folder"),
        ("steps: {a: align rows.jsonl --human h -o lineage.json}", "a name in the run's folder"),
        (
            "steps: {a: label rows.jsonl -o b.jsonl, c: rank rows.jsonl -o b.jsonl}",
            "step c: makes b.jsonl, as step a makes b.jsonl",
        ),
        ("steps: {'a b': label rows.jsonl -o b.jsonl}", "a step's name is letters"),
        ("settings: {n: 1}\nsizes: {big: {m: 2}}\nsteps: {a: label rows.jsonl -o b.jsonl}", "big: there is no setting 'm'"),
        ("steps: {a: {run: label rows.jsonl -o b.jsonl, for: {x: none}}}", "for x: expected a list"),
        ("step: {a: label rows.jsonl -o b.jsonl}", "steps: Field required"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert "p.yaml" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("m=1", "has no such setting; it has judge, n, more, wanted"),
        ("n", "expected NAME=VALUE"),
        ("n=[[1]]", "expected a value, or a list of values"),
        ("n={a: 1}", "expected a value"),
    ],
)
def test_a_wrong_change_is_named(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(UsageError, match="--set") as caught:
        read(tmp_path, STEPS, change)
    assert said in str(caught.value)


def test_an_unknown_size_or_pipeline_is_told_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no size 'huge': smoke, full"):
        read(tmp_path, STEPS, size="huge")
    done = cli("run", "rlaif-distil")
    assert done.returncode == 2
    assert "rlaif-distilled" in done.stderr


@given(
    value=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1).filter(
        lambda text: not text.startswith("-") and not text.endswith(FILES)
    )
)
def test_a_value_stays_one_word_whatever_is_in_it(tmp_path_factory: pytest.TempPathFactory, value: str) -> None:
    """A setting cannot add an option, nor end a quotation. (Of what looks like a file, the file has to be there.)"""
    folder = tmp_path_factory.mktemp("value")
    text = "settings: {title: x}\nsteps: {a: 'report rows.jsonl -o r.html --title ${title}'}"
    path = write(folder, text)
    quoted = value.replace("'", "''")
    words = recipe.read(path, folder / "out", None, [f"title='{quoted}'"]).step("a").words
    assert len(words) == 6
    assert words[5] == value


def test_what_a_file_names_belongs_to_its_content(tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text("template: own.jinja\nconstitution: mine.yaml\nengine: mock\n")
    (tmp_path / "own.jinja").write_text('---\nexemplars: shots.yaml\n---\n{% extends "pairwise/_layout.jinja" %}')
    (tmp_path / "mine.yaml").write_text("principles: []")
    (tmp_path / "shots.yaml").write_text("exemplars: []")
    (tmp_path / "other.yaml").write_text("nobody names this one")
    names = [path.name for path in named_in(tmp_path / "judge.yaml")]
    assert names == ["mine.yaml", "own.jinja", "shots.yaml"]
    before = Hashes(tmp_path).of("judge.yaml")
    (tmp_path / "other.yaml").write_text("still nobody")
    assert Hashes(tmp_path).of("judge.yaml") == before
    (tmp_path / "shots.yaml").write_text("exemplars: [1]")
    assert Hashes(tmp_path).of("judge.yaml") != before


def test_a_folder_is_hashed_by_what_is_in_it_but_not_by_its_card(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    (model / "README.md").write_text("made today")
    before = Hashes(tmp_path).of("model")
    (model / "README.md").write_text("made tomorrow")
    assert Hashes(tmp_path).of("model") == before
    (model / "weights").write_text("2")
    assert Hashes(tmp_path).of("model") != before
    assert Hashes(tmp_path).of("nothing") is None


def test_a_step_is_the_same_wherever_its_folder_stands(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: {a: label rows.jsonl -o b.jsonl}")
    near, far = (recipe.read(path, tmp_path / name).step("a") for name in ("out", "deep/er/out"))
    assert near.words != far.words
    shas = [dict.fromkeys(step.uses, "sha") for step in (near, far)]
    assert key(near, {"rows": "1"}) == key(far, {"rows": "1"})
    assert list(shas[0]) != list(shas[1])


def test_help_needs_nothing_heavy() -> None:
    text = "import sys, rlaif.cli; print([m for m in ('torch', 'datasets', 'pydantic', 'yaml', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip() == "[]"
