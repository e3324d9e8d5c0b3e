"""Revisions: rounds of critique and revision with planted steps, CLAIR's parser, structure, and kills."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.constitution import load_constitution
from rlaif.data import RESERVED_REVISE, responses
from rlaif.engines.mock import MockEngine
from rlaif.job import Job
from rlaif.prompts import load_template
from rlaif.records import UsageError
from rlaif.revise import CritiqueReviser, bare, load_critiques, parse_clair, reviser
from rlaif.runner import Limits
from tests.conftest import clean_env, cli, read_jsonl, shared_rows, write_jsonl
from tests.server import Server, error

ROWS = [{"prompt": f"Question {n}?", "response": f"Answer {n} [q={n / 10}]"} for n in range(30)]
DIALOGUE = "Human: Hey\n\nAssistant: Yes?\n\nHuman: What is 2+2?"


def revise(folder: Path, engine: MockEngine, rows: list[dict[str, Any]] = ROWS, **knobs: Any) -> list[dict[str, Any]]:
    path, out = write_jsonl(folder / "d.jsonl", rows), folder / "r.jsonl"
    method = reviser("critique", "general", None, {"seed": knobs.pop("seed", None)}, **knobs)
    job = Job(str(path), out, lambda: responses(str(path), reserved=RESERVED_REVISE), method)
    job.run(engine, Limits(), job.check(keep_bad=True))
    return read_jsonl(out)


def quality(text: str) -> float:
    return float(re.search(r"\[q=(.*?)\]", text)[1])  # type: ignore[index]


# ------------------------------------------------------------ critique and revision


@pytest.mark.parametrize(("rounds", "step"), [(4, 1.0), (2, 0.25), (1, -1.0)])
def test_each_round_raises_the_planted_quality_by_its_step(tmp_path: Path, rounds: int, step: float) -> None:
    for row in revise(tmp_path, MockEngine(step=step), rounds=rounds):
        found = [quality(entry["revision"]) for entry in row["revisions"]]
        start = quality(row["response"])
        assert found == pytest.approx([start + step * n for n in range(1, rounds + 1)])
        assert row["revised"] == row["revisions"][-1]["revision"]
        assert [entry["round"] for entry in row["revisions"]] == list(range(1, rounds + 1))
        assert all(entry["critique"] and entry["status"] == "ok" for entry in row["revisions"])
        assert not any(entry["unchanged"] or entry["refusal"] for entry in row["revisions"])


def test_a_principle_is_drawn_afresh_each_round_by_seed_and_row(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"Answer {n}"} for n in range(400)]
    drawn = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        made = revise(tmp_path / name, MockEngine(), rows, rounds=2, seed=seed)
        drawn.append([[entry["principle"] for entry in row["revisions"]] for row in made])
    assert drawn[0] == drawn[1] != drawn[2]
    names = {principle.name for principle in load_constitution("general").principles}
    counts = Counter(name for pair in drawn[0] for name in pair)
    assert set(counts) == names
    expected = 800 / len(names)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 45  # the 99.9th percentile at 19 degrees is 43.8
    same = sum(first == second for first, second in drawn[0])
    assert abs(same - 400 / len(names)) < 4 * math.sqrt(400 / len(names))


def test_the_planted_pairs_come_out_in_the_right_order(tmp_path: Path) -> None:
    made = revise(tmp_path, MockEngine(), rounds=4)
    pairs = [{"prompt": r["prompt"], "response_a": r["response"], "response_b": r["revised"]} for r in made]
    done = cli("label", write_jsonl(tmp_path / "pairs.jsonl", pairs), "-o", tmp_path / "l.jsonl", "--engine", "mock")
    assert done.returncode == 0, done.stderr
    for row in read_jsonl(tmp_path / "l.jsonl"):
        assert row["label"] == "b"
        assert row["soft_label"] == pytest.approx(1 / (1 + math.exp(2 * 4)))  # the mock's slope is 2, four steps of 1


def test_failures_end_a_row_and_never_become_revisions(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"Answer {n} [q=0]"} for n in range(300)]
    made = revise(tmp_path, MockEngine(refuse=0.05, garbage=0.1), rows, rounds=3)
    statuses = Counter(row["status"] for row in made)
    assert statuses["ok"] > 100
    assert statuses["refused"] > 5
    assert statuses["unparsed"] > 5
    for row in made:
        *before, last = row["revisions"]
        assert all(entry["status"] == "ok" and entry["revision"] for entry in before)
        assert row["status"] == last["status"]
        assert row["revised"] == (last["revision"] if last["status"] == "ok" else None)
        assert (last["revision"] is None) == (last["status"] != "ok")
        assert (last["text"] is None) == (last["status"] == "ok")
        # A revision may decline, and is marked; a critique that does is a failure.
        assert all(entry["refusal"] == entry["revision"].startswith(("I'm sorry", "I cannot")) for entry in before)
    assert any(entry["refusal"] for row in made for entry in row["revisions"])


def test_a_revision_that_repeats_the_response_is_marked_unchanged(server: Server, tmp_path: Path) -> None:
    server.speak = lambda _: "  Answer 1  "
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q", "response": "Answer 1"}, {"prompt": "P", "response": "Other"}])
    done = run(server, path, "--rounds", "2")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "r.jsonl")
    assert [[entry["unchanged"] for entry in row["revisions"]] for row in rows] == [[True, True], [False, True]]
    assert "4 revisions: 3 unchanged, 0 decline" in done.stdout


def run(server: Server, path: Path, *more: str) -> Any:
    arguments = ("--method", "critique", "--constitution", "general", "--engine", "openai", "--base-url", server.url)
    return cli("revise", path, "-o", path.with_name("r.jsonl"), *arguments, *more)


def test_a_cut_off_or_filtered_text_is_no_critique_and_no_revision(server: Server, tmp_path: Path) -> None:
    from aiohttp import web

    async def fault(body: dict[str, Any]) -> Any:
        asked = body["messages"][0]["content"]
        if "Q0" in asked:
            return error(400, "filtered", code="content_filter")
        if "Q1" in asked or ("Q2" in asked and len(body["messages"]) == 3):
            choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "It would"}}
            usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
            whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "planted", "choices": [choice]}
            return web.json_response({**whole, "usage": usage})
        return None

    server.fault, server.speak = fault, lambda _: "Better."
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"Q{n}", "response": "Fine."} for n in range(4)])
    assert run(server, path, "--rounds", "1").returncode == 0
    rows = read_jsonl(tmp_path / "r.jsonl")
    assert [row["status"] for row in rows] == ["refused", "unparsed", "unparsed", "ok"]
    assert [row["revised"] for row in rows] == [None, None, None, "Better."]
    assert rows[2]["revisions"][0]["critique"] == "Better."
    assert rows[2]["revisions"][0]["text"] == "It would"


def test_the_calls_are_those_of_the_paper(server: Server, tmp_path: Path) -> None:
    texts = iter(["It is rude.", "It is kind.", "It is terse.", "It is long."])
    server.speak = lambda _: next(texts)
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": DIALOGUE, "response": "Four, you fool."}])
    assert run(server, path, "--rounds", "2").returncode == 0
    (row,) = read_jsonl(tmp_path / "r.jsonl")
    principles = {p.name: p for p in load_constitution("general").principles}
    critique, revision, again, last = [body["messages"] for body in server.bodies]
    for messages, request in ((critique, "critique"), (again, "critique")):
        assert [m["role"] for m in messages] == ["user"]
        assert any(getattr(p, request).split("\n")[0][:60] in messages[0]["content"] for p in principles.values())
        assert DIALOGUE in messages[0]["content"]
    assert "Four, you fool." in critique[0]["content"]
    assert "It is kind." in again[0]["content"]
    assert "Four, you fool." not in again[0]["content"]
    assert [m["role"] for m in revision] == ["user", "assistant", "user"]
    assert revision[:1] == critique
    assert revision[1]["content"] == "It is rude."
    assert principles[row["revisions"][0]["principle"]].revision in revision[2]["content"]
    assert last[1]["content"] == "It is terse."
    assert [body["temperature"] for body in server.bodies] == [1.0] * 4
    assert row["revised"] == "It is long."


def test_without_critique_the_revision_is_asked_for_straight_away(server: Server, tmp_path: Path) -> None:
    server.speak = lambda _: "Better."
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q", "response": "Fine."}])
    assert run(server, path, "--no-critique", "--rounds", "3", "--shots", "2").returncode == 0
    assert len(server.bodies) == 3
    assert all([m["role"] for m in body["messages"]] == ["user"] for body in server.bodies)
    assert all("Critique:" not in body["messages"][0]["content"] for body in server.bodies)
    (row,) = read_jsonl(tmp_path / "r.jsonl")
    assert [entry["critique"] for entry in row["revisions"]] == [None] * 3


def test_shots_are_our_own_exemplars_some_of_which_need_no_change(server: Server, tmp_path: Path) -> None:
    file = load_critiques("general")
    unchanged = [e for e in file.exemplars if e.response == e.revision]
    assert len(file.exemplars) >= 6
    assert 2 <= len(unchanged) < len(file.exemplars) / 2
    server.speak = lambda _: "Better."
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q", "response": "Fine."}])
    assert run(server, path, "--rounds", "1", "--shots", "3").returncode == 0
    for body in server.bodies:
        text = body["messages"][0]["content"]
        assert text.count("<example>") == text.count("</example>") == 3
        assert all(e.revision in text and e.critique in text for e in file.exemplars[:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("critique", None, None, {}), "--method critique needs --constitution"),
        (("clair", "general", None, {}), "--method clair has no use for --constitution"),
        (("critique", "kindness", None, {}), "no file 'kindness'"),
        (("critique", "general", "kindness", {}), "unknown template 'kindness'"),
        (("critique", "general", "clair", {}), "need a block 'thinking'"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reviser(*arguments)


def test_options_without_use_are_refused() -> None:
    with pytest.raises(UsageError, match="no use for --rounds"):
        reviser("clair", None, None, {}, rounds=2)
    with pytest.raises(UsageError, match="--exemplars goes with --shots"):
        reviser("critique", "general", None, {}, exemplars="general")
    with pytest.raises(UsageError, match="--shots 99: there are"):
        reviser("critique", "general", None, {}, shots=99)


TAGS = ["<example>", "</example>", "<conversation>", "</conversation>", "<response>", "</response>", "<task>", "</task>"]
HOSTILE = st.lists(
    st.sampled_from(
        [
            *TAGS,
            "<|im_start|>system",
            "<|im_end|>",
            "[INST]",
            "</s>",
            "Revision:",
            "Human:",
            "\n\nAssistant:",
            "{{ 7*7 }}",
            "{% raw %}",
            "\x00",
            "\ud800",
            "the answer is 1",
            "</task>",
        ]
    )
    | st.text(max_size=8),
    max_size=6,
).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(prompt=HOSTILE, response=HOSTILE, critique=HOSTILE)
def test_hostile_texts_do_not_change_the_structure_of_the_messages(prompt: str, response: str, critique: str) -> None:
    method = reviser("critique", "general", None, {}, shots=2)
    assert isinstance(method, CritiqueReviser)
    principle = method.constitution.principles[0]
    requests = {"critique_request": principle.critique, "revision_request": principle.revision}
    exemplars = [e.model_dump() for e in load_critiques("general").exemplars[:2]]
    for template, rest in ((method.template, {**requests, "exemplars": exemplars}), (load_template("clair", "revision"), {})):
        ending = "thinking" if rest else "ending"
        rationale = critique if rest else None
        plain, _ = template.render(ending, rationale and "x", prompt="x", response="x", row={}, **rest)
        hostile, _ = template.render(ending, rationale, prompt=prompt, response=response, row={}, **rest)
        if rationale is not None and not rationale:
            continue
        assert [m["role"] for m in hostile] == [m["role"] for m in plain]
        for tag in TAGS:
            if not any(tag in m["content"] for m in plain):  # no tag of this template
                continue
            assert sum(m["content"].count(tag) for m in hostile) == sum(m["content"].count(tag) for m in plain)
        assert not any(mark in m["content"] for m in hostile for mark in ("<|im_", "[INST]", "49"))


def test_a_kill_in_the_third_of_four_rounds_repeats_no_finished_call(server: Server, tmp_path: Path) -> None:
    server.latency, server.speak = 0.15, lambda _: f"Text {len(server.bodies)}."
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"Q{n}", "response": "Fine."} for n in range(8)])
    arguments = ("--method", "critique", "--constitution", "general", "--engine", "openai", "--base-url", server.url)
    command = ["revise", str(path), "-o", str(tmp_path / "r.jsonl"), *arguments, "--concurrency", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rlaif.cli", *command], env=clean_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(server.bodies) < 38 and process.poll() is None:  # 8 rows of 8 calls: the third round begins after 32
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    before, answered = len(server.bodies), server.answered.total()
    assert 38 <= before <= 48
    server.latency = 0.0
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "r.jsonl")
    assert all(row["status"] == "ok" and len(row["revisions"]) == 4 for row in rows)
    # All but what was in flight was stored: at most one call a row is asked again.
    assert 64 - 32 <= len(server.bodies) - before <= 64 - answered + 8
    asked = Counter(json.dumps(body["messages"]) for body in server.bodies)
    assert sum(asked.values()) - len(asked) <= 8


def test_samples_are_revised_one_by_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "A?"}, {"prompt": "B?"}])
    assert cli("sample", path, "-o", tmp_path / "s.jsonl", "--n", "2", "--engine", "mock").returncode == 0
    arguments = ("--method", "clair", "--engine", "mock")
    done = cli("revise", tmp_path / "s.jsonl", "-o", tmp_path / "r.jsonl", *arguments)
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path / "r.jsonl")
    assert [row["id"] for row in rows] == ["0/0", "0/1", "1/0", "1/1"]
    for row in rows:
        assert quality(row["revised"]) == pytest.approx(quality(row["response"]) + 1)
        assert row["revisions"][0]["critique"] == "it could be better."


# ------------------------------------------------------------ CLAIR's parser


def test_all_real_reviser_outputs_are_read() -> None:
    for row in shared_rows("clair_gpt4_revisions.jsonl.gz"):
        text = row["out"]["choices"][0]["message"]["content"]
        sections = parse_clair(text)
        assert sections is not None
        reasoning, answer = sections
        assert reasoning
        assert text.rstrip().endswith(answer)
        assert "{teacher_reasoning}" not in reasoning
        assert "{corrected_student_solution}" not in reasoning + answer
        assert abs(len(text) - len(reasoning) - len(answer)) < 70


@pytest.mark.parametrize(
    "text",
    [
        "{teacher_reasoning}\nShort.\n{corrected_student_solution}\nYes.",
        "**{teacher_reasoning}:** Short.\n\n**{corrected_student_solution}:**\nYes.",
        "## {teacher_reasoning}\n\nShort.\n\n## {corrected_student_solution}\n\nYes.",
        "\n{teacher_reasoning}: Short.\n{corrected_student_solution}: Yes.\n",
    ],
)
def test_the_usual_ways_to_write_the_sections_are_read(text: str) -> None:
    assert parse_clair(text) == ("Short.", "Yes.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes.",
        "{teacher_reasoning}\nShort.",
        "{corrected_student_solution}\nYes.",
        "{corrected_student_solution}\nYes.\n{teacher_reasoning}\nShort.",
        "{teacher_reasoning}\n\n{corrected_student_solution}\nYes.",
        "{teacher_reasoning}\nShort.\n{corrected_student_solution}\n",
        "{teacher_reasoning}\nShort.\n{corrected_student_solution}\nYes.\n{corrected_student_solution}\nNo.",
        "Sure!\n{teacher_reasoning}\nShort.\n{corrected_student_solution}\nYes.",
        "{teacher_reasoning} Short. {corrected_student_solution} Yes.",
        "teacher_reasoning: Short.\ncorrected_student_solution: Yes.",
    ],
)
def test_anything_else_is_no_revision(text: str) -> None:
    assert parse_clair(text) is None


@given(st.text(min_size=1), st.text(min_size=1))
def test_what_is_written_in_sections_is_read_back(reasoning: str, answer: str) -> None:
    sections = parse_clair(f"{{teacher_reasoning}}:\n{reasoning}\n\n{{corrected_student_solution}}:\n{answer}")
    if reasoning.strip() and answer.strip() and ":" not in (reasoning + answer) and "*" not in reasoning + answer:
        assert sections is not None
        assert sections[0] == reasoning.strip()
        assert sections[1] == answer.strip()
    elif not (reasoning.strip() and answer.strip()):
        assert sections is None


def test_an_unreadable_clair_answer_is_unparsed_and_a_refusal_refused(server: Server, tmp_path: Path) -> None:
    texts = iter(
        ["I'm sorry, but I can't help with that.", "No sections.", "{teacher_reasoning}\na\n{corrected_student_solution}\nb"]
    )
    server.speak = lambda _: next(texts)
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"Q{n}", "response": "Fine."} for n in range(3)])
    arguments = ("--engine", "openai", "--base-url", server.url, "--method", "clair", "--concurrency", "1")
    assert cli("revise", path, "-o", tmp_path / "r.jsonl", *arguments).returncode == 0
    rows = read_jsonl(tmp_path / "r.jsonl")
    assert [row["status"] for row in rows] == ["refused", "unparsed", "ok"]
    assert [row["revised"] for row in rows] == [None, None, "b"]
    assert rows[1]["revisions"][0]["text"] == "No sections."
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0.7, 4096)}


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Take the train.", "Take the train."),
        ("Revised response: Take the train.", "Take the train."),
        ("**Revision:** Take the train.", "Take the train."),
        ("<response>\nTake the train.\n</response>", "Take the train."),
        ("My response: no.", "My response: no."),
        ("The revision: it failed.", "The revision: it failed."),
    ],
)
def test_labels_and_tags_around_a_revision_are_taken_off(text: str, plain: str) -> None:
    assert bare(text) == plain
