"""Several processes, one run: what one process learns with batches as large as theirs together; they fail together too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlaif.train.checkpoints import newest
from tests.conftest import read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny
from tests.train.children import KILLED, Death, start, train, train_together

FUNCTIONS = """
import os
from pathlib import Path

calls = 0
RANK = os.environ.get("RANK")

def share(prompts, responses):
    return [10 * sum(c in "aeiou" for c in r) / max(len(r), 1) for r in responses]

def half(prompts, responses):
    global calls
    calls += 1
    fails = RANK == "1" if RANK else calls % 2 == 0
    return [None] * len(responses) if fails else share(prompts, responses)

def broken(prompts, responses):
    global calls
    calls += 1
    if RANK == "1" and calls > 2 and Path(__file__).with_name("broken").exists():
        raise ValueError("the disk is full")
    return share(prompts, responses)
"""
BASE: dict[str, Any] = {
    "rollouts": 8,
    "generate_batch": 4,
    "batch_size": 2,
    "updates": 2,
    "max_new_tokens": 6,
    "max_length": 64,
    "max_steps": 3,
    "save_steps": 1,
    "learning_rate": 1e-3,
    "device": "cpu",
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"reward": "share", "entropy": 0.01, "whiten_rewards": True, "kl_control": "adaptive"}),
    "p3o": ("ppo", {"reward": "share", "algorithm": "p3o"}),
    "lora": ("ppo", {"reward": "share", "lora": {"r": 2}, "ptx": {"data": "ptx.jsonl", "batch_size": 3}}),
    "online": ("online", {"judge": "judge.yaml", "eval_share": 0.25, "held_out": "share", "updates": 1}),
    "trpo": ("ppo", {"reward": "share", "algorithm": "trpo", "updates": None}),
    "one process's samples all fail": ("ppo", {"reward": "half", "generate_batch": 1}),
    "one process without prompts": ("ppo", {"reward": "share", "rollouts": 2, "samples": 2}),
}

STEP = "rlaif.rl.loop.Loop.judged"

Settings = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    place = tmp_path_factory.mktemp("processes")
    tiny = save_tiny(place / "tiny")
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"Q {n}?"} for n in range(12)])
    write_jsonl(place / "ptx.jsonl", [{"prompt": f"Q {n}?", "completion": f" A {n}."} for n in range(9)])
    (place / "judge.yaml").write_text(yaml.safe_dump({"engine": "mock"}))
    (place / "functions.py").write_text(FUNCTIONS)

    def made(case: str, out: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        kind, own = CASES[case]
        common = {**BASE, "model": str(tiny), "data": str(place / "prompts.jsonl"), "out": str(place / case / out)}
        found = {name: value for name, value in {**common, **own, **changes}.items() if value is not None}
        for name in ("reward", "held_out"):
            if name in found:
                found[name] = [{"kind": "function", "function": f"{place / 'functions.py'}:{found[name]}"}]
        if "ptx" in found:
            found["ptx"] = {**found["ptx"], "data": str(place / "ptx.jsonl")}
        if "judge" in found:
            found["judge"] = str(place / "judge.yaml")
        return kind, found

    return made


def metrics(run: dict[str, Any]) -> list[dict[str, Any]]:
    rows = read_jsonl(Path(run["out"], "metrics.jsonl"))
    return [{name: value for name, value in row.items() if not name.startswith("time/") and name != "part"} for row in rows]


def assert_same_weights(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    found, wanted = (load_file(Path(run["out"], "model", "model.safetensors")) for run in (one, other))
    assert found.keys() == wanted.keys()
    for name, weights in found.items():
        torch.testing.assert_close(weights, wanted[name], rtol=0, atol=tolerance)


def assert_all_went_well(results: list[tuple[int, str]]) -> None:
    for code, said in results:
        assert code == 0, said


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(case: str, settings: Settings) -> None:
    kind, one = settings(case, "one", batch_size=4)
    _, two = settings(case, "two")
    results = train_together(kind, two, [None, None])
    assert_all_went_well(results)
    assert results[1][1] == ""  # one of them tells how far they are
    code, said = train(kind, one)
    assert code == 0, said
    found, wanted = metrics(two), metrics(one)
    assert len(found) == len(wanted) == BASE["max_steps"]
    tolerance = 5e-3 if case == "trpo" else 1e-4  # conjugate gradients magnify rounding, and so does Adam, a little
    for row, expected in zip(found, wanted, strict=True):
        assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert_same_weights(two, one, tolerance)
    if case.endswith("fail"):
        assert [row["failed"] for row in found] == [4] * 3


def test_killed_and_resumed_they_end_with_the_same_weights(settings: Settings) -> None:
    (kind, alone), (_, killed) = settings("online", "alone", ahead=1), settings("online", "killed", ahead=1)
    death = Death(STEP, 2)
    assert [code for code, _ in train_together(kind, killed, [death, death])] == [KILLED, KILLED]
    part = Path(killed["out"], "parts", "train")
    assert {path.name for path in part.glob("judge*")} == {"judge-0", "judge-1"}
    assert all(list(path.glob("*.store")) for path in part.glob("judge*"))
    assert_all_went_well(train_together(kind, killed, [None, None], resume=True))
    assert_all_went_well(train_together(kind, alone, [None, None]))
    assert_same_weights(killed, alone, 0)
    assert metrics(killed) == metrics(alone)


@pytest.mark.parametrize("where", ["reward", "held_out"])
def test_a_judge_that_fails_in_one_process_ends_all_of_them(where: str, settings: Settings) -> None:
    evaluated = {"held_out": "share", "eval_share": 0.25, "eval_steps": 1, "max_steps": 4, "generate_batch": 8}
    evaluated[where] = "broken"
    (kind, alone), (_, failing) = (settings("ppo", f"{where} {out}", **evaluated) for out in ("alone", "failing"))
    flag = Path(failing["data"]).with_name("broken")
    flag.touch()
    try:
        results = train_together(kind, failing, [None, None])
    finally:
        flag.unlink()
    for code, said in results:
        assert code == 1, said
        assert "reward function: " in said
        assert "broken failed: ValueError: the disk is full (functions.py line 21)" in said
        assert "Traceback" not in said
    found = newest(Path(failing["out"], "parts", "train", "checkpoints"))
    assert found
    assert found.name == ("checkpoint-3" if where == "held_out" else "checkpoint-1")
    assert_all_went_well(train_together(kind, failing, [None, None], resume=True))
    assert_all_went_well(train_together(kind, alone, [None, None]))
    assert_same_weights(failing, alone, 0)
    assert metrics(failing) == metrics(alone)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_models_are_refused(name: str, settings: Settings) -> None:
    kind, run = settings("ppo", name, max_steps=1)
    code, said = start(kind, run, env={name: "true"})()
    assert code == 2, said
    assert said == "each process holds the whole model here: FSDP and DeepSpeed have no part in it\n"
    assert train(kind, run)[0] == 0  # nothing of it is in the way
    assert json.loads(Path(run["out"], "run.json").read_text())["parts"][0]["steps"] == 1
