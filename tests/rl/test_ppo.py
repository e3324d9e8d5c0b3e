"""PPO and its kin: where they converge to, what they learn from, and what their settings change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlaif.records import UsageError
from rlaif.rl.config import Ppo
from rlaif.rl.ppo import PpoLoop, _pretraining
from rlaif.train.kinds import load_config
from rlaif.train.run import run
from tests.conftest import read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny

CLASSES = """
def worth(prompts, responses):
    return [2.0 * (len(r) == 1 and r.isupper()) + 1.0 * (len(r) == 1 and r.isdigit()) for r in responses]

def ascii(prompts, responses):
    return [2.0 * r[:1].isascii() for r in responses]

def vowels(prompts, responses):
    return [10 * sum(c in "aeiou" for c in r) / max(len(r), 1) for r in responses]
"""

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Those of a run on a tiny model; `by` names one of the functions above."""
    save_tiny(tmp_path / "tiny")
    (tmp_path / "rewards.py").write_text(CLASSES)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Question {n}?"} for n in range(12)])

    def made(by: str = "vowels", **changes: Any) -> dict[str, Any]:
        return {
            "model": str(tmp_path / "tiny"),
            "data": str(tmp_path / "prompts.jsonl"),
            "out": str(tmp_path / "out"),
            "reward": [{"kind": "function", "function": f"{tmp_path / 'rewards.py'}:{by}"}],
            "rollouts": 16,
            "max_new_tokens": 6,
            "max_length": 64,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "device": "cpu",
            "max_steps": 2,
            **changes,
        }

    return made


def trained(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a run."""
    run("ppo", Ppo.model_validate(settings))
    return read_jsonl(Path(settings["out"]) / "metrics.jsonl")


# ---------------------------------------------------------------- where they converge to


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"algorithm": "ppo", "updates": 2, "max_steps": 40}, 0.06),
        ({"algorithm": "reinforce", "max_steps": 60}, 0.04),
        ({"algorithm": "p3o", "updates": 2, "max_steps": 40}, 0.06),
        ({"algorithm": "trpo", "step_kl": 0.05, "max_steps": 20}, 0.1),
    ],
    ids=lambda value: value["algorithm"] if isinstance(value, dict) else "",
)
def test_a_bandit_comes_to_its_regularised_optimum(changes: dict[str, Any], tolerance: float, settings: Settings) -> None:
    """π* ∝ π_ref·exp(r/β), in total variation; responses of one token are a bandit with 259 arms. The start is .31 away."""
    beta = 1.0
    at_once = {"rollouts": 256, "generate_batch": 256, "batch_size": 256}
    own = {**at_once, "max_new_tokens": 1, "scheduler": "linear", "value_learning_rate": 1e-2}
    config = settings("worth", beta=beta, whiten_advantages=False, **own, **changes)
    write_jsonl(Path(config["data"]), [{"prompt": "Q?"}])
    trained(config)
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    ids = torch.tensor([tokenizer("Q?")["input_ids"]])

    def arms(model: str | Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(model)(ids).logits[0, -1].double().log_softmax(-1)

    texts = [tokenizer.decode([arm], skip_special_tokens=True).strip() for arm in range(len(tokenizer))]
    worth = torch.tensor([2.0 * (len(t) == 1 and t.isupper()) + 1.0 * (len(t) == 1 and t.isdigit()) for t in texts])
    start, end = arms(config["model"]), arms(Path(config["out"]) / "model")
    best = (start + worth.double() / beta).softmax(-1)
    assert (start.exp() - best).abs().sum() / 2 > 0.25
    assert (end.exp() - best).abs().sum() / 2 < tolerance


# ---------------------------------------------------------------- what they learn from


def test_credit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per token −β·KL, at the end the score: cut, and less where the response did not end; returns follow at γ = λ = 1."""
    seen: list[tuple[Any, ...]] = []
    credit = PpoLoop._credit

    def spy(self: PpoLoop, samples: list[Any]) -> None:
        for sample in samples:
            sample.reference = sample.logprobs - 0.25  # a KL of ¼ a token
        credit(self, samples)
        seen.extend((sample, self.returns[sample.number]) for sample in samples)

    monkeypatch.setattr(PpoLoop, "_credit", spy)
    own = {"gamma": 1.0, "lam": 1.0, "beta": 0.4, "reward_clip": 2.0, "missing_eos_penalty": 0.5}
    trained(settings(max_steps=1, **own))
    assert len(seen) == 16
    for sample, returns in seen:
        score = min(sample.scored.value, 2.0) - (0 if sample.ended else 0.5)
        length = len(sample.response)
        expected = [score - 0.4 * 0.25 * (length - t) for t in range(length)]
        assert returns.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_step_does_not_depend_on_how_it_is_taken_apart(settings: Settings, tmp_path: Path) -> None:
    parts = {"whole": (16, 1), "in four": (4, 4), "in odd parts": (3, 1)}
    found = {}
    for name, (size, times) in parts.items():
        found[name] = trained(settings(batch_size=size, accumulate=times, updates=1, out=str(tmp_path / name)))
    for whole, taken in zip(found["whole"], found["in four"], strict=True):
        for figure in ("reward", "kl", "loss/policy", "loss/value", "grad_norm", "length", "entropy"):
            assert taken[figure] == pytest.approx(whole[figure], rel=2e-3, abs=1e-4), figure
    assert found["in odd parts"][0]["grad_norm"] != pytest.approx(found["whole"][0]["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("value", ["separate", "shared"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_values_come_to_explain_the_returns(value: str, lora: dict[str, int] | None, settings: Settings) -> None:
    """The first character, an ASCII one or not, settles the reward; the policy nearly stays as it is."""
    rates = (
        {"learning_rate": 1e-9, "value_learning_rate": 3e-3}
        if value == "separate"
        else {"value_weight": 100.0, "learning_rate": 3e-3 if lora else 1e-3}
    )
    own = {"value": value, "lora": lora, "value_clip": None, "updates": 6, "beta": 0.0, **rates}
    found = trained(settings("ascii", rollouts=64, generate_batch=64, batch_size=64, max_steps=15, **own))
    assert found[0]["value/explained"] == pytest.approx(0, abs=0.01)
    assert sum(line["value/explained"] for line in found[-4:]) / 4 > (0.1 if value == "separate" else 0.02)


def test_the_kl_coefficient_finds_its_target(settings: Settings) -> None:
    own = {"kl_control": "adaptive", "kl_horizon": 16, "updates": 1, "max_steps": 4}
    rises = trained(settings(kl_target=0.001, **own))
    assert [line["beta"] for line in rises[1:]] == sorted(line["beta"] for line in rises[1:])
    assert rises[-1]["beta"] > rises[1]["beta"]
    falls = trained(settings(kl_target=1000.0, out=rises and str(Path(settings()["out"]).parent / "falls"), **own))
    assert falls[-1]["beta"] < falls[0]["beta"]


def test_the_other_surrogate_keeps_to_its_step(settings: Settings) -> None:
    """Its coefficient doubles where an update moved the policy too far, and halves where it could have gone further."""
    found = trained(settings(surrogate="penalty", step_kl=0.05, max_steps=8))
    for before, line in zip([1.0, *(line["penalty"] for line in found)], found, strict=False):
        moved = line["kl/update"]
        factor = 2 if moved > 0.05 * 1.5 else 0.5 if moved < 0.05 / 1.5 else 1
        assert line["penalty"] == before * factor


def test_an_entropy_bonus_keeps_the_policy_open(settings: Settings, tmp_path: Path) -> None:
    ends = [trained(settings(entropy=one, max_steps=8, out=str(tmp_path / str(one))))[-1]["entropy"] for one in (0.0, 0.5)]
    assert ends[1] > ends[0] + 0.3


@pytest.mark.parametrize("row", [{"text": "xyz" * 8}, {"prompt": "Say it.", "completion": "xyz" * 8}], ids=["text", "answer"])
def test_pretraining_rows_are_kept_in_mind(row: dict[str, str], settings: Settings, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pretraining.jsonl", [row])
    ptx = {"data": str(tmp_path / "pretraining.jsonl"), "coefficient": 1.0, "batch_size": 2}
    found = trained(settings(ptx=ptx, max_steps=6))
    assert found[-1]["loss/ptx"] < 0.6 * found[0]["loss/ptx"]


def test_pretraining_answers_that_are_too_long_are_left_out(settings: Settings, tmp_path: Path) -> None:
    fits, long = {"prompt": "Say it.", "completion": "xyz"}, {"prompt": "Say " * 40, "completion": "xyz"}
    ptx = {"data": str(write_jsonl(tmp_path / "pretraining.jsonl", [fits, long])), "batch_size": 4}
    assert all(line["loss/ptx"] > 0 for line in trained(settings(ptx=ptx)))
    write_jsonl(tmp_path / "pretraining.jsonl", [long])
    with pytest.raises(UsageError, match=r"pretraining.jsonl: all 1 rows are longer than max_length, 64 tokens"):
        trained(settings(ptx=ptx, out=str(tmp_path / "long")))


@pytest.mark.parametrize(("form", "messages"), [("auto", False), ("conversational", True)])
def test_pretraining_answers_take_the_form_of_the_run(form: str, messages: bool, settings: Settings, tmp_path: Path) -> None:
    ptx = {"data": str(write_jsonl(tmp_path / "pretraining.jsonl", [{"prompt": "Say it.", "completion": "xyz"}]))}
    assert _pretraining(Ppo(**settings(ptx=ptx, form=form))).conversational is messages


def test_a_reference_that_follows(settings: Settings, tmp_path: Path) -> None:
    """The KL from one that follows the policy is less than from one that stays."""
    stays = trained(settings(max_steps=6))
    follows = trained(settings(max_steps=6, reference_update=1.0, reference_steps=2, out=str(tmp_path / "follows")))
    assert follows[1]["kl"] == pytest.approx(stays[1]["kl"], rel=1e-4)
    assert follows[2]["kl"] == pytest.approx(0, abs=1e-4)
    assert stays[-1]["kl"] > follows[-1]["kl"]


@pytest.mark.usefixtures("pictures")
def test_what_a_run_leaves(settings: Settings, tmp_path: Path) -> None:
    config = settings(eval_share=0.3, max_steps=3, eval_steps=2, lora={"r": 4}, sample_steps=2, samples_shown=3)
    report = run("ppo", Ppo.model_validate(config))
    out = Path(config["out"])
    assert report["evaluation"]["algorithm"] == "ppo"
    assert report["evaluation"]["stopped"] is None
    assert json.loads((out / "run.json").read_text())["evaluation"]["judged"]
    lines = read_jsonl(out / "metrics.jsonl")
    assert [("eval_reward" in line) for line in lines] == [False, True, True]
    shares = [sum(line[f"time/{what}"] for what in ("generation", "scoring", "training", "waiting")) for line in lines]
    assert all(0.8 < share <= 1.001 for share in shares)
    shown = read_jsonl(out / "samples.jsonl")
    assert [line["step"] for line in shown] == [1] * 3 + [2] * 3 + [3] * 3
    assert "reinforcement learning" in (out / "model" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(out / "model")
    assert (out / "plots" / "frontier.svg").exists()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rollouts": 15, "samples": 2}, "15 responses"),
        ({"algorithm": "p3o", "samples": 3, "rollouts": 15}, "two by two"),
        ({"algorithm": "reinforce", "updates": 2}, "takes one"),
        ({"algorithm": "trpo", "value": "shared"}, "separate"),
        ({"algorithm": "trpo", "entropy": 0.1}, "no place"),
        ({"reward": [{"kind": "length", "most": 3, "name": "std"}]}, "std"),
        ({"trainer": {"loss_type": "dr_grpo"}}, "rloo and grpo"),
        ({"max_new_tokens": 64}, "max_length"),
        ({"stages": [{"beta": 1}]}, "none"),
        ({"held_out": [{"kind": "length", "most": 3}]}, "eval"),
        ({"reward": []}, "reward"),
        ({"reward": [{"kind": "rating"}]}, "labeler"),
        ({"lora": {"dropout": 0.1}}, "without dropout"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], told: str, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(**changes)))
    with pytest.raises(UsageError, match=told):
        load_config("ppo", file)


def test_files_beside_the_config(settings: Settings, tmp_path: Path) -> None:
    near = tmp_path / "near"
    near.mkdir()
    write_jsonl(near / "prompts.jsonl", [{"prompt": "x"}])
    (near / "judge.yaml").write_text("engine: mock\n")
    (near / "own.py").write_text("def f(prompts, responses): return [0.0 for _ in responses]\n")
    terms = [
        {"kind": "rating", "labeler": "judge.yaml"},
        {"kind": "ensemble", "of": [{"kind": "function", "function": "own.py:f"}, {"kind": "rating", "labeler": "judge.yaml"}]},
    ]
    (near / "run.yaml").write_text(json.dumps(settings(data="prompts.jsonl", reward=terms)))
    config: Any = load_config("ppo", near / "run.yaml")
    assert config.data == str(near / "prompts.jsonl")
    assert config.reward[0].labeler == str(near / "judge.yaml")
    assert config.reward[1].of[0].function == f"{near / 'own.py'}:f"
    assert config.reward[1].of[1].labeler == str(near / "judge.yaml")
