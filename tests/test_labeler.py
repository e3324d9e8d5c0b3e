"""Labeler files: what the shipped ones make, where their paths lead, and which of file and options wins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.labeler import Labeler, load_labeler
from rlaif.options import ChooseName, Comparing, Judging
from rlaif.prompts import KINDS, list_templates
from rlaif.records import UsageError
from rlaif.yamlfile import listed
from tests.conftest import clean_env, cli, make_rows, read_jsonl, write_jsonl
from tests.test_exemplars import exemplar

PROMPTS = '{% extends "pairwise/constitution.jinja" %}{% block preamble %}Mine.{% endblock %}'


def written(path: Path, text: str = "", **content: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text or yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def whole(folder: Path) -> str:
    """A labeler file with a template, a constitution and exemplars of its own beside it."""
    written(folder / "mine.jinja", PROMPTS)
    principle = {"name": "kind", "critique": "Say.", "revision": "Do.", "preference": "Which is kinder?"}
    written(folder / "rules.yaml", principles=[principle])
    written(folder / "shots.yaml", exemplars=[exemplar(n).model_dump() for n in range(3)])
    files = {"template": "mine.jinja", "constitution": "rules.yaml", "exemplars": "shots.yaml"}
    return written(folder / "judge.yaml", **files, engine="mock", shots=2)


# ------------------------------------------------------------ shipped


@pytest.mark.parametrize("name", listed("labelers"))
def test_a_shipped_labeler_makes_its_method_and_survives_a_round_trip(name: str) -> None:
    labeler = load_labeler(name)
    assert labeler.name == name
    assert labeler.description
    method = labeler.pairwise()
    assert method.template.name == labeler.template_of("pairwise").name
    assert method.asking.cot == labeler.cot
    for mode in ("python", "json"):
        assert Labeler.model_validate(labeler.model_dump(mode=mode)) == labeler
    assert Labeler.model_validate(labeler.model_dump(exclude_defaults=True)) == labeler
    assert json.loads(json.dumps(method.settings())) == method.settings()


def test_the_shipped_labelers_judge_by_what_their_descriptions_say() -> None:
    four = load_labeler("local-server-cot").pairwise().asking
    assert (four.cot, four.samples, four.temperature) == ("two-call", 4, 0.5)
    every = load_labeler("vllm-constitution").pairwise().bench
    assert every
    assert len(every.sit("row")) == len(every.constitution.principles) >= 16
    three = load_labeler("embedded-constitution").pairwise().bench
    assert three
    assert len(three.sit("row")) == 3


def test_a_labeler_with_everything_survives_a_round_trip() -> None:
    labeler = Labeler(
        name="x",
        description="y",
        engine="mock",
        model="m",
        options={"k": 2, "logprobs": False, "noise": 0.5, "other": "text"},
        price=(0.1, 0.2),
        concurrency=3,
        cot="one-call",
        cot_clamp=(0.4, 0.6),
        samples=4,
        temperature=0.7,
        shots=2,
        choose="nearest",
        constitution="general",
        principles=3,
        attributes={"helpful": 2.0},
        calibration={"temperature": 1.5, "position_bias": 0.2},  # type: ignore[arg-type]
        seed=9,
    )
    for mode in ("python", "json"):
        assert Labeler.model_validate(labeler.model_dump(mode=mode)) == labeler
    assert labeler.model_dump()["options"] == {"k": 2, "logprobs": False, "noise": 0.5, "other": "text"}
    assert type(labeler.options["logprobs"]) is bool


def test_the_hash_is_that_of_what_judges() -> None:
    assert Labeler(name="x", description="y").hash == Labeler().hash
    assert Labeler(shots=1).hash != Labeler().hash


# ------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: red", "colour: Extra inputs are not permitted"),
        ("engine: abacus", "engine: unknown engine 'abacus': choose one of embedded, mock, openai"),
        ("cot: always", "cot: Input should be 'off', 'two-call' or 'one-call'"),
        ("cot: on", "cot: Input should be 'off', 'two-call' or 'one-call'"),
        ("cot: no such", "cot: Input should be"),
        ("cot_clamp: [0.4]", "cot_clamp 2: Field required"),
        ("choose: best", "choose: Input should be 'fixed', 'random' or 'nearest'"),
        ("principles: some", "principles: one, all or a number above 0, not some"),
        ("principles: true", "principles: one, all or a number above 0, not True"),
        ("principles: 0", "principles: one, all or a number above 0, not 0"),
        ("principles: 2.5", "principles: one, all or a number above 0, not 2.5"),
        ("samples: 0", "samples: Input should be greater than or equal to 1"),
        ("shots: -1", "shots: Input should be greater than or equal to 0"),
        ("temperature: .nan", "temperature: Input should be a finite number"),
        ("temperature: -0.5", "temperature: Input should be greater than or equal to 0"),
        ("price: [1, -2]", "price: prices are two numbers that are not negative"),
        ("attributes: {helpful: 0}", "attributes: the weight of 'helpful' must be above 0"),
        ("calibration: {temperature: 0}", "calibration temperature: Input should be greater than 0"),
        ("template: 7", "template: Input should be a valid string"),
        ("1: x", "1: Keys should be strings"),
        ("- engine", "its lines must be 'name: value' lines"),
        ("a: &x 1\nseed: *x", "its lines hold an alias"),
    ],
)
def test_a_mistake_in_a_labeler_file_is_named_with_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    path = written(tmp_path / "judge.yaml", text)
    with pytest.raises(UsageError) as caught:
        load_labeler(path)
    assert str(caught.value).startswith(f"{path}: {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["off", "Off", "OFF", "no", "false", "'off'", '"off"'])
def test_chain_of_thought_is_off_however_yaml_reads_it(tmp_path: Path, value: str) -> None:
    assert load_labeler(written(tmp_path / "judge.yaml", f"cot: {value}")).cot == "off"


def test_an_empty_file_is_a_labeler_of_defaults(tmp_path: Path) -> None:
    path = written(tmp_path / "judge.yaml", "# nothing yet\n")
    assert load_labeler(path) == Labeler(name="judge")


def test_paths_lead_to_what_stands_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = whole(tmp_path / "judges")
    monkeypatch.chdir(tmp_path)
    for name in (path, "judges/judge.yaml"):
        method = load_labeler(name).pairwise()
        assert method.template.render(prompt="", response_1="", response_2="")[0][0]["content"].startswith("Mine.")
        assert method.bench
        assert [p.name for p in method.bench.constitution.principles] == ["kind"]
        assert method.shots
        assert method.shots.file.name == "shots"
    # The same names are found from elsewhere too, but never in place of those beside the file.
    written(tmp_path / "mine.jinja", PROMPTS.replace("Mine.", "Another."))
    method = load_labeler(path).pairwise()
    assert method.template.render(prompt="", response_1="", response_2="")[0][0]["content"].startswith("Mine.")


def test_shipped_names_stay_names_and_missing_files_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "judge.yaml", template="helpful-base", constitution=None, exemplars="summary", shots=1)
    labeler = load_labeler(path)
    assert (labeler.template, labeler.exemplars) == ("helpful-base", "summary")
    path = written(tmp_path / "judge.yaml", template="gone.jinja")
    with pytest.raises(UsageError, match=r"no such template file: gone\.jinja"):
        load_labeler(path).pairwise()
    with pytest.raises(UsageError, match=r"among the shipped labelers: embedded, embedded-constitution"):
        load_labeler("judge")


# ------------------------------------------------------------ options


def test_options_win_over_the_file_and_the_rest_stays(tmp_path: Path) -> None:
    path = written(tmp_path / "judge.yaml", engine="mock", template="helpful-base", cot="two-call", samples=4, seed=5)
    kept = Judging(labeler=[path]).one()
    assert kept == load_labeler(path)
    changed = Judging(labeler=[path], template="summary-base", samples=2, seed=0).one(shots=1, both_orders=False)
    assert (changed.template, changed.samples, changed.seed, changed.shots) == ("summary-base", 2, 0, 1)
    assert (changed.engine, changed.cot, changed.both_orders) == ("mock", "two-call", False)


def test_an_option_that_is_wrong_names_the_labeler(tmp_path: Path) -> None:
    path = written(tmp_path / "judge.yaml", engine="mock")
    with pytest.raises(UsageError, match="labeler judge: samples: Input should be greater"):
        load_labeler(path).changed(samples=0)
    with pytest.raises(UsageError, match="labeler as given: shots: Input should be greater"):
        Labeler().changed(shots=-1)


@pytest.mark.parametrize(("text", "value"), [("one", "one"), ("all", "all"), ("3", 3), ("12", 12), (None, "one")])
def test_principles_are_one_all_or_a_number(text: str | None, value: Any) -> None:
    assert Judging(principles=text, constitution="general").one().principles == value


@pytest.mark.parametrize("text", ["two", "", "-1", "1.5", "²", "٣", " 3", "All"])
def test_other_principles_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--principles: one, all or a number, not"):
        Judging(principles=text).one()


@pytest.mark.parametrize(
    ("judging", "comparing", "message"),
    [
        (Judging(principles="all"), Comparing(), "--principles goes with --constitution"),
        (Judging(), Comparing(choose=ChooseName.nearest), "--choose and --exemplars go with --shots"),
        (Judging(), Comparing(exemplars="summary"), "--choose and --exemplars go with --shots"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(judging: Judging, comparing: Comparing, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        judging.one(**comparing.given())


def test_engine_options_given_are_put_over_the_files_own(tmp_path: Path) -> None:
    path = written(tmp_path / "judge.yaml", engine="mock", options={"k": 3, "bias": 1})
    assert Judging(labeler=[str(path)], option=["bias=2", "noise=0.5"]).one().options == {"k": 3, "bias": 2, "noise": 0.5}


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("engine: mock\nshots: 1\nengine: openai\n")
    with pytest.raises(UsageError, match=r"judge\.yaml: .*'engine' is there twice"):
        load_labeler(str(path))
    path.write_text("engine: mock\noptions: {k: 1, k: 2}\n")
    with pytest.raises(UsageError, match="'k' is there twice"):
        load_labeler(str(path))


def test_templates_and_exemplars_that_a_file_names_may_stand_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "judges"
    folder.mkdir()
    (folder / "rate.jinja").write_text('{% extends "rating/_layout.jinja" %}{% block question %}How dry is it?{% endblock %}')
    shots = {"exemplars": [{"prompt": "p", "better": "x", "worse": "y", "rationale": "{better} beats {worse}"}]}
    (folder / "mine.yaml").write_text(json.dumps(shots))
    head = "---\nexemplars: mine.yaml\n---\n"
    (folder / "ask.jinja").write_text(head + '{% extends "pairwise/_layout.jinja" %}{% block preamble %}Hm.{% endblock %}')
    path = written(folder / "judge.yaml", engine="mock", template="ask.jinja", shots=1, attributes={"rate.jinja": 2.0})
    labeler = load_labeler(str(path))
    assert labeler.pairwise().shots is not None
    assert labeler.pairwise().shots.file.name == "mine"
    assert "How dry is it?" in labeler.rater().attributes[0][1].render(prompt="p", response="r", row={})[0][0]["content"]


def test_a_labeler_file_labels_on_the_command_line_and_the_run_file_tells_it(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(3)), tmp_path / "o.jsonl"
    file = whole(tmp_path / "judges")
    done = cli("label", path, "-o", out, "--labeler", file, "--cot", "two-call", "--samples", "2")
    assert done.returncode == 0, done.stderr
    assert all(len(row["votes"]) == 4 and row["votes"][0]["principle"] == "kind" for row in read_jsonl(out))
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert report["labeler"]["name"] == "judge"
    assert (report["settings"]["cot"], report["settings"]["samples"]) == ("two-call", 2)
    assert report["settings"]["shots"]["exemplars"] == "shots"
    done = cli("label", path, "-o", tmp_path / "p.jsonl", "--labeler", written(tmp_path / "bad.yaml", "cot: always"))
    assert done.returncode == 2
    assert "bad.yaml: cot: Input should be" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------ listings


def test_the_shipped_labelers_are_listed_with_what_they_are() -> None:
    lines = cli("labelers").stdout.splitlines()
    assert [line.split()[0] for line in lines] == listed("labelers")
    assert all(line.endswith(load_labeler(line.split()[0]).description) for line in lines)


def test_templates_are_listed_by_kind() -> None:
    lines = cli("templates").stdout.splitlines()
    expected = [w for kind in KINDS for w in (f"{kind}:", *list_templates(kind))]
    assert [line.split()[0] for line in lines] == expected
    assert all(len(line.split()) > 1 for line in lines if line.startswith(" "))


@pytest.mark.parametrize(
    ("arguments", "there", "not_there"),
    [
        (("helpful-base",), ["# call 1", "asks for the better one", "[assistant begins]"], ["# call 2", "<example>"]),
        (
            ("helpful-base", "--cot", "two-call"),
            ["# call 2", "[assistant]\n(the rationale that the model has written)", "Before you answer, think"],
            ["alone on the last line"],
        ),
        (
            ("helpful-base", "--cot", "one-call", "--samples", "5"),
            ["alone on the last line"],
            ["# call 2", "[assistant begins]"],
        ),
        (("summary-detailed", "--shots", "2"), ["Here are examples", "</example>", "Which summary is better?"], ["# call 2"]),
        (("constitution",), ["bicycle", "Preferred response: <response_"], []),
        (("constitution", "--constitution", "honesty"), ["Which response "], ["bicycle"]),
        (("honest", "--kind", "rating"), ["How honest is the response?", "# choices 1 / 2 / 3"], ["asks for", "# call 2"]),
        (("constitution", "--kind", "rating", "--cot", "two-call"), ["Put to two responses", "# call 2"], []),
        (("general", "--kind", "ranking", "--cot", "one-call"), ['<response number="2">', "the best first"], ["# choices"]),
    ],
)
def test_a_template_is_shown_as_a_model_gets_it(arguments: tuple[str, ...], there: list[str], not_there: list[str]) -> None:
    done = cli("templates", "show", *arguments)
    assert done.returncode == 0, done.stderr
    assert "{{" not in done.stdout
    for text in there:
        assert text in done.stdout, text
    for text in not_there:
        assert text not in done.stdout, text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("kindness",), "unknown template 'kindness'"),
        (("honest",), "unknown template 'honest': a file, or one of constitution, general"),
        (("general", "--constitution", "honesty"), "has no {{ principle }} to ask by"),
        (("general", "--kind", "ranking", "--shots", "2"), "--method listwise has no use for shots"),
    ],
)
def test_what_cannot_be_shown_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = cli("templates", "show", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["label", "--help"], ["constitution", "--help"], ["templates", "show", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["torch", "transformers", "datasets", "sklearn", "matplotlib", "jinja2", "openai", "yaml", "numpy"]
    if arguments == ["--help"]:
        heavy.append("pydantic")  # Typer imports it where it shows a command
    code = (
        f"import sys; sys.argv = ['rlaif', *{arguments}]\n"
        "try:\n    from rlaif.cli import main; main()\nexcept SystemExit: pass\n"
        f"print('heavy:', sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), timeout=60)
    assert "Usage:" in done.stdout
    assert done.stdout.strip().endswith("heavy: []")
