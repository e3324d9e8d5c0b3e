"""Constitutions: what the shipped ones hold, which principles judge a row, and how their labels are averaged."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import chisquare

from rlaif.constitution import Bench, Constitution, Principle, load_constitution
from rlaif.engines.mock import MockEngine
from rlaif.label.pairwise import combine
from rlaif.labeler import Labeler
from rlaif.records import UsageError
from rlaif.yamlfile import listed
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl
from tests.test_label import label, planted, vote

TEXTS = {"critique": "Say where.", "revision": "Rewrite it."}


def principle(name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"name": name, **TEXTS, "preference": f"Which one is more {name}?", "weight": weight}


def constitution(**weights: float) -> Constitution:
    return Constitution.model_validate({"principles": [principle(name, weight) for name, weight in weights.items()]})


def written(path: Path, *principles: dict[str, Any], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"principles": list(principles), **more}), encoding="utf-8")
    return path


def opposite(path: Path, kind: float = 1.0, brief: float = 1.0) -> str:
    return str(written(path, principle("kind", kind), principle("brief", brief)))


# ------------------------------------------------------------ shipped


def test_the_general_constitution_has_as_many_principles_as_the_paper() -> None:
    assert listed("constitutions") == ["example", "general", "helpfulness", "honesty"]
    assert len(load_constitution("general").principles) >= 16


@pytest.mark.parametrize("name", listed("constitutions"))
def test_a_shipped_constitution_puts_each_principle_in_three_texts_of_its_own(name: str) -> None:
    found = load_constitution(name)
    assert found.name == name
    assert found.description
    texts = [text for p in found.principles for text in (p.critique, p.revision, p.preference)]
    assert len(set(texts)) == len(texts) == 3 * len(found.principles)
    assert all(len(text) > 30 and "\n" not in text for text in texts)
    assert all(p.preference.startswith("Which ") for p in found.principles)


def test_no_text_stands_in_two_shipped_constitutions() -> None:
    texts = Counter(p.preference for name in listed("constitutions") for p in load_constitution(name).principles)
    assert not [text for text, count in texts.items() if count > 1]


# ------------------------------------------------------------ draws


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e6])
def test_one_principle_is_drawn_by_its_weight_whatever_the_unit_of_the_weights(scale: float) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    bench = Bench(constitution(**{name: scale * weight for name, weight in weights.items()}))
    sat = [bench.sit(f"row {n}") for n in range(4000)]
    assert {(len(some), some[0][1]) for some in sat} == {(1, 1.0)}
    counts = Counter(some[0][0].name for some in sat)
    assert chisquare([counts[name] for name in weights], [4000 * w / 8 for w in weights.values()]).pvalue > 1e-4


def test_several_are_drawn_one_after_the_other_without_replacement() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    bench = Bench(constitution(**weights), 2)
    counts: Counter[frozenset[str]] = Counter()
    for n in range(4000):
        sat = bench.sit(f"row {n}")
        assert [weight for _, weight in sat] == [1.0, 1.0]
        counts[frozenset(p.name for p, _ in sat)] += 1
    pairs = [frozenset(pair) for pair in combinations(weights, 2)]
    assert set(counts) == set(pairs)
    expected = [sum(weights[i] / 10 * weights[j] / (10 - weights[i]) for i, j in (tuple(p), tuple(p)[::-1])) for p in pairs]
    assert sum(expected) == pytest.approx(1)
    assert chisquare([counts[pair] for pair in pairs], [4000 * e for e in expected]).pvalue > 1e-4


def test_as_many_as_there_are_gives_each_of_them_once() -> None:
    sat = Bench(constitution(a=1, b=2, c=3), 3).sit("row")
    assert sorted(p.name for p, _ in sat) == ["a", "b", "c"]


def test_all_of_them_sit_with_their_weights() -> None:
    sat = Bench(constitution(a=1, b=2.5), "all").sit("row")
    assert [(p.name, weight) for p, weight in sat] == [("a", 1.0), ("b", 2.5)]


def test_a_draw_follows_from_seed_and_row_alone() -> None:
    found = load_constitution("general")
    rows = [f"row {n}" for n in range(200)]
    one, again, other = ([Bench(found, "one", seed).sit(row)[0][0].name for row in rows] for seed in (0, 0, 1))
    assert one == again
    assert 0 < sum(x == y for x, y in zip(one, other, strict=True)) < 50  # by chance one in sixteen or fewer
    assert len(set(one)) > 10


@pytest.mark.parametrize("count", [0, -1, 4])
def test_more_principles_than_there_are_or_none_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"--principles {count}: the constitution .* has 3"):
        Bench(load_constitution("example"), count)


def test_swapped_responses_are_judged_by_the_same_principle(tmp_path: Path) -> None:
    rows = planted(30, seed=1)
    swapped = [{**row, "response_a": row["response_b"], "response_b": row["response_a"]} for row in rows]
    drawn = []
    for name, some in (("ab", rows), ("ba", swapped)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", some)
        out = label(path, tmp_path / f"{name}.out.jsonl", MockEngine(), "constitution", constitution="general")
        drawn.append([{vote["principle"] for vote in row["votes"]} for row in out])
        assert all(len(names) == 1 for names in drawn[-1])
    assert drawn[0] == drawn[1]
    assert len({name for names in drawn[0] for name in names}) > 8


def test_the_principle_that_was_drawn_is_the_one_that_is_asked_by(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(5, seed=1))
    found = {p.name: p.preference for p in load_constitution("example").principles}
    seen: list[str] = []

    class Listening(MockEngine):
        async def complete(self, request: Any) -> Any:
            seen.append(request.messages[-1]["content"])
            assert found[request.hint["aspect"]] in seen[-1]
            assert sum(text in seen[-1] for text in found.values()) == 1
            return await super().complete(request)

    label(path, tmp_path / "o.jsonl", Listening(), "constitution", constitution="example", principles="all")
    assert len(seen) == 5 * 3 * 2


# ------------------------------------------------------------ means


def test_a_label_is_the_weighted_mean_over_principles_by_hand() -> None:
    votes = [vote("ab", 0.9, principle="x"), vote("ba", 0.7, principle="x"), vote("ab", 0.1, principle="y")]
    votes += [vote("ba", 0.3, principle="y"), vote("ab", 0.5, principle="z"), vote("ba", 0.5, principle="z")]
    row = combine(votes, {"x": 3.0, "y": 1.0, "z": 2.0})
    assert row["soft_label"] == pytest.approx((3 * 0.8 + 1 * 0.2 + 2 * 0.5) / 6)
    assert (row["status"], row["label"]) == ("ok", "a")


@pytest.mark.parametrize(
    ("weights", "status"),
    [
        ({"x": 2.0, "y": 1.0, "z": 2.0}, "ok"),  # four of five remain
        ({"x": 1.0, "y": 1.9, "z": 1.0}, "ok"),  # 2.0 of 3.9
        ({"x": 1.0, "y": 2.0, "z": 1.0}, "refused"),  # just half
        ({"x": 1.0, "y": 5.0, "z": 1.0}, "refused"),
    ],
)
def test_a_principle_that_failed_is_left_out_only_while_more_than_half_of_the_weight_remains(
    weights: dict[str | None, float], status: str
) -> None:
    votes = [vote(order, 0.8, principle=name) for name in ("x", "z") for order in ("ab", "ba")]
    votes += [vote("ab", 0.0, principle="y"), vote("ba", None, "refused", principle="y")]
    row = combine(votes, weights)
    assert row["status"] == status
    assert row["soft_label"] == (pytest.approx(0.8) if status == "ok" else None)
    assert (row["label"] is None) == (status != "ok")


@pytest.mark.parametrize(("weights", "label_is"), [((1.0, 1.0), "tie"), ((3.0, 1.0), "a"), ((1.0, 3.0), "b")])
def test_two_opposite_principles_average_by_their_weights(tmp_path: Path, weights: tuple[float, float], label_is: str) -> None:
    planted_by = {"quality_a": {"kind": 1.0, "brief": -1.0}, "quality_b": {"kind": 0.0, "brief": 0.0}}
    path = write_jsonl(tmp_path / "d.jsonl", [{**row, **planted_by} for row in planted(5, seed=1)])
    file = opposite(tmp_path / "c.yaml", *weights)
    rows = label(path, tmp_path / "o.jsonl", MockEngine(k=2.0), "constitution", constitution=file, principles="all")
    kind = 1 / (1 + math.exp(-2))
    for row in rows:
        softs = {(v["principle"], v["order"]): v["soft_label"] for v in row["votes"]}
        assert softs["kind", "ab"] == pytest.approx(kind)
        assert softs["brief", "ba"] == pytest.approx(1 - kind)
        share = weights[0] / sum(weights)
        assert row["soft_label"] == pytest.approx(share * kind + (1 - share) * (1 - kind))
        assert (row["label"], row["status"]) == (label_is, "tie" if label_is == "tie" else "ok")


def test_with_one_principle_drawn_opposite_ones_decide_by_their_share(tmp_path: Path) -> None:
    planted_by = {"quality_a": {"kind": 1.0, "brief": -1.0}, "quality_b": {"kind": 0.0, "brief": 0.0}}
    path = write_jsonl(tmp_path / "d.jsonl", [{**row, **planted_by} for row in planted(300, seed=1)])
    rows = label(path, tmp_path / "o.jsonl", MockEngine(), "constitution", constitution=opposite(tmp_path / "c.yaml", 3.0))
    share = sum(row["label"] == "a" for row in rows) / 300
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 300)
    assert all((row["label"] == "a") == (row["votes"][0]["principle"] == "kind") for row in rows)


# ------------------------------------------------------------ settings that do not go together


def test_template_and_constitution_must_go_together() -> None:
    with pytest.raises(UsageError, match=r"template general has no {{ principle }} to ask by"):
        Labeler(template="general", constitution="general").pairwise()
    with pytest.raises(UsageError, match="template constitution asks by a principle: give a --constitution"):
        Labeler(template="constitution").pairwise()
    assert Labeler(constitution="honesty").pairwise().template.name == "constitution"


def test_the_hash_follows_what_judges_and_not_the_names_of_the_file(tmp_path: Path) -> None:
    def hash_of(name: str, *principles: dict[str, Any], **more: Any) -> str:
        return load_constitution(str(written(tmp_path / name, *principles, **more))).hash

    one = hash_of("one.yaml", principle("kind"))
    assert hash_of("two.yaml", principle("kind"), description="Mine") == one
    assert hash_of("one.yaml", principle("kind", 2.0)) != one
    assert hash_of("one.yaml", {**principle("kind"), "preference": "Which?"}) != one


# ------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wieght": 2}, "wieght: Extra inputs are not permitted"),
        ({"critique": None}, "critique: Field required"),
        ({"revision": ""}, "revision: String should have at least 1 character"),
        ({"critique": " \n "}, "critique: String should have at least 1 character"),
        ({"preference": "Choose the kinder one."}, "preference: a preference question ends with '?'"),
        ({"preference": ["Which?"]}, "preference: Input should be a valid string"),
        ({"weight": 0}, "weight: Input should be greater than 0"),
        ({"weight": -1.5}, "weight: Input should be greater than 0"),
        ({"weight": math.nan}, "weight: Input should be"),
        ({"weight": math.inf}, "weight: Input should be a finite number"),
        ({"weight": "much"}, "weight: Input should be a valid number"),
    ],
)
def test_a_wrong_principle_is_named_with_file_principle_and_field(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    wrong = {k: v for k, v in {**principle("brief"), **changes}.items() if v is not None}
    path = written(tmp_path / "mine.yaml", principle("kind"), wrong)
    with pytest.raises(UsageError) as caught:
        load_constitution(str(path))
    assert str(caught.value).startswith(f"{path}: principles 2 (brief) {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- name: kind", "must be 'name: value' lines"),
        ("kind", "must be 'name: value' lines"),
        ("principles: []", "principles: Tuple should have at least 1 item"),
        ("", "principles: Field required"),
        ("principles: kind", "principles: Input should be a valid tuple"),
        ("principles: [kind]", "principles 1: Input should be a valid dictionary or instance of Principle"),
        ("principles: [", "are not YAML"),
        ("a: &x [1]\nprinciples: *x", "hold an alias (*name): write it out"),
        ("principels: []\n", "principles: Field required"),
        ("1: x\nprinciples: [{name: a, critique: b, revision: c, preference: 'd?'}]", "1: Keys should be strings"),
        ("principles: !!python/object/apply:os.getcwd []", "are not YAML"),
    ],
)
def test_a_file_that_is_no_constitution_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_constitution(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_and_questions_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(UsageError, match=r"mine\.yaml: principles: the name 'kind' is there twice"):
        load_constitution(str(written(path, principle("kind"), {**principle("kind"), "preference": "Which?"})))
    with pytest.raises(UsageError, match=r"mine\.yaml: principles: the preference question 'Which one is .*' is there twice"):
        load_constitution(str(written(path, principle("kind"), {**principle("kind"), "name": "nice"})))


@pytest.mark.parametrize("name", ["Kind", "kind words", "", "-kind", "kind_1", 7])
def test_a_name_is_lower_case_with_hyphens(tmp_path: Path, name: Any) -> None:
    path = written(tmp_path / "mine.yaml", {**principle("kind"), "name": name})
    with pytest.raises(UsageError, match=r"mine\.yaml: principles 1 .*name: "):
        load_constitution(str(path))


def test_a_file_that_cannot_be_read_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "raw.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"raw\.yaml: cannot be read"):
        load_constitution(str(tmp_path / "raw.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(UsageError, match=r"no such file: .*folder\.yaml"):
        load_constitution(str(tmp_path / "folder.yaml"))
    for name in ("kindness", "../labelers/embedded", ""):
        with pytest.raises(UsageError, match="among the shipped constitutions: example, general, helpfulness, honesty"):
            load_constitution(name)


def test_a_principle_is_what_its_fields_say() -> None:
    made = Principle.model_validate(principle("kind") | {"critique": "  Say where. \n"})
    assert (made.critique, made.weight) == ("Say where.", 1.0)


# ------------------------------------------------------------ commands


def test_the_commands_list_check_and_copy(tmp_path: Path) -> None:
    shown = cli("constitution", "list").stdout
    for name in listed("constitutions"):
        assert f"{name} " in shown
        assert f"{len(load_constitution(name).principles)} principles" in shown
    mine = tmp_path / "mine.yaml"
    assert cli("constitution", "new", mine).returncode == 0
    checked = cli("constitution", "check", mine)
    assert checked.returncode == 0, checked.stderr
    assert "3 principles, nothing wrong" in checked.stdout
    assert "safety-first                      50.0%  Which response would leave the customer" in checked.stdout
    assert load_constitution(str(mine)).hash == load_constitution("example").hash


def test_the_commands_refuse_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.yaml", principle("kind", -1))
    for arguments, words in (
        (("check", mine), "principles 1 (kind) weight: Input should be greater than 0"),
        (("new", mine), "is there already"),
        (("new", tmp_path / "nowhere" / "mine.yaml"), "cannot be written"),
        (("check", "kindness"), "no file 'kindness'"),
    ):
        done = cli("constitution", *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert yaml.safe_load(mine.read_text())["principles"][0]["name"] == "kind"


def test_labelling_by_a_constitution_of_ones_own_tells_it_in_the_run_file(tmp_path: Path) -> None:
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(4)), tmp_path / "o.jsonl"
    file = opposite(tmp_path / "mine.yaml", 2.0)
    arguments = ("label", path, "-o", out, "--engine", "mock", "--constitution", file)
    done = cli(*arguments, "--principles", "2")
    assert done.returncode == 0, done.stderr
    assert all({v["principle"] for v in row["votes"]} == {"kind", "brief"} for row in read_jsonl(out))
    told = json.loads((tmp_path / "o.jsonl.run.json").read_text())["settings"]["constitution"]
    assert told == {"constitution": "mine", "hash": load_constitution(file).hash, "principles": 2}
    done = cli(*arguments, "--principles", "3", "--relabel")
    assert (done.returncode, "--principles 3: the constitution mine has 2" in done.stderr) == (2, True)
    # Another weight changes labels: the output is not mixed with it.
    opposite(tmp_path / "mine.yaml", 5.0)
    done = cli(*arguments, "--principles", "2")
    assert done.returncode == 2
    assert "constitution.hash" in done.stderr
