"""Judges that fail: no failure is learnt from, the reward rises all the same, and a judge that is gone ends a run cleanly."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from rlaif.rl.ppo import PpoLoop
from rlaif.train.checkpoints import newest
from rlaif.train.kinds import KINDS
from rlaif.train.run import run
from tests.conftest import read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny
from tests.server import Server, error
from tests.train.children import KILLED, Death, train

FUNCTIONS = """
import zlib
from pathlib import Path

calls = 0

def share(prompts, responses):
    return [10 * sum(c in "aeiou" for c in r) / max(len(r), 1) for r in responses]

def moody(prompts, responses):
    fates = [zlib.crc32((p + r).encode("utf-8", "replace")) % 5 for p, r in zip(prompts, responses)]
    return [None if fate == 0 else value for fate, value in zip(fates, share(prompts, responses))]

def silent(prompts, responses):
    global calls
    calls += 1
    away = calls > 4 and Path(__file__).with_name("away").exists()
    return [None] * len(responses) if away else share(prompts, responses)

def gone(prompts, responses):
    global calls
    calls += 1
    if calls > 2 and Path(__file__).with_name("away").exists():
        raise OSError("no route to host")
    return share(prompts, responses)
"""
BASE: dict[str, Any] = {
    "rollouts": 8,
    "generate_batch": 4,
    "batch_size": 8,
    "updates": 2,
    "max_new_tokens": 8,
    "max_length": 64,
    "max_steps": 6,
    "learning_rate": 3e-3,
    "beta": 0.02,
    "device": "cpu",
}

Settings = Callable[..., dict[str, Any]]


class Rater(Server):
    """Rates each response by a mark that its request settles."""

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        mark = zlib.crc32(json.dumps(body["messages"]).encode()) % 10
        self.digits = [0.91 if n == mark else 0.01 for n in range(10)]
        return super()._completion(body)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Settings:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Q {n}?"} for n in range(12)])
    (tmp_path / "functions.py").write_text(FUNCTIONS)

    def made(out: str, reward: Any, **changes: Any) -> dict[str, Any]:
        common = {**BASE, "model": str(tiny), "data": str(tmp_path / "prompts.jsonl"), "out": str(tmp_path / out)}
        return {**common, "reward": [term(tmp_path, reward)], **changes}

    return made


def term(folder: Path, reward: Any) -> dict[str, Any]:
    """A function of those above, or a rating by a labeler with these settings."""
    if isinstance(reward, str):
        return {"kind": "function", "function": f"{folder / 'functions.py'}:{reward}"}
    path = folder / "judge.yaml"
    path.write_text(yaml.safe_dump(reward))
    return {"kind": "rating", "labeler": str(path)}


@pytest.fixture
def server() -> Iterator[Rater]:
    with Rater() as found:
        yield found


def metrics(settings: dict[str, Any]) -> list[dict[str, Any]]:
    rows = read_jsonl(Path(settings["out"], "metrics.jsonl"))
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert metrics(one) == metrics(other)
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert Path(one["out"], name).read_bytes() == Path(other["out"], name).read_bytes()


def last_checkpoint(settings: dict[str, Any]) -> str:
    found = newest(Path(settings["out"], "parts", "train", "checkpoints"))
    assert found
    return found.name


def finished(settings: dict[str, Any], **told: Any) -> None:
    code, said = train("ppo", settings, **told)
    assert code == 0, said


# ---------------------------------------------------------------- some responses without a score

FAILING: dict[str, Any] = {
    "function": "moody",
    "garbage": {"engine": "mock", "options": {"garbage": 0.2, "refuse": 0.1}},
    "faults": {"engine": "mock", "options": {"garbage": 0.2, "faults": 0.3}},
}


@pytest.mark.parametrize("algorithm", ["ppo", "p3o"])
@pytest.mark.parametrize("judge", FAILING)
def test_a_failure_is_never_learnt_from(
    judge: str, algorithm: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, credited, learnt = [], [], []
    judged, credit, gradients = PpoLoop.judged, PpoLoop._credit, PpoLoop._gradients

    def spied_judged(loop: PpoLoop, *args: Any) -> Any:
        asked.append(judged(loop, *args))
        return asked[-1]

    def spied_credit(loop: PpoLoop, samples: Any) -> None:
        credited.append(samples)
        credit(loop, samples)

    def spied_gradients(loop: PpoLoop, samples: Any, *args: Any) -> None:
        learnt.append((loop.step, samples))
        gradients(loop, samples, *args)

    monkeypatch.setattr(PpoLoop, "judged", spied_judged)
    monkeypatch.setattr(PpoLoop, "_credit", spied_credit)
    monkeypatch.setattr(PpoLoop, "_gradients", spied_gradients)
    told = settings("out", FAILING[judge], algorithm=algorithm, rollouts=16, max_steps=2, judge_tries=4)
    run("ppo", KINDS["ppo"].model_validate(told))
    lines = metrics(told)
    assert sum(line["failed"] for line in lines) > 2
    for step, (line, samples) in enumerate(zip(lines, asked, strict=True)):
        known = {sample.number for sample in samples if sample.scored.value is not None}
        assert line["failed"] == len(samples) - len(known)
        assert line["reward"] == pytest.approx(sum(s.score for s in samples if s.number in known) / len(known))
        wanted = {number for number in known if number ^ 1 in known} if algorithm == "p3o" else known
        assert {sample.number for sample in credited[step]} == wanted
        seen = Counter(sample.number for at, some in learnt if at == step for sample in some)
        assert seen == Counter(dict.fromkeys(wanted, BASE["updates"]))


@pytest.mark.parametrize("reward", ["share", "moody"])
@pytest.mark.parametrize("seed", range(5))
def test_the_reward_rises_with_and_without_failures(reward: str, seed: int, settings: Settings) -> None:
    told = settings("out", reward, seed=seed, rollouts=24, generate_batch=24, max_steps=5)
    finished(told)
    lines = metrics(told)
    assert (sum(line["failed"] for line in lines) > 10) == (reward == "moody")
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.5


# ---------------------------------------------------------------- a judge that is gone


@pytest.mark.parametrize("ahead", [0, 1])
def test_after_three_silent_steps_a_run_ends_and_goes_on_from_before_them(
    ahead: int, settings: Settings, tmp_path: Path
) -> None:
    alone, silent = (settings(out, "silent", ahead=ahead, save_steps=1) for out in ("alone", "silent"))
    away = tmp_path / "away"
    away.touch()
    code, said = train("ppo", silent)
    assert code == 1, said
    assert said.endswith("no response of 3 steps could be judged: function: the function gave none\n")
    assert [line.get("failed") for line in metrics(silent)] == [0, 0, 8, 8]
    assert last_checkpoint(silent) == "checkpoint-2"
    away.unlink()
    finished(silent, resume=True)
    finished(alone)
    assert_same(silent, alone)


def test_a_held_out_judge_that_is_gone_leaves_the_step_to_be_evaluated(settings: Settings, tmp_path: Path) -> None:
    evaluated = {"held_out": [term(tmp_path, "gone")], "eval_share": 0.25, "eval_steps": 2, "log_steps": 3}
    alone, ended = (settings(out, "share", **evaluated) for out in ("alone", "ended"))
    away = tmp_path / "away"
    away.touch()
    code, said = train("ppo", ended)
    assert code == 1, said
    assert "functions.py:gone failed: OSError: no route to host" in said
    assert last_checkpoint(ended) == "checkpoint-6"  # the third evaluation was the last step's
    assert [line["step"] for line in metrics(ended)] == [2, 3, 4]
    away.unlink()
    finished(ended, resume=True)
    finished(alone)
    assert_same(ended, alone)


def remote(server: Server, **more: Any) -> dict[str, Any]:
    return {"engine": "openai", "base_url": server.url, "model": server.model, "concurrency": 2, **more}


def test_a_judge_that_is_slow_or_busy_is_waited_for(server: Rater, settings: Settings) -> None:
    told = {"max_steps": 3, "ahead": 1}
    alone = settings("alone", remote(server), **told)
    finished(alone)
    refused: Counter[str] = Counter()

    async def busy(body: dict[str, Any]) -> web.Response | None:
        key = json.dumps(body)
        refused[key] += 1
        again = zlib.crc32(key.encode()) % 3 == 0 and refused[key] < 3
        return error(429, "Rate limit reached", headers={"Retry-After": "0.02"}) if again else None

    server.latency, server.fault = 0.05, busy
    slow = settings("slow", remote(server), **told)
    finished(slow)
    assert max(refused.values()) == 3
    assert all(line["failed"] == 0 for line in metrics(slow))
    assert_same(slow, alone)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_judge_that_goes_away_and_comes_back(ahead: int, server: Rater, settings: Settings) -> None:
    told = {"max_steps": 4, "ahead": ahead, "judge_tries": 2}
    alone = settings("alone", remote(server), **told)
    finished(alone)
    server.bodies.clear()

    async def down(body: dict[str, Any]) -> web.Response | None:
        await asyncio.sleep(0)
        return error(503, "The server is down") if len(server.bodies) > 20 else None

    server.fault = down
    ended = settings("ended", remote(server), **told)
    code, said = train("ppo", ended)
    assert code == 1, said
    assert "no call gets through" in said.splitlines()[-1]
    assert "The server is down" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert last_checkpoint(ended) in ("checkpoint-1", "checkpoint-2")
    assert len(server.bodies) > 20 + 2  # it was tried again
    server.fault = None
    finished(ended, resume=True)
    assert_same(ended, alone)
    assert max(server.answered.values()) <= 2  # by each of the two runs once


# ---------------------------------------------------------------- rules that end a run


@pytest.mark.parametrize(
    "death",
    [None, Death("rlaif.rl.loop.Loop.save_model"), Death("rlaif.train.run.put_in_place")],
    ids=["not killed", "killed before the model is written", "killed before the end"],
)
def test_a_run_that_a_rule_stopped_does_not_go_on(death: Death | None, settings: Settings) -> None:
    told = settings("out", "share", stop_when={"kl": 0.5})
    code, said = train("ppo", told, death=death)
    assert code == (KILLED if death else 0), said
    finished(told, resume=True, death=Death("rlaif.rl.loop.Loop.roll"))  # which would kill it
    report = json.loads(Path(told["out"], "run.json").read_text())
    steps = len(metrics(told))
    assert steps < BASE["max_steps"]
    assert report["evaluation"]["stopped"].endswith(f"at step {steps}: above 0.5 (stop_when kl)")
    assert report["parts"][0]["steps"] == steps
    assert Path(told["out"], "model", "model.safetensors").exists()


def test_a_run_that_no_rule_stopped_says_so(settings: Settings) -> None:
    told = settings("out", "share", stop_when={"kl": 1e6}, max_steps=2)
    finished(told)
    assert json.loads(Path(told["out"], "run.json").read_text())["evaluation"]["stopped"] is None
