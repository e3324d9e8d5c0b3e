"""Runs of reinforcement learning that are killed or interrupted, and go on: they end as a run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.train.checkpoints import in_order, is_complete, newest
from tests.conftest import read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny
from tests.train.children import KILLED, Death, start, train

STEPS = 5
BASE: dict[str, Any] = {
    "rollouts": 8,
    "generate_batch": 4,
    "batch_size": 4,
    "updates": 2,
    "max_new_tokens": 6,
    "max_length": 64,
    "max_steps": STEPS,
    "save_steps": 2,
    "keep": 2,
    "learning_rate": 2e-3,
    "scheduler": "cosine",
    "sample_steps": 2,
    "device": "cpu",
}
VOWELS = [{"kind": "function", "function": "vowels.py:share"}]
ADAPTIVE = {"kl_control": "adaptive", "kl_target": 0.5, "kl_horizon": 40}
MOVES = {"reference_update": 0.5, "reference_steps": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo, ahead": ("ppo", {**ADAPTIVE, "ahead": 1, "value_learning_rate": 1e-3}),
    "ppo, shared, pretraining": ("ppo", {"value": "shared", "surrogate": "penalty", "ptx": {"data": "ptx.jsonl"}}),
    "ppo, evaluated": ("ppo", {**MOVES, "eval_share": 0.25, "eval_steps": 2, "held_out": VOWELS, "log_steps": 3}),
    "lora": ("ppo", {**MOVES, "lora": {"r": 2}, "log_steps": 3}),
    "reinforce": ("ppo", {"algorithm": "reinforce", "updates": None, "ahead": 1}),
    "p3o": ("ppo", {"algorithm": "p3o", "lora": {"r": 2, "merge": False}}),
    "trpo": ("ppo", {"algorithm": "trpo", "updates": None, "step_kl": 0.05}),
    "online": ("online", {"judge": "judge.yaml", "reward": None, "ahead": 1, "updates": 1}),
}

LEARN = "rlaif.rl.loop.Loop._made"
"""Called for each step."""

MOMENTS = (
    Death("rlaif.rl.loop.Loop._save"),
    Death("torch.save"),
    Death("torch.save", after=True),
    Death("rlaif.train.checkpoints.seal"),
    Death("rlaif.rl.loop.seal", after=True),
)
"""In the order of time, while a checkpoint is written; it is complete after the last of them."""

Settings = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of a case, and a run's folder: the kind of training and its settings."""
    place = tmp_path_factory.mktemp("resume")
    tiny = save_tiny(place / "tiny")
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"Q {n}?"} for n in range(12)])
    write_jsonl(place / "ptx.jsonl", [{"prompt": f"Q {n}?", "completion": f" A {n}."} for n in range(9)])
    (place / "judge.yaml").write_text(yaml.safe_dump({"engine": "mock"}))
    (place / "vowels.py").write_text(
        "def share(prompts, responses):\n    return [10 * sum(c in 'aeiou' for c in r) / max(len(r), 1) for r in responses]\n"
    )

    def made(case: str, out: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        kind, own = CASES[case]
        common = {**BASE, "model": str(tiny), "data": str(place / "prompts.jsonl"), "out": str(place / case / out)}
        found = {**common, "reward": VOWELS, **own, **changes}
        text = json.dumps({name: value for name, value in found.items() if value is not None})
        for name in ("vowels.py", "ptx.jsonl", "judge.yaml"):
            text = text.replace(f'"{name}', f'"{place / name}')
        return kind, json.loads(text)

    return made


def left_alone(settings: Settings, case: str) -> Callable[[], dict[str, Any]]:
    """Begin the run that nothing happens to, unless a test did that before; what comes back waits for its end."""
    kind, run = settings(case, "alone")
    if Path(run["out"], "run.json").exists():
        return lambda: run
    wait = start(kind, run)

    def ended() -> dict[str, Any]:
        code, said = wait()
        assert code == 0, said
        return run

    return ended


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights bit by bit, samples, and each logged figure but for those of time."""
    found, wanted = (sorted(Path(run["out"], "model").rglob("*.safetensors")) for run in (one, other))
    assert [path.name for path in found] == [path.name for path in wanted]
    assert found
    for a, b in zip(found, wanted, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert metrics(one) == metrics(other)
    assert [Path(run["out"], "samples.jsonl").read_text() for run in (one, other)].count(samples(one)) == 2
    reports = [json.loads(Path(run["out"], "run.json").read_text()) for run in (one, other)]
    assert len({json.dumps([part["steps"] for part in report["parts"]]) for report in reports}) == 1


def metrics(run: dict[str, Any]) -> list[dict[str, Any]]:
    rows = read_jsonl(Path(run["out"], "metrics.jsonl"))
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def samples(run: dict[str, Any]) -> str:
    return Path(run["out"], "samples.jsonl").read_text()


def checkpoints(run: dict[str, Any]) -> Path:
    return Path(run["out"], "parts", "train", "checkpoints")


@pytest.mark.parametrize("case", CASES)
def test_killed_twice_and_resumed_it_is_the_same_run(case: str, settings: Settings) -> None:
    seed = int.from_bytes(os.urandom(4))
    draw = random.Random(seed)
    deaths = Death(LEARN, draw.randint(1, STEPS)), draw.choice(MOMENTS)
    print(f"seed {seed}: {deaths}")
    alone = left_alone(settings, case)
    kind, killed = settings(case, "killed")
    for number, death in enumerate(deaths):
        code, said = train(kind, killed, resume=number > 0, death=death)
        assert code == KILLED, said
    code, said = train(kind, killed, resume=True)
    assert code == 0, said
    assert_same(killed, alone())
