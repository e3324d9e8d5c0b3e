"""Online preference learning: what it converges to, what it learns from, who draws the responses, and that it goes on."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlaif.engines.mock import MockEngine
from rlaif.records import RlaifError, Row, UsageError
from rlaif.rl import objectives
from rlaif.rl.config import Online
from rlaif.rl.loop import Loop
from rlaif.rl.online import RIVAL, OnlineLoop, _terms
from rlaif.rl.rewards import Background, Rewards, Scored
from rlaif.rl.step import Sample
from rlaif.train.run import run
from tests.conftest import read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny
from tests.train.children import KILLED, Death, start, train, train_together

FUNCTIONS = """
WORTH = {"a": 1.0, "b": 0.3, "c": -0.5, "d": 0.0}

def worth(prompts, responses):
    return [WORTH.get(response, -1.0) for response in responses]

def vowels(prompts, responses):
    return [10 * sum(c in "aeiou" for c in response) / max(len(response), 1) for response in responses]

def nothing(prompts, responses):
    return [0.0 for _ in responses]

def not_of_a(prompts, responses):
    return [None if response == "a" else WORTH.get(response, -1.0) for response in responses]
"""

LETTERS = "abcd"
ROCK, PAPER, SCISSORS = [0.5, 0.1, 0.9, 0.9], [0.9, 0.5, 0.1, 0.9], [0.1, 0.9, 0.5, 0.9]
GAME = [ROCK, PAPER, SCISSORS, [0.1, 0.1, 0.1, 0.5]]
"""P(the letter of the row beats that of the column): three that beat each other in a circle, and one that all beat."""

Settings = Callable[..., dict[str, Any]]


def save_letters(folder: Path) -> Path:
    """A model with a token for each of four letters, one for padding and one that ends: of one token, a bandit of six arms."""
    inner = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(LETTERS)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, prompts for each, functions, and judges with a planted taste for letters."""
    place = tmp_path_factory.mktemp("online")
    save_tiny(place / "bytes")
    save_letters(place / "letters")
    write_jsonl(place / "bytes.jsonl", [{"prompt": f"Question {n}?"} for n in range(12)])
    write_jsonl(place / "letters.jsonl", [{"prompt": LETTERS}])
    (place / "functions.py").write_text(FUNCTIONS)
    for name, options in {
        "fair": {"k": 1.0},
        "partial": {"k": 1.0, "bias": 2.0},
        "failing": {"k": 1.0, "garbage": 0.15},
        "dumb": {"garbage": 1.0},
    }.items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"engine": "mock", "options": options}))
    return place


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs."""
    monkeypatch.setattr("rlaif.train.curves.write_curves", lambda *_: None)


@pytest.fixture
def settings(place: Path, tmp_path: Path) -> Settings:
    """Of a run on one of the models; `by`: a function's name, or a judge's."""

    def made(model: str = "letters", by: str = "worth", **changes: Any) -> dict[str, Any]:
        judge = place / f"{by}.yaml"
        asked = {"judge": str(judge)} if judge.exists() else {"reward": [function(place, by)]}
        return {
            "model": str(place / model),
            "data": str(place / f"{model}.jsonl"),
            "out": str(tmp_path / "out"),
            **asked,
            "rollouts": 64,
            "generate_batch": 64,
            "batch_size": 64,
            "max_new_tokens": 1 if model == "letters" else 6,
            "max_length": 48,
            "learning_rate": 1e-2,
            "device": "cpu",
            "save_steps": 1000,
            **changes,
        }

    return made


def function(place: Path, name: str) -> dict[str, Any]:
    return {"kind": "function", "function": f"{place / 'functions.py'}:{name}"}


def trained(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a run."""
    run("online", Online.model_validate(settings))
    return read_jsonl(Path(settings["out"], "metrics.jsonl"))


def chances(folder: Path) -> Tensor:
    """What a model of letters says next: (6), float64."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found: Tensor = model(torch.tensor([[0, 1, 2, 3]])).logits[0, -1].double().softmax(-1)
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """Total variation of two distributions, each brought to the sum 1."""
    return float((one / one.sum() - other / other.sum()).abs().sum() / 2)


def quality(text: str) -> float:
    """What the planted judges make of a text."""
    return MockEngine()._quality(text)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- where it goes


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "apo_zero", "nash_md"])
def test_a_planted_preference_climbs(loss: str, settings: Settings) -> None:
    lines = trained(settings("bytes", "vowels", loss=loss, max_steps=30, learning_rate=3e-3, beta=0.05, max_new_tokens=4))
    rewards = [line["reward"] for line in lines]
    assert sum(rewards[-5:]) > 4 * sum(rewards[:5])


def test_online_dpo_on_soft_labels_finds_the_best_policy(settings: Settings, place: Path) -> None:
    """With P(first better) = σ(r₁ − r₂) that is π_ref·exp(r/β), of arms it draws seldom too (arXiv 2305.18290, eq. 4)."""
    told = settings(beta=0.5, max_steps=120)
    lines = trained(told)
    reference, found = chances(place / "letters"), chances(Path(told["out"], "model"))
    best = reference * torch.tensor([1.0, 0.3, -0.5, 0.0, -1.0, -1.0], dtype=torch.float64).div(0.5).exp()
    assert apart(reference, best) > 0.4
    assert apart(found, best) < 0.01
    assert lines[-1]["accuracy"] == 1
    assert lines[-1]["kl"] > lines[1]["kl"]


@pytest.mark.usefixtures("pictures")
def test_so_it_does_by_the_verdicts_of_a_judge(settings: Settings, place: Path) -> None:
    """Of a planted one, P = σ(q₁ − q₂). Empty responses cannot be judged: nothing is learnt of them."""
    told = settings(by="fair", beta=0.5, max_steps=120)
    lines = trained(told)
    reference, found = (chances(folder)[:4] for folder in (place / "letters", Path(told["out"], "model")))
    best = reference * torch.tensor([quality(letter) for letter in LETTERS], dtype=torch.float64).div(0.5).exp()
    assert apart(reference, best) > 0.3
    assert apart(found, best) < 0.01
    assert lines[0]["failed"] > 0
    assert Path(told["out"], "plots", "kl.svg").exists()
    assert not [name for name in lines[0] if name.startswith("reward")]  # of a pair they add up to nothing


@pytest.mark.parametrize(("loss", "mixture"), [("nash_md", 0.0), ("nash_md", 0.5), ("ipo", 0.0), ("ipo", 0.5)])
def test_a_preference_that_goes_in_a_circle_ends_at_its_equilibrium(
    loss: str, mixture: float, settings: Settings, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """π = π_ref·exp(P(y beats the rival)/τ), regularised Nash without a mixture; online IPO's too (arXiv 2403.08635, §4)."""

    def submit(self: Background, rows: Sequence[Row], responses: Sequence[str]) -> Future[list[Scored]]:
        future: Future[list[Scored]] = Future()
        future.set_result([verdict(response, row[RIVAL][0]["content"]) for row, response in zip(rows, responses, strict=True)])
        return future

    def verdict(first: str, second: str) -> Scored:
        return Scored(2 * GAME[arm(first)][arm(second)] - 1, {}, None, None)

    def arm(text: str) -> int:
        return LETTERS.index(text) if text else 3  # no text is as bad as d

    monkeypatch.setattr(Background, "submit", submit)
    tau = 0.15
    told = settings(by="fair", loss=loss, mixture=mixture, beta=tau, rollouts=128, batch_size=128, learning_rate=0.02)
    trained({**told, "max_steps": 120, "scheduler": "linear"})
    reference = chances(place / "letters")
    arms = [0, 1, 2, 3, 3, 3]
    beats = torch.tensor([[GAME[a][b] for b in arms] for a in arms], dtype=torch.float64)
    wanted = reference
    for _ in range(3000):  # small steps, for whole ones would circle
        rival = wanted ** (1 - mixture) * reference**mixture
        answer = (reference.log() + beats @ (rival / rival.sum()) / tau).softmax(-1)
        wanted = (0.95 * wanted.log() + 0.05 * answer.log()).softmax(-1)
    assert apart(reference, wanted) > 0.4
    assert apart(chances(Path(told["out"], "model")), wanted) < 0.08


# ---------------------------------------------------------------- verdicts


@pytest.fixture(scope="module")
def biased(place: Path) -> Iterator[Background]:
    """A judge that prefers whatever it sees first, by two log-odds."""
    config = Online(out="x", data="x", judge=str(place / "partial.yaml"))
    background = Background(Rewards(_terms(config), place / "biased", tries=1, timeout=None))
    yield background
    background.close()


def verdicts(judge: Background, pairs: Sequence[tuple[str, str]], loss: str = "dpo") -> list[Scored]:
    """What both of each pair get."""
    texts = [text for pair in pairs for text in pair]
    samples = [Sample(n, {"prompt": "Hm?"}, [], [], text, True) for n, text in enumerate(texts)]
    stub: Any = SimpleNamespace(config=Online(out="x", data="x", judge="x", loss=loss), judge=judge)
    return OnlineLoop.submit(stub, samples).result(30)


texts = st.text(max_size=12).map(str.strip).filter(bool) | st.sampled_from(["Human: Hi", "Human: A\n\nAssistant: B"])


@given(texts, texts)
@hypothesis_settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_verdict_for_one_is_the_contrary_verdict_for_the_other(biased: Background, a: str, b: str) -> None:
    """Whatever the judge thinks of places, which asking in both orders cancels; texts that look like dialogues are texts."""
    first, second, *swapped = (one.value for one in verdicts(biased, [(a, b), (b, a)]))
    if a == b:
        assert [first, second, *swapped] == [None] * 4
        return
    margin = quality(a) - quality(b)
    assert first == pytest.approx(sigmoid(margin + 2) + sigmoid(margin - 2) - 1, abs=1e-9)
    assert second == -first
    assert swapped == pytest.approx([second, first], abs=1e-9)


def test_nobody_is_asked_about_identical_responses(biased: Background) -> None:
    asked = biased._rewards.facts()["calls"]
    scored = verdicts(biased, [("same", "same")])
    assert [one.value for one in scored] == [None, None]
    assert scored[0].error == "the two responses are identical"
    assert [one.value for one in verdicts(biased, [("same", "same")], "nash_md")] == [0.0, 0.0]  # by definition: ½
    assert biased._rewards.facts()["calls"] == asked
    assert [one.value is None for one in verdicts(biased, [("c", "c"), ("c", "a")])] == [True, True, False, False]
    assert verdicts(biased, []) == []


@pytest.mark.parametrize("by", ["failing", "not_of_a", "worth"])
def test_what_cannot_be_judged_is_left_out_and_counted(by: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learnt is the verdicts, of pairs that have one: no more, and nothing else."""
    learnt: list[float] = []
    own = objectives.preference_loss

    def keeping(loss: str, first: Tensor, second: Tensor, p: Tensor, beta: float) -> Tensor:
        learnt.extend(p.tolist())
        return own(loss, first, second, p, beta)

    monkeypatch.setattr(objectives, "preference_loss", keeping)
    told = settings(by=by, max_steps=1, batch_size=6, samples_shown=64)
    (line,) = trained(told)
    shown = read_jsonl(Path(told["out"], "samples.jsonl"))
    assert len(shown) == 64
    expected = []
    for a, b in zip(shown[0::2], shown[1::2], strict=True):
        if a["response"] != b["response"] and a["reward"] is not None and b["reward"] is not None:
            expected.append((a["reward"] + 1) / 2 if by == "failing" else sigmoid(a["reward"] - b["reward"]))
            assert by != "failing" or (a["reward"], a["terms"]) == (-b["reward"], {"judge": -b["terms"]["judge"]})
    assert sorted(learnt) == pytest.approx(sorted(expected), abs=1e-6)
    failed = [row for row in shown if row["reward"] is None]
    assert all(row["error"] for row in failed)
    assert (line["failed"], line["pairs"], line["asked"]) == (len(failed), len(expected), 64)
    assert bool(failed) == (by != "worth")
    assert 0 < len(expected) < 32
    assert not (by == "failing" and all("identical" in row["error"] or "empty" in row["error"] for row in failed))
    assert line["confidence"] == pytest.approx(sum(abs(2 * p - 1) for p in expected) / len(expected))


def test_a_judge_that_never_answers_ends_the_run(settings: Settings) -> None:
    told = settings(by="dumb", max_steps=9)
    with pytest.raises(RlaifError, match="no response of 3 steps could be judged"):
        trained(told)
    lines = read_jsonl(Path(told["out"], "metrics.jsonl"))
    assert all(line["failed"] == line["asked"] and "loss/policy" not in line for line in lines)


@pytest.mark.parametrize("loss", ["dpo", "hinge", "apo_zero", "apo_down"])
def test_ties_teach_losses_that_take_a_side_nothing(loss: str, settings: Settings, place: Path) -> None:
    told = settings(by="nothing", loss=loss, max_steps=2)
    lines = trained(told)
    assert [line["pairs"] > 0 for line in lines] == [loss == "dpo"] * 2
    if loss != "dpo":
        assert torch.equal(chances(place / "letters"), chances(Path(told["out"], "model")))
        told["reward"] = [{**told["reward"][0], "function": told["reward"][0]["function"].replace("nothing", "worth")}]
        trained({**told, "out": told["out"] + "-other"})
        assert not torch.equal(chances(place / "letters"), chances(Path(told["out"] + "-other", "model")))


def test_a_step_of_hard_losses_is_of_the_side_that_is_preferred(settings: Settings, place: Path) -> None:
    told = settings(loss="apo_zero", max_steps=50, beta=0.5)
    trained(told)
    assert chances(place / "letters")[0] < 0.2
    assert chances(Path(told["out"], "model"))[0] > 0.9  # a, the best


# ---------------------------------------------------------------- who draws what


@pytest.mark.parametrize(
    ("loss", "mixture", "first", "second"),
    [
        ("dpo", 0.0, [1.0], [1.0]),
        ("nash_md", 0.0, [1.0], [1.0]),
        ("ipo", 0.25, [0.75, 0.25], [0.75, 0.25]),
        ("nash_md", 0.25, [1.0], [0.75, 0.25]),
    ],
)
def test_who_draws_the_responses(
    loss: str, mixture: float, first: Any, second: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = defaultdict(list)
    own = Loop._fill

    def noting(self: Any, samples: list[Sample], step: Any, sampler: Any) -> None:
        for sample in samples:
            shares[sample.number].append([voice.share for voice in sampler.voices])
        own(self, samples, step, sampler)

    monkeypatch.setattr(Loop, "_fill", noting)
    trained(settings(loss=loss, mixture=mixture, max_steps=1, rollouts=8, generate_batch=4))
    assert shares == {number: [second if number % 2 else first] for number in range(8)}


def test_all_of_the_reference_in_the_mixture_draws_from_it(settings: Settings, place: Path) -> None:
    """After the policy has gone elsewhere, IPO-MD's responses are still the reference's."""
    told = settings(loss="ipo", mixture=1.0, max_steps=60, beta=0.2, samples_shown=64, sample_steps=1)
    trained(told)
    late = [row["response"] for row in read_jsonl(Path(told["out"], "samples.jsonl")) if row["step"] > 20]
    drawn = torch.tensor([late.count(letter) for letter in LETTERS], dtype=torch.float64)
    reference, policy = chances(place / "letters")[:4], chances(Path(told["out"], "model"))[:4]
    assert apart(drawn, reference) < 0.04
    assert apart(drawn, policy) > 0.2


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("every", [1, 2])
def test_bpo_holds_the_policy_to_the_one_that_draws(
    every: int, lora: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = []
    own = Loop._show

    def noting(self: Any, samples: list[Sample]) -> None:
        with torch.no_grad():
            batch = self.batch(samples)
            gaps.append(float((self.actor.logprobs(batch) - self.actor.reference_logprobs(batch)).abs().max()))
        own(self, samples)

    monkeypatch.setattr(Loop, "_show", noting)
    lines = trained(settings(lora=lora, reference_update=1, reference_steps=every, max_steps=4))
    assert [gap < 1e-5 for gap in gaps] == [step % every == 0 for step in (1, 2, 3, 4)]
    assert [abs(line["kl"]) < 1e-5 for line in lines] == [step % every == 0 for step in (0, 1, 2, 3)]


def test_several_updates_go_on_with_the_same_responses(settings: Settings) -> None:
    once, thrice = (trained({**settings(updates=n, max_steps=1), "out": f"{settings()['out']}-{n}"}) for n in (1, 3))
    assert thrice[0]["loss/policy"] < once[0]["loss/policy"]
    assert thrice[0]["pairs"] == once[0]["pairs"]


@pytest.mark.parametrize("loss", ["dpo", "nash_md"])
def test_a_minibatch_in_pieces_has_the_mean_gradient_of_its_pairs(
    loss: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    own = OnlineLoop._gradients

    def comparing(self: Any, pairs: Any, count: int, sums: Any) -> None:
        parameters = self.actor.policy_parameters
        wanted = torch.autograd.grad(self._loss(pairs, defaultdict(float)) / len(pairs), parameters)
        own(self, pairs, count, sums)
        seen.append(len(pairs))
        assert max(float(w.abs().max()) for w in wanted) > 1e-3
        for parameter, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)

    monkeypatch.setattr(OnlineLoop, "_gradients", comparing)
    (line,) = trained(settings(loss=loss, max_steps=1, batch_size=4, accumulate=5))
    assert sum(seen) == line["pairs"]
    assert set(seen[:-1]) == {10}


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": "embedded"}, "judge, reward: one of them"),
        ({"reward": []}, "judge, reward: one of them"),
        ({"rollouts": 7}, "rollouts: two to a prompt"),
        ({"loss": "nash_md", "updates": 2}, "updates: nash_md takes one"),
        ({"trainer": {"num_generations": 2}}, "trainer: no trainer of TRL's"),
        ({"mixture": 0.5, "generator": "vllm"}, "mixture: goes with generator transformers alone"),
        ({"mixture": 1.5}, "mixture"),
        ({"beta": 0}, "beta"),
        ({"loss": "kto"}, "loss"),
        ({"held_out": [{"kind": "length", "most": 3}]}, "held_out: needs prompts"),
    ],
)
def test_what_a_run_refuses(changes: dict[str, Any], said: str, settings: Settings) -> None:
    with pytest.raises(ValueError, match=said):
        Online.model_validate({**settings(), **changes})


def test_over_optimisation_cannot_be_told_from_pairs_alone(settings: Settings) -> None:
    told = settings(by="fair", eval_share=0.5, held_out=[{"kind": "length", "most": 3}], stop_when={"held_out": 1})
    with pytest.raises(ValueError, match="stop_when held_out: needs a reward"):
        Online.model_validate(told)


def test_a_wrong_judge_is_told_before_a_model_loads(settings: Settings, tmp_path: Path) -> None:
    told = {**settings(by="fair"), "model": str(tmp_path / "nothing")}
    with pytest.raises(UsageError, match=r"reward judge, labeler: .*nobody"):
        trained({**told, "judge": "nobody"})


def test_held_out_prompts_are_rated_by_the_second_judge_alone(settings: Settings, place: Path) -> None:
    told = settings("bytes", "fair", eval_share=0.25, held_out=[function(place, "vowels")], max_steps=1, rollouts=4)
    (line,) = trained(told)
    assert line["held_out/failed"] == 0
    assert "held_out/reward" in line
    assert "eval_reward" not in line


# ---------------------------------------------------------------- the same run

CASES: dict[str, dict[str, Any]] = {
    "dpo, the reference moves, ahead": {"by": "fair", "reference_update": 1, "reference_steps": 2, "ahead": 1, "updates": 2},
    "nash_md, lora, mixture": {"by": "partial", "loss": "nash_md", "mixture": 0.3, "lora": {"r": 2}},
    "ipo, the adapter of the reference moves": {"loss": "ipo", "lora": {"r": 2, "merge": False}, "reference_update": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_it_is_the_same_run(case: str, settings: Settings, tmp_path: Path) -> None:
    common = {"max_steps": 6, "save_steps": 2, "log_steps": 4, "sample_steps": 2, "rollouts": 16, "batch_size": 8}
    told = settings(**CASES[case], **common)
    alone, killed = ({**told, "out": str(tmp_path / name)} for name in ("alone", "killed"))
    wait = start("online", alone)
    code, said = train("online", killed, death=Death("rlaif.rl.online.OnlineLoop.learn", 4, after=True))
    assert code == KILLED, said
    code, said = train("online", killed, resume=True)
    assert code == 0, said
    code, said = wait()
    assert code == 0, said
    weights = [sorted(Path(run["out"], "model").glob("*.safetensors")) for run in (alone, killed)]
    assert len(weights[0]) == len(weights[1]) == 1
    assert weights[0][0].read_bytes() == weights[1][0].read_bytes()
    assert untimed(alone, "metrics.jsonl") == untimed(killed, "metrics.jsonl")
    assert untimed(alone, "samples.jsonl") == untimed(killed, "samples.jsonl")


def untimed(run: dict[str, Any], file: str) -> list[dict[str, Any]]:
    rows = read_jsonl(Path(run["out"], file))
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.mark.parametrize("loss", ["dpo", "nash_md"])
def test_two_processes_learn_what_one_does(loss: str, settings: Settings, tmp_path: Path) -> None:
    told = settings(by="failing", loss=loss, rollouts=16, max_steps=2)
    one, two = {**told, "out": str(tmp_path / "one")}, {**told, "out": str(tmp_path / "two"), "batch_size": 4}
    wait = start("online", {**one, "batch_size": 8})
    for code, said in train_together("online", two, [None, None]):
        assert code == 0, said
    assert wait()[0] == 0
    for a, b in zip(untimed(one, "metrics.jsonl"), untimed(two, "metrics.jsonl"), strict=True):
        assert a.pop("part") == b.pop("part")
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_the_report_says_what_was_asked(settings: Settings) -> None:
    told = settings(by="fair", max_steps=2)
    trained(told)
    report = json.loads(Path(told["out"], "run.json").read_text(encoding="utf-8"))
    judge = report["evaluation"]["reward"]["judge"]
    assert judge["kind"] == "pairwise"
    assert judge["both_orders"] is True
    assert report["evaluation"]["judged"]["calls"] >= 2
