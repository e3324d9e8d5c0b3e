"""Exemplars: which are shown to a row, on which sides, and what their files must hold."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.engines.mock import MockEngine
from rlaif.label.exemplars import Exemplar, Exemplars, Shots, load_exemplars
from rlaif.labeler import Labeler
from rlaif.prompts import Template, load_template
from rlaif.records import Completion, Request, UsageError
from rlaif.yamlfile import listed
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl
from tests.test_label import label, planted

SAMPLE = Path(__file__).parents[1] / "rlaif" / "samples" / "comparisons.jsonl"
GENERAL = load_template("general")
TOPICS = (
    "bread and yeast",
    "tax on a house",
    "the moons of Jupiter",
    "a sprained ankle",
    "chess openings",
    "rust on a bicycle",
)


def exemplar(n: int, prompt: str | None = None) -> Exemplar:
    return Exemplar(
        prompt=prompt or f"Question {n}?",
        better=f"Good {n}.",
        worse=f"Bad {n}.",
        rationale="{better} is right, and {worse} is not; {better} wins.",
    )


def shots(count: int, how: Any = "fixed", seed: int = 0, of: int = 10) -> Shots:
    return Shots(Exemplars(name="made", exemplars=tuple(exemplar(n) for n in range(of))), count, how, seed)


def first_is_better(found: list[dict[str, str]]) -> list[bool]:
    return [e["response_1"].startswith("Good") for e in found]


def written(folder: Path, **changes: Any) -> Path:
    """An exemplar file of three, the second of them changed; a value of None takes the field away."""
    content = [exemplar(n).model_dump() for n in range(3)]
    content[1] = {k: v for k, v in {**content[1], **changes}.items() if v is not None}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"exemplars": content}), encoding="utf-8")
    return path


def prompts_of(path: Path, out: Path, **knobs: Any) -> list[tuple[str, ...]]:
    """The user messages that each row is asked with, of both orders."""
    seen: list[Request] = []

    class Listening(MockEngine):
        async def complete(self, request: Request) -> Completion:
            seen.append(request)
            return await super().complete(request)

    rows = label(path, out, Listening(), **knobs)
    texts = [request.messages[-1]["content"] for request in seen]
    return [tuple(text for text in texts if f"\n{row['response_a']}\n" in text) for row in rows]


# ------------------------------------------------------------ sides


@pytest.mark.parametrize("how", ["fixed", "random", "nearest"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_the_better_response_stands_first_in_half_of_the_exemplars(how: str, count: int) -> None:
    odd = []
    for seed in range(60):
        for row in range(1 if how == "fixed" else 3):
            found = shots(count, how, seed).choose("Question?", f"row {row}", GENERAL, "off")
            assert len(found) == count
            first = sum(first_is_better(found))
            assert first in (count // 2, (count + 1) // 2)
            odd.append(first > count // 2)
    if count % 2:
        assert abs(sum(odd) - len(odd) / 2) < 4 * (len(odd) / 4) ** 0.5


def test_sides_are_drawn_for_each_place_so_that_none_gives_the_answer_away() -> None:
    for place in range(4):
        first = sum(first_is_better(shots(4, "random", 1).choose("?", f"{n}", GENERAL, "off"))[place] for n in range(400))
        assert abs(first - 200) < 4 * 10


def test_the_choice_that_is_shown_is_the_side_of_the_better_one_or_of_the_worse_as_the_template_asks(tmp_path: Path) -> None:
    worse = tmp_path / "worse.jinja"
    worse.write_text('---\nasks_for: worse\nchoices: ["A", "B"]\n---\n{% extends "pairwise/_layout.jinja" %}')
    seen = set()
    for template, right in ((GENERAL, {True: "1", False: "2"}), (load_template(str(worse)), {True: "B", False: "A"})):
        for found in (shots(5, "random").choose("?", f"{n}", template, "off") for n in range(5)):
            for shown in found:
                better_first = shown["response_1"].startswith("Good")
                assert shown["choice"] == right[better_first]
                assert shown["response_2"].startswith("Bad" if better_first else "Good")
                seen.add(shown["choice"])
    assert seen == {"1", "2", "A", "B"}


def test_a_rationale_is_there_with_chain_of_thought_only_and_names_the_responses_by_their_sides() -> None:
    sides = set()
    for cot in ("off", "two-call", "one-call"):
        for shown in shots(4).choose("?", "row", GENERAL, cot):
            right, wrong = ("1", "2") if shown["response_1"].startswith("Good") else ("2", "1")
            said = f"Response {right} is right, and Response {wrong} is not; Response {right} wins."
            assert shown["rationale"] == ("" if cot == "off" else said)
            sides.add(right)
    assert sides == {"1", "2"}


# ------------------------------------------------------------ which ones


def test_fixed_exemplars_are_the_first_of_the_file_and_the_same_for_all_rows() -> None:
    found = [shots(3).choose(f"Prompt {n}", f"row {n}", GENERAL, "off") for n in range(20)]
    assert [shown["prompt"] for shown in found[0]] == ["Question 0?", "Question 1?", "Question 2?"]
    assert all(other == found[0] for other in found)


def test_prompts_with_fixed_exemplars_share_their_beginning(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(6, seed=1))
    for cot in ("off", "one-call"):
        texts = [t for row in prompts_of(path, tmp_path / f"{cot}.jsonl", shots=3, cot=cot) for t in row]
        assert len(texts) == 12
        last = "Now the comparison that you are to judge.\n\n<prompt>\np"
        heads = {text[: text.index(last) + len(last)] for text in texts}
        assert len(heads) == 1
        assert heads.pop().count("</example>") == 3


def test_random_exemplars_are_drawn_by_seed_and_row() -> None:
    drawn = {n: shots(3, "random").choose("?", f"row {n}", GENERAL, "off") for n in range(200)}
    assert drawn[7] == shots(3, "random").choose("?", "row 7", GENERAL, "off")
    assert drawn[7] != shots(3, "random", seed=1).choose("?", "row 7", GENERAL, "off")
    names = [frozenset(e["prompt"] for e in found) for found in drawn.values()]
    assert all(len(some) == 3 for some in names)
    assert len(set(names)) > 60  # of 120 sets
    counts = Counter(name for some in names for name in some)
    assert all(abs(counts[f"Question {n}?"] - 60) < 4 * (200 * 0.3 * 0.7) ** 0.5 for n in range(10))


@pytest.mark.parametrize("topic", TOPICS)
def test_the_exemplar_on_the_rows_topic_comes_last(topic: str) -> None:
    file = Exemplars(name="made", exemplars=tuple(exemplar(n, f"Tell me about {t}.") for n, t in enumerate(TOPICS)))
    prompt = f"What should one know about {topic}?"
    for count in (1, 2, 3):
        found = Shots(file, count, "nearest").choose(prompt, "row", GENERAL, "off")
        assert found[-1]["prompt"] == f"Tell me about {topic}."
    # Among all of them, the nearer an exemplar the later it comes.
    mixed = f"Is {topic} like {TOPICS[0]}?"
    found = Shots(file, len(TOPICS), "nearest").choose(mixed, "row", GENERAL, "off")
    assert {e["prompt"] for e in found[-2:]} >= {f"Tell me about {topic}.", f"Tell me about {TOPICS[0]}."}


@pytest.mark.parametrize("prompts", [("2+2?", "3+3?", "?"), ("A", "B", "C"), ("…", "—", "!")])
def test_prompts_without_a_word_have_a_nearest_exemplar_too(prompts: tuple[str, ...]) -> None:
    file = Exemplars(name="made", exemplars=tuple(exemplar(n, p) for n, p in enumerate(prompts)))
    assert len(Shots(file, 2, "nearest").choose("A = ?", "row", GENERAL, "off")) == 2
    assert len(Shots(file, 2, "nearest").choose("", "row", GENERAL, "off")) == 2


@pytest.mark.parametrize("how", ["fixed", "random", "nearest"])
def test_an_exemplar_with_the_rows_own_prompt_is_never_shown(how: str) -> None:
    for n in range(10):
        for own in (f"Question {n}?", f"  Question {n}?\n"):
            for count in (3, 10):
                found = shots(count, how).choose(own, f"row {n}", GENERAL, "off")
                assert f"Question {n}?" not in [e["prompt"] for e in found]
                assert len(found) == min(count, 9)
                assert abs(2 * sum(first_is_better(found)) - len(found)) <= 1


@pytest.mark.parametrize("choose", ["fixed", "random", "nearest"])
def test_both_orders_of_a_row_are_shown_the_same_exemplars(tmp_path: Path, choose: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", planted(6, seed=1))
    pairs = prompts_of(path, tmp_path / "o.jsonl", shots=3, choose=choose)
    heads = []
    for one, other in pairs:
        heads.append(one.partition("Now the comparison")[0])
        assert heads[-1] == other.partition("Now the comparison")[0]
        assert one != other
    assert (len(set(heads)) > 1) == (choose != "fixed")  # of the others, the row draws the sides at least


# ------------------------------------------------------------ files


@pytest.mark.parametrize("name", listed("prompts/exemplars"))
def test_the_shipped_exemplars_give_nothing_away(name: str) -> None:
    file = load_exemplars(name)
    assert len(file.exemplars) >= 8
    assert file.description
    longer = sum(len(e.better) > len(e.worse) for e in file.exemplars)
    assert abs(longer - len(file.exemplars) / 2) <= 1
    assert len({e.prompt for e in file.exemplars}) == len(file.exemplars)
    sample = {row["prompt"].strip() for row in read_jsonl(SAMPLE)}
    for e in file.exemplars:
        assert "{better}" in e.rationale
        assert "{worse}" in e.rationale
        assert not re.search(r"response [12ab]\b|\b(?:first|second) response\b", e.rationale, re.IGNORECASE)
        assert e.better.strip() != e.worse.strip()
        assert e.prompt.strip() not in sample


def test_every_shipped_template_that_shows_exemplars_names_a_file_that_is_there() -> None:
    assert listed("prompts/exemplars") == ["harmless", "helpful", "summary"]
    for name, file in (("harmless-base", "harmless"), ("helpful-detailed", "helpful"), ("summary-base", "summary")):
        assert load_template(name).exemplars == file
        assert Labeler(template=name, shots=2).pairwise().shots == Shots(load_exemplars(file), 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rationale": "Only {better} is named."}, "rationale: must name both {better} and {worse}"),
        ({"worse": None}, "worse: Field required"),
        ({"better": ""}, "better: String should have at least 1 character"),
        ({"prompt": " \n"}, "prompt: String should have at least 1 character"),
        ({"prompt": 7}, "prompt: Input should be a valid string"),
        ({"choice": "1"}, "choice: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_exemplar_is_named_with_file_number_and_field(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UsageError) as caught:
        load_exemplars(str(path))
    assert str(caught.value).startswith(f"{path}: exemplars 2 {words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("exemplars: []", "exemplars: Tuple should have at least 1 item"),
        ("examples: []", "exemplars: Field required"),
        ("- prompt: x", "must be 'name: value' lines"),
        ("exemplars: [", "are not YAML"),
    ],
)
def test_a_file_that_holds_no_exemplars_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_exemplars(str(path))
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)


def test_more_shots_than_there_are_exemplars_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shots 11: there are 10 exemplars in made"):
        shots(11)
    path = write_jsonl(tmp_path / "d.jsonl", make_rows(2))
    done = cli("label", path, "-o", tmp_path / "o.jsonl", "--engine", "mock", "--shots", "4", "--exemplars", written(tmp_path))
    assert done.returncode == 2
    assert "--shots 4: there are 3 exemplars in mine" in done.stderr


def test_a_template_that_names_no_exemplars_asks_for_a_file(tmp_path: Path) -> None:
    bare = tmp_path / "bare.jinja"
    bare.write_text("{% block sample %}{{ prompt }} {{ response_1 }} {{ response_2 }}{% endblock %}")
    with pytest.raises(UsageError, match=r"--shots 2: the template .*bare.jinja names no exemplars: give --exemplars"):
        Labeler(template=str(bare), shots=2).pairwise()


def test_settings_tell_which_exemplars_and_their_hash_follows_the_content(tmp_path: Path) -> None:
    one, two = load_exemplars(str(written(tmp_path))), load_exemplars(str(written(tmp_path, better="Better 1.")))
    assert one.hash != two.hash
    assert Shots(one, 2).settings() == {"exemplars": "mine", "hash": one.hash, "count": 2, "how": "fixed"}


def test_rendering_shows_each_exemplar_whole(tmp_path: Path) -> None:
    template: Template = load_template("helpful-base")
    found = shots(2).choose("?", "row", template, "two-call")
    ((message,), _) = template.render("thinking", prompt="P?", response_1="one", response_2="two", row={}, exemplars=found)
    parts = re.findall(r"<example>\n(.*?)\n</example>", message["content"], re.DOTALL)
    for part, shown in zip(parts, found, strict=True):
        assert part == (
            f"<prompt>\n{shown['prompt']}\n</prompt>\n\n<response_1>\n{shown['response_1']}\n</response_1>\n\n"
            f"<response_2>\n{shown['response_2']}\n</response_2>\n\n{shown['rationale']}\n"
            f"Preferred response: <response_{shown['choice']}>"
        )
