"""Several processes are one run: the losses and the model of one process with batches as large as theirs together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlaif.yamlfile import shipped
from tests.conftest import clean_env, read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny
from tests.train.children import KILLED, STEP, Death, start, train, train_together

CASES: dict[str, dict[str, Any]] = {
    "sft": {"data": "answers.jsonl"},
    "reward": {"data": "pairs.jsonl", "accumulate": 2},
    "dpo": {"data": "pairs.jsonl"},
}

Settings = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    place = tmp_path_factory.mktemp("distributed")
    tiny = save_tiny(place / "tiny")
    pairs = [
        {"prompt": f"Question {n}?", "chosen": f"Answer {n}.", "rejected": "No" * (1 + n % 5), "soft_label": 0.5 + n / 64}
        for n in range(32)
    ]
    write_jsonl(place / "pairs.jsonl", pairs)
    write_jsonl(place / "answers.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])

    def made(kind: str, out: str, **changes: Any) -> dict[str, Any]:
        own = {**CASES[kind], "data": str(place / CASES[kind]["data"])}
        common = {"model": str(tiny), "out": str(place / kind / out), "learning_rate": 1e-3, "log_steps": 1, "device": "cpu"}
        return {**common, "batch_size": 2, "max_length": 128, **own, **changes}

    return made


def assert_as_one(several: dict[str, Any], one: dict[str, Any]) -> None:
    """Losses and weights to within 1e-5."""
    found, wanted = (read_jsonl(Path(run["out"], "metrics.jsonl")) for run in (several, one))
    assert [row["step"] for row in found] == [row["step"] for row in wanted]  # one process has written them
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], abs=1e-5)
    assert_same_weights(several, one, 1e-5)


def assert_same_weights(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    found, wanted = (load_file(Path(run["out"], "model", "model.safetensors")) for run in (one, other))
    assert found.keys() == wanted.keys()
    for name, weights in found.items():
        torch.testing.assert_close(weights, wanted[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", CASES)
def test_two_processes_learn_what_one_learns(kind: str, settings: Settings) -> None:
    one, two = settings(kind, "one", batch_size=4), settings(kind, "two")
    (code, said), (other_code, other_said) = train_together(kind, two, [None, None])
    assert (code, other_code) == (0, 0), said + other_said
    assert said.startswith("train ")
    assert said.count("\n") == 1
    assert other_said == ""
    code, said = train(kind, one)
    assert code == 0, said
    assert_as_one(two, one)


def test_killed_and_resumed_they_end_with_the_same_weights(settings: Settings) -> None:
    alone, killed = settings("reward", "alone", save_steps=1), settings("reward", "killed", save_steps=1)
    death = Death(STEP, 6)
    assert [code for code, _ in train_together("reward", killed, [death, death])] == [KILLED, KILLED]
    for run, resume in ((killed, True), (alone, False)):
        for code, said in train_together("reward", run, [None, None], resume=resume):
            assert code == 0, said
    assert_same_weights(killed, alone, 0)
    assert read_jsonl(Path(killed["out"], "metrics.jsonl")) == read_jsonl(Path(alone["out"], "metrics.jsonl"))


def test_a_finished_run_is_left_by_all(settings: Settings) -> None:
    run = settings("sft", "finished", max_steps=1)
    assert train("sft", run)[0] == 0
    for code, said in train_together("sft", run, [None, None], resume=True):
        assert (code, said) == (0, "")
    for code, said in train_together("sft", run, [None, None]):
        assert code == 2
        assert "holds a run already" in said


def test_accelerate_launches_the_command(settings: Settings, tmp_path: Path) -> None:
    one, two = settings("reward", "single", batch_size=4), settings("reward", "launched")
    alone = start("reward", one)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(two))
    done = launch("reward", config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("/model: 4 steps in") == 1
    assert done.stderr.count("train 4/4") == 1
    assert json.loads(Path(two["out"], "run.json").read_text())["parts"][0]["steps"] == 4
    assert alone()[0] == 0
    assert_as_one(two, one)


def launch(kind: str, config: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    processes = ["--config_file", str(shipped("pipelines/accelerate") / "cpu-2.yaml")]
    command = ["-m", "rlaif.cli", "train", kind, str(config)]
    env = clean_env({"OMP_NUM_THREADS": "1"})
    return subprocess.run([*launcher, *processes, *command], capture_output=True, text=True, env=env, timeout=240)
