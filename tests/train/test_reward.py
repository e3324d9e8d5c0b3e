"""Reward models: the loss against plain float64, groups and batches, and planted truths that training has to find."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rlaif.records import UsageError
from rlaif.train import reward
from rlaif.train.config import Reward
from rlaif.train.data import encoder
from rlaif.train.record import lines
from rlaif.train.run import load_tokenizer, run
from tests.conftest import write_jsonl
from tests.engines.tiny import save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


def config(tiny: str, out: Path, data: Path | dict[str, str] | None, **more: Any) -> Reward:
    own = {"learning_rate": 2e-3, "max_length": 128, "log_steps": 1, "save_steps": 10_000, "device": "cpu", "warmup": 0.0}
    return Reward(
        **{"name": "test", "model": tiny, "data": data if isinstance(data, dict) else str(data), "out": str(out), **own, **more}
    )


def scores(folder: Path, rows: list[dict[str, Any]], head: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The rewards of each row's chosen and rejected response, each response by itself, so without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    encode = encoder(load_tokenizer(Reward(model=str(folder), data="x", out="x")))
    found = []
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            ids = [torch.tensor([encode(row["prompt"], row[side])]) for row in rows]
            found.append(np.array([model(input_ids=own).logits[0, head].item() for own in ids]))
    return found[0], found[1]


# ---------------------------------------------------------------- the loss


def plain_loss(chosen, rejected, target, margin, weight, center):
    """The same in float64, one comparison after the other."""
    total = 0.0
    for k in range(len(target)):
        x = chosen[k] - (rejected[k] if rejected is not None else 0.0) - margin[k]
        log_p, log_q = -math.log1p(math.exp(-x)), -math.log1p(math.exp(x))
        total += weight[k] * -(target[k] * log_p + (1 - target[k]) * log_q)
        if rejected is not None:
            total += center * weight[k] * (chosen[k] + rejected[k]) ** 2
    return total


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("paired", [True, False])
def test_the_loss_is_what_plain_float64_says(center: float, paired: bool) -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        count = draw.integers(1, 9)
        chosen, rejected, margin = draw.normal(0, 3, (3, count))
        target, weight = draw.random((2, count))
        given = [torch.tensor(v, dtype=torch.float64) for v in (chosen, rejected, target, margin, weight)]
        found = reward.reward_loss(given[0], given[1] if paired else None, *given[2:], center)
        wanted = plain_loss(chosen, rejected if paired else None, target, margin, weight, center if paired else 0.0)
        assert found.item() == pytest.approx(wanted, rel=1e-12)


@given(x=st.floats(-20, 20), y=st.floats(-20, 20), p=st.floats(0, 1))
def test_swapped_responses_with_the_swapped_label_give_the_same_loss(x: float, y: float, p: float) -> None:
    def loss(a: float, b: float, label: float) -> float:
        values = [torch.tensor([v], dtype=torch.float64) for v in (a, b, label, 0.0, 1.0)]
        return reward.reward_loss(*values, center=0.1).item()

    assert loss(x, y, p) == pytest.approx(loss(y, x, 1 - p), rel=1e-9, abs=1e-9)


def test_hard_pairs_give_the_loss_of_trl(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"yes {n}" * (n % 3 + 1), "rejected": f"no {n}", "margin": n / 7} for n in range(8)]
    run(
        "reward",
        config(tiny, tmp_path / "ours", write_jsonl(tmp_path / "d.jsonl", rows), margin="margin", batch_size=4, seed=3),
    )
    torch.manual_seed(3)  # as our heads begin
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    own = {"learning_rate": 2e-3, "warmup_steps": 0, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    arguments = RewardConfig(
        str(tmp_path / "trl"), seed=3, data_seed=3, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True, gradient_checkpointing=False, **own,
    )  # fmt: skip
    from datasets import Dataset

    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(Reward(model=tiny, data="x", out="x")),
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    ours = [line["loss"] for line in lines(tmp_path / "ours" / "metrics.jsonl") if "loss" in line]
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-5)


# ---------------------------------------------------------------- groups and batches


def ranked(count: int, group: str = "7") -> list[dict[str, Any]]:
    """All pairs of so many responses to one prompt, in the columns of `rlaif pairs`."""
    return [
        {"prompt": "Q", "chosen": f"r{i}", "rejected": f"r{j}", "soft_label": 0.9, "group": group, "head": 0}
        for i in range(count)
        for j in range(i + 1, count)
    ]


def bytes_of(prompt: str, response: str) -> list[int]:
    return list((prompt + response).encode())


@given(counts=st.lists(st.integers(2, 6), min_size=1, max_size=4), order=st.randoms(use_true_random=False))
def test_a_ranking_reads_each_response_once_and_weighs_as_much_as_a_pair(counts: list[int], order: random.Random) -> None:
    rows = [row for n, count in enumerate(counts) for row in ranked(count, str(n))]
    order.shuffle(rows)
    made = list(reward.groups(rows, bytes_of))
    assert sorted(len(group.ids) for group in made) == sorted(counts)
    for group in made:
        pairs = len(group.chosen)
        assert pairs * group.weight == pytest.approx(1.0)  # 1 / (K choose 2) each
        for chosen, rejected in zip(group.chosen, group.rejected, strict=True):
            assert group.ids[chosen] < group.ids[rejected]  # r0 is better than r1 …


def test_a_ranking_without_some_of_its_pairs_weighs_less() -> None:
    (group,) = reward.groups(ranked(4)[:5], bytes_of)
    assert len(group.chosen) * group.weight == pytest.approx(5 / 6)


def test_groups_of_other_prompts_or_heads_are_others() -> None:
    rows = [*ranked(2), {**ranked(2)[0], "prompt": "other"}, {**ranked(2)[0], "head": 1}]
    assert len(list(reward.groups(rows, bytes_of))) == 3


@settings(max_examples=50)
@given(st.lists(st.integers(2, 4), min_size=1, max_size=4))
def test_a_batch_keeps_each_comparison_with_its_responses(counts: list[int]) -> None:
    rows = [{**row, "prompt": f"Q{n}"} for n, count in enumerate(counts) for row in ranked(count, str(n))]
    made = [vars(group) for group in reward.groups(rows, bytes_of)]
    batch = reward.collate(made, pad=0)
    texts = [
        bytes(own[: mask.sum()].tolist()).decode()
        for own, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    compared = [(texts[i], texts[j]) for i, j in zip(batch["chosen"], batch["rejected"], strict=True)]
    assert compared == [(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) for row in rows]
    assert batch["weight"].sum().item() == pytest.approx(1.0, rel=1e-5)


def test_binary_gives_every_response_a_label_of_its_own() -> None:
    rows = [
        {"prompt": "Q", "chosen": "a", "rejected": "b", "soft_label": 0.8, "head": 0},
        {"prompt": "Q", "chosen": "c", "rejected": "d", "head": 0},
    ]
    soft, hard = reward.groups(rows, bytes_of, binary=True)
    assert (soft.target, hard.target) == ([0.8, pytest.approx(0.2)], [1.0, 0.0])
    assert soft.weight == 0.5
    (single,) = reward.groups([{"prompt": "Q", "completion": "a", "label": False, "head": 0}], bytes_of, binary=True)
    assert (single.target, single.weight) == ([0.0], 1.0)


# ---------------------------------------------------------------- planted truths


def test_soft_labels_are_learnt_as_they_are(tiny: str, tmp_path: Path) -> None:
    planted = [0.9, 0.7, 0.5, 0.2]
    rows = [
        {"prompt": f"Question {n}", "chosen": f"{'abcd'[n] * 3}", "rejected": f"{'wxyz'[n] * 3}", "soft_label": p}
        for n, p in enumerate(planted)
    ]
    out = tmp_path / "out"
    run("reward", config(tiny, out, write_jsonl(tmp_path / "d.jsonl", rows), max_steps=150, batch_size=4))
    chosen, rejected = scores(out / "model", rows)
    assert 1 / (1 + np.exp(rejected - chosen)) == pytest.approx(planted, abs=0.01)


def test_a_ranking_is_learnt(tiny: str, tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"Q{n}"} for n in range(4) for row in ranked(4, str(n))]
    for row in rows:
        del row["head"]
    out = tmp_path / "out"
    report = run("reward", config(tiny, out, write_jsonl(tmp_path / "d.jsonl", rows), max_steps=40, batch_size=2))
    chosen, rejected = scores(out / "model", rows)
    assert (chosen > rejected).all()
    assert report["parts"][0]["steps"] == 40


def test_a_margin_pushes_the_scores_apart(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"a{n}", "rejected": f"b{n}", "soft_label": 0.7, "how": "much"} for n in range(4)]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    words = {"margin": "how", "margin_values": {"much": 2.0}}
    run("reward", config(tiny, tmp_path / "out", file, max_steps=120, **words))
    chosen, rejected = scores(tmp_path / "out" / "model", rows)
    # σ(Δ − 2) = .7
    assert (chosen - rejected) == pytest.approx(np.full(4, 2 + math.log(0.7 / 0.3)), abs=0.1)


def test_centred_rewards_stay_around_zero(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(8)]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    sums = {}
    for center in (0.0, 1.0):
        out = tmp_path / f"{center}"
        run("reward", config(tiny, out, file, max_steps=40, center=center))
        sums[center] = np.abs(np.add(*scores(out / "model", rows))).mean()
    assert sums[1.0] < 0.1 * sums[0.0]


def test_two_heads_learn_opposite_things(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(8)]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    files = {
        "helpful": str(write_jsonl(tmp_path / "h.jsonl", rows)),
        "safe": str(write_jsonl(tmp_path / "s.jsonl", turned)),
    }
    run("reward", config(tiny, tmp_path / "out", files, max_steps=60))
    for head, sign in ((0, 1), (1, -1)):
        chosen, rejected = scores(tmp_path / "out" / "model", rows, head)
        assert (sign * (chosen - rejected) > 0).all()
    assert json.loads((tmp_path / "out" / "model" / "reward.json").read_text())["heads"] == ["helpful", "safe"]


@pytest.mark.usefixtures("pictures")
def test_pretraining_on_single_responses_goes_before_our_pairs(tiny: str, tmp_path: Path) -> None:
    public = [{"prompt": f"Q{n}", "completion": f"{'ab'[n % 2]}{n}", "label": n % 2 == 0} for n in range(16)]
    ours = [{"prompt": f"Q{n}", "chosen": f"c{n}", "rejected": f"d{n}"} for n in range(8)]
    stages = (
        {"data": str(write_jsonl(tmp_path / "public.jsonl", public)), "loss": "binary", "max_steps": 60},
        {"data": str(write_jsonl(tmp_path / "ours.jsonl", ours)), "max_steps": 40},
    )
    made = config(tiny, tmp_path / "out", None, stages=stages)
    report = run("reward", made)
    assert [part["name"] for part in report["parts"]] == ["stage-1", "stage-2"]
    assert (tmp_path / "out" / "plots" / "accuracy.svg").exists()
    chosen, rejected = scores(tmp_path / "out" / "model", ours)
    assert (chosen > rejected).all()
    before = [{"prompt": row["prompt"], "chosen": f"a{n}", "rejected": f"b{n}"} for n, row in enumerate(public)]
    chosen, rejected = scores(tmp_path / "out" / "model", before)
    assert (chosen > rejected).mean() > 0.8  # what the first stage taught is still there


def test_members_of_an_ensemble_differ(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(8)]
    run("reward", config(tiny, tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", rows), ensemble=2, max_steps=5))
    first, second = (scores(tmp_path / "out" / "model" / f"member-{n}", rows)[0] for n in (1, 2))
    assert np.abs(first - second).min() > 1e-3


def test_lora_is_merged_into_a_model_that_scores(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(8)]
    made = config(tiny, tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", rows), max_steps=40, lora={"r": 4})
    run("reward", made.changed(learning_rate=1e-2))
    chosen, rejected = scores(tmp_path / "out" / "model", rows)
    assert (chosen > rejected).all()
    assert not list((tmp_path / "out").rglob("*.bin"))


# ---------------------------------------------------------------- soft beats hard

LETTERS = "abcdefghijklmnop"


def planted_comparisons(seed: int, count: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Responses of six letters, each with a planted value; a labeler that sees their difference with noise of deviation 1.

    Its soft label is σ(what it sees); the second value is the true difference of each pair.
    """
    draw = random.Random(seed)
    value = {letter: draw.gauss(0, 1) for letter in LETTERS}
    rows, truth = [], []
    for _ in range(count):
        a, b = ("".join(draw.choice(LETTERS) for _ in range(6)) for _ in "ab")
        difference = sum(value[c] for c in a) - sum(value[c] for c in b)
        difference /= math.sqrt(6)
        seen = difference + draw.gauss(0, 1)
        rows.append({"prompt": "Q: ", "chosen": a, "rejected": f"{b}.", "soft_label": 1 / (1 + math.exp(-seen))})
        truth.append(difference)
    return rows, np.array(truth)


def test_soft_labels_beat_hard_ones_of_a_noisy_labeler(tiny: str, tmp_path: Path) -> None:
    """Over five planted worlds: the more often right on pairs not seen, and probabilities nearer to the true ones."""
    right: dict[str, list[float]] = {"soft": [], "hard": []}
    off: dict[str, list[float]] = {"soft": [], "hard": []}
    for seed in range(5):
        rows, truth = planted_comparisons(seed, 1000)
        train, test, truth = rows[:600], rows[600:], truth[600:]
        for kind in ("soft", "hard"):
            labelled = train if kind == "soft" else [{**row, "soft_label": float(row["soft_label"] > 0.5)} for row in train]
            out = tmp_path / f"{seed}-{kind}"
            file = write_jsonl(tmp_path / "d.jsonl", labelled)
            run("reward", config(tiny, out, file, epochs=4, batch_size=16, seed=seed, warmup=0.1))
            chosen, rejected = scores(out / "model", test)
            right[kind].append(((chosen > rejected) == (truth > 0)).mean())
            off[kind].append(np.abs(1 / (1 + np.exp(rejected - chosen)) - 1 / (1 + np.exp(-truth))).mean())
    for what, gains in (
        ("accuracy, soft - hard", np.subtract(right["soft"], right["hard"])),
        ("error of P(chosen is better), hard - soft", np.subtract(off["hard"], off["soft"])),
    ):
        half = student.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1) / math.sqrt(len(gains))
        print(f"{what}: {gains.mean():.3f} ({gains.mean() - half:.3f} to {gains.mean() + half:.3f})")
        assert gains.mean() - half > 0, gains
    print({kind: (np.mean(right[kind]).round(3), np.mean(off[kind]).round(3)) for kind in right})


# ---------------------------------------------------------------- bad settings and data


@pytest.mark.parametrize(
    ("more", "row", "says"),
    [
        ({"labels": "soft"}, {}, "no column 'soft_label'"),
        ({"loss": "ranking"}, {}, "no column 'group'"),
        ({"margin": "gap"}, {}, "no column 'gap'"),
        ({"margin": "gap", "margin_values": {"much": 1.0}}, {"gap": "little"}, "no number for 'little'"),
        ({}, {"soft_label": 0.5}, "every row is a tie"),
        ({}, {"soft_label": 1.5}, "from 0 to 1"),
    ],
)
def test_bad_data_is_told_before_a_model_loads(tmp_path: Path, more: dict[str, Any], row: dict[str, Any], says: str) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": "a", "rejected": "b", **row} for n in range(3)]
    with pytest.raises(UsageError, match=says):
        run("reward", config("no-such-model", tmp_path / "out", write_jsonl(tmp_path / "d.jsonl", rows), **more))
    assert not (tmp_path / "out").exists()


def test_each_head_has_rows_of_its_own_held_out_too(tiny: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(8)]
    files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows[:6])) for name in ("helpful", "safe")}
    held = {name: str(write_jsonl(tmp_path / f"{name}-held.jsonl", rows[6:])) for name in ("helpful", "safe")}
    report = run("reward", config(tiny, tmp_path / "out", files, eval=held, max_steps=2))
    facts = report["data"]["stage-1"]
    assert (facts["train"]["rows"], facts["held_out"]["rows"]) == (12, 4)
    hashes = [hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files.values()]
    assert facts["train"]["sha256"] == ", ".join(hashes)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"eval": "held.jsonl"}, "a file for each head"),
        ({"stages": ({"data": "public.jsonl"}, {})}, "heads must be the same"),
        ({"margin_values": {"much": 1.0}}, "goes with margin"),
        ({"loss": "binary", "margin": "gap"}, "does not go with loss binary"),
        ({"trainer": {"hub_token": "x"}}, "keys come from the environment"),
        ({"trainer": {"model_init_kwargs": {"token": "x"}}}, "keys come from the environment"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(own: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config("tiny", Path("out"), {"helpful": "a.jsonl", "safe": "b.jsonl"}, **own)
