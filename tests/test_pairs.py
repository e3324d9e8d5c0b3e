"""Training sets: who is chosen, what is left out and counted, and that TRL's trainers take the file as it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.label.pairwise import hard_label
from rlaif.pairs import PairSettings, training_pairs
from rlaif.records import Row, UsageError
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl


def row(soft: float | None, status: str | None = None, **changes: Any) -> Row:
    """A labelled row as `rlaif label` writes it; without a soft label it is a failure."""
    label = None if soft is None else hard_label(soft)
    status = status or ("error" if label is None else "tie" if label == "tie" else "ok")
    texts = {"id": "7", "prompt": "Q?", "response_a": "Left.", "response_b": "Right."}
    return {**texts, "status": status, "soft_label": soft, "label": label, "votes": [], "error": None, **changes}


def made(rows: list[Row], **knobs: Any) -> tuple[list[Row], Counter[str]]:
    settings = PairSettings(**knobs)
    return list(training_pairs(rows, settings)), settings.dropped


# ------------------------------------------------------------ one pair


def test_a_pair_has_trls_columns_and_the_labelers_confidence() -> None:
    (pair, other), dropped = made([row(0.75), row(0.125)])
    assert pair == {
        "id": "7",
        "prompt": "Q?",
        "chosen": "Left.",
        "rejected": "Right.",
        "soft_label": 0.75,
        "margin": 0.5,
    }
    assert (other["chosen"], other["rejected"], other["soft_label"], other["margin"]) == ("Right.", "Left.", 0.875, 0.75)
    assert not dropped


def test_hard_pairs_are_certain_but_keep_their_margin_and_leave_ties_out() -> None:
    pairs, dropped = made([row(0.75), row(0.25), row(0.5)], hard=True)
    assert [(pair["soft_label"], pair["margin"]) for pair in pairs] == [(1.0, 0.5), (1.0, 0.5)]
    assert [pair["chosen"] for pair in pairs] == ["Left.", "Right."]
    assert dropped == {"tie": 1}


def test_a_tie_is_an_even_chance_unless_it_is_dropped() -> None:
    (pair,), _ = made([row(0.5)])
    assert (pair["chosen"], pair["soft_label"], pair["margin"]) == ("Left.", 0.5, 0.0)
    # A mean of votes may miss .5 by a rounding error: still an even chance, and never less.
    (pair,), _ = made([row(0.5 - 1e-12)])
    assert (pair["chosen"], pair["soft_label"], pair["margin"]) == ("Left.", 0.5, 0.0)
    assert made([row(0.5)], drop_ties=True) == ([], {"tie": 1})


def test_pairs_under_the_least_confidence_are_left_out_on_both_sides() -> None:
    rows = [row(soft) for soft in (0.0, 0.19, 0.2, 0.21, 0.5, 0.79, 0.8, 0.81, 1.0)]
    pairs, dropped = made(rows, min_confidence=0.8)
    assert [pair["soft_label"] for pair in pairs] == [1.0, 0.81, 0.8, 0.8, 0.81, 1.0]
    assert dropped == {"below the minimum confidence": 3}
    assert made(rows, min_confidence=1.0)[1] == {"below the minimum confidence": 7}


@pytest.mark.parametrize("knobs", [{}, {"hard": True}, {"drop_ties": True}, {"conversational": True}, {"min_confidence": 0.9}])
def test_a_failure_never_becomes_a_pair(knobs: dict[str, Any]) -> None:
    rows = [row(None, status) for status in ("error", "unparsed", "refused", "error")]
    # Nor does one that holds a label all the same, as other tools write them.
    rows += [row(0.9, "unparsed", label="a")]
    assert made(rows, **knobs) == ([], {"error": 2, "unparsed": 2, "refused": 1})


def test_failures_with_broken_texts_are_left_out_without_a_complaint() -> None:
    assert made([row(None, response_a=None, prompt=3)], conversational=True) == ([], {"error": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {"label": "b"},
        {"label": "tie"},
        {"label": None},
        {"label": "A"},
        {"soft_label": None},
        {"soft_label": 1.5},
        {"soft_label": float("nan")},
        {"soft_label": "0.9"},
    ],
)
def test_a_label_that_is_not_the_soft_labels_own_is_refused(changes: Row) -> None:
    with pytest.raises(UsageError, match=r"row '7': label .* and soft_label .* do not belong together"):
        made([{**row(0.9), **changes}])


# ------------------------------------------------------------ texts and messages

HH = "Human: How?\n\nAssistant: What do you mean?\n\nHuman: Really how?"
TURNS = [
    {"role": "user", "content": "How?"},
    {"role": "assistant", "content": "What do you mean?"},
    {"role": "user", "content": "Really how?"},
]


@pytest.mark.parametrize(
    ("prompt", "text", "messages"),
    [
        ("Q?", "Q?", [{"role": "user", "content": "Q?"}]),
        (HH, HH, TURNS),
        (TURNS, HH, TURNS),
        ([{"role": "user", "content": "Q?"}], "Q?", [{"role": "user", "content": "Q?"}]),
    ],
)
def test_both_forms_of_every_kind_of_prompt(prompt: Any, text: str, messages: list[Row]) -> None:
    (plain,), _ = made([row(0.2, prompt=prompt)])
    # Trainers join the texts as they are, so a dialogue's prompt ends where the assistant's turn begins.
    turn, space = ("\n\nAssistant:", " ") if text == HH else ("", "")
    assert (plain["prompt"], plain["chosen"], plain["rejected"]) == (text + turn, space + "Right.", space + "Left.")
    (talk,), _ = made([row(0.2, prompt=prompt)], conversational=True)
    assert talk["prompt"] == messages
    assert talk["chosen"] == [{"role": "assistant", "content": "Right."}]
    assert talk["rejected"] == [{"role": "assistant", "content": "Left."}]
    assert {name: talk[name] for name in ("id", "soft_label", "margin")} == {
        name: plain[name] for name in ("id", "soft_label", "margin")
    }


# ------------------------------------------------------------ rankings


def ranked_row(*pairs: tuple[int, int, float], status: str = "ok", **changes: Any) -> Row:
    """A row of three responses as `rlaif rank` writes it; no pairs where it failed."""
    listed = [{"chosen": i, "rejected": j, "soft_label": p} for i, j, p in pairs]
    texts = {"id": "7", "prompt": "Q?", "responses": ["Zero.", "One.", "Two."]}
    result = {"ranking": [2, 0, 1], "scores": [0.0, -1.0, 1.0], "pairs": listed, "cycles": 0}
    if status not in ("ok", "tie"):
        result = dict.fromkeys(result)
    return {**texts, "status": status, **result, "votes": [], "error": None, **changes}


def test_every_pair_of_a_ranking_is_a_pair_of_its_group() -> None:
    pairs, dropped = made([ranked_row((2, 0, 0.75), (0, 1, 1.0), (2, 1, 0.875)), ranked_row((1, 0, 0.75), id="8")])
    assert pairs[0] == {
        "id": "7/2-0",
        "group": "7",
        "prompt": "Q?",
        "chosen": "Two.",
        "rejected": "Zero.",
        "soft_label": 0.75,
        "margin": 0.5,
    }
    assert [(p["id"], p["group"], p["chosen"], p["rejected"]) for p in pairs[1:]] == [
        ("7/0-1", "7", "Zero.", "One."),
        ("7/2-1", "7", "Two.", "One."),
        ("8/1-0", "8", "One.", "Zero."),
    ]
    assert not dropped


def test_the_pairs_of_a_ranking_are_left_out_one_by_one_and_a_failed_ranking_once() -> None:
    rows = [
        ranked_row((2, 0, 0.5), (0, 1, 0.9), (2, 1, 0.6)),
        ranked_row((0, 1, 0.5), (0, 2, 0.5), (1, 2, 0.5), status="tie"),
        ranked_row(status="unparsed"),
        ranked_row(status="error", prompt=None, responses=None),
    ]
    failures = {"unparsed": 1, "error": 1}
    pairs, dropped = made(rows)
    assert [pair["id"] for pair in pairs] == ["7/2-0", "7/0-1", "7/2-1", "7/0-1", "7/0-2", "7/1-2"]
    assert dropped == failures
    pairs, dropped = made(rows, drop_ties=True)
    assert [pair["id"] for pair in pairs] == ["7/0-1", "7/2-1"]
    assert dropped == {"tie": 4, **failures}
    pairs, dropped = made(rows, min_confidence=0.8, hard=True, conversational=True)
    assert dropped == {"tie": 4, "below the minimum confidence": 1, **failures}
    (pair,) = pairs
    assert (pair["soft_label"], pair["margin"]) == (1.0, 0.8)
    assert pair["prompt"] == [{"role": "user", "content": "Q?"}]
    assert pair["chosen"] == [{"role": "assistant", "content": "Zero."}]


@pytest.mark.parametrize(
    "pair",
    [(0, 3, 0.9), (-1, 0, 0.9), (1, 1, 0.9), (0, 1, 0.4), (0, 1, 1.1), (0, 1, None), ("0", 1, 0.9), (0, 1, float("nan"))],
)
def test_a_pair_that_is_none_of_its_rankings_is_refused(pair: Any) -> None:
    with pytest.raises(UsageError, match=r"row '7': .* is no pair of its responses"):
        made([ranked_row(pair)])


@given(softs=st.lists(st.floats(0.5, 1) | st.just(0.5), min_size=3, max_size=3), knobs=st.deferred(lambda: KNOBS))
def test_a_ranking_gives_the_pairs_that_its_comparisons_would(softs: list[float], knobs: dict[str, Any]) -> None:
    places = [(0, 1), (2, 0), (2, 1)]
    texts = ["Zero.", "One.", "Two."]
    ours, dropped = made([ranked_row(*((i, j, p) for (i, j), p in zip(places, softs, strict=True)))], **knobs)
    compared = [
        row(p, id=f"7/{i}-{j}", response_a=texts[i], response_b=texts[j]) for (i, j), p in zip(places, softs, strict=True)
    ]
    theirs, also_dropped = made(compared, **knobs)
    assert [{k: v for k, v in pair.items() if k != "group"} for pair in ours] == theirs
    assert {pair["group"] for pair in ours} <= {"7"}
    assert dropped == also_dropped


# ------------------------------------------------------------ properties

SOFT = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0, 0.5 - 1e-12, 0.5 + 1e-12])
KNOBS = st.fixed_dictionaries(
    {
        "min_confidence": st.floats(0.5, 1) | st.just(0.5),
        "hard": st.booleans(),
        "drop_ties": st.booleans(),
        "conversational": st.booleans(),
    }
)


@given(soft=st.none() | SOFT, knobs=KNOBS)
def test_swapping_the_responses_and_mirroring_the_label_gives_the_same_pair(soft: float | None, knobs: dict[str, Any]) -> None:
    one = row(soft)
    swapped = row(None if soft is None else 1 - soft, response_a="Right.", response_b="Left.")
    (pairs, dropped), (others, also_dropped) = made([one], **knobs), made([swapped], **knobs)
    if pairs and others and one["label"] != "tie":  # a tie has no side: A stands as chosen
        assert {k: v for k, v in pairs[0].items() if k not in ("soft_label", "margin")} == {
            k: v for k, v in others[0].items() if k not in ("soft_label", "margin")
        }
        assert pairs[0]["soft_label"] == pytest.approx(others[0]["soft_label"], abs=1e-12)
    elif soft is None or abs(max(soft, 1 - soft) - knobs["min_confidence"]) > 1e-12:  # else a rounding error decides
        assert (len(pairs), dropped) == (len(others), also_dropped)


@given(softs=st.lists(st.none() | SOFT, max_size=20), knobs=KNOBS)
def test_every_row_is_a_pair_or_counted_and_no_pair_is_less_than_even(softs: list[float | None], knobs: dict[str, Any]) -> None:
    pairs, dropped = made([row(soft) for soft in softs], **knobs)
    assert len(pairs) + sum(dropped.values()) == len(softs)
    assert dropped["error"] == softs.count(None)
    for pair in pairs:
        assert 0.5 <= pair["soft_label"] <= 1
        assert 0 <= pair["margin"] <= 1
        assert (pair["margin"] + 1) / 2 >= knobs["min_confidence"] - 1e-12


# ------------------------------------------------------------ the command


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [row(soft, id=str(n)) for n, soft in enumerate((0.9, 0.2, 0.5, 0.55, None, None))]
    rows[5]["status"] = "refused"
    return write_jsonl(tmp_path / "o.jsonl", rows)


@pytest.mark.parametrize(
    ("args", "ids", "counts"),
    [
        ((), ["0", "1", "2", "3"], "4 pairs of 6 rows; left out: 1 error, 1 refused"),
        (("--drop-ties",), ["0", "1", "3"], "3 pairs of 6 rows; left out: 1 tie, 1 error, 1 refused"),
        (("--hard",), ["0", "1", "3"], "3 pairs of 6 rows; left out: 1 tie, 1 error, 1 refused"),
        (
            ("--min-confidence", "0.8"),
            ["0", "1"],
            "2 pairs of 6 rows; left out: 2 below the minimum confidence, 1 error, 1 refused",
        ),
    ],
)
def test_the_command_counts_what_it_leaves_out(labelled: Path, args: tuple[str, ...], ids: list[str], counts: str) -> None:
    train = labelled.with_name("t.jsonl")
    done = cli("pairs", labelled, "-o", train, *args)
    assert (done.returncode, done.stdout) == (0, f"{train}: {counts}\n")
    pairs = read_jsonl(train)
    assert [pair["id"] for pair in pairs] == ids
    assert all(set(pair) == {"id", "prompt", "chosen", "rejected", "soft_label", "margin"} for pair in pairs)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_the_command_takes_a_ranked_file_of_rlaifs_own(tmp_path: Path, ending: str) -> None:
    lists = [
        {"prompt": f"p{n}", "responses": [f"r{n}.{m}" for m in range(3)], "qualities": [0.1 * n, 1.0, -1.0]} for n in range(6)
    ]
    path, ranked, train = write_jsonl(tmp_path / "d.jsonl", lists), tmp_path / f"o{ending}", tmp_path / "t.jsonl"
    assert cli("rank", path, "-o", ranked, "--engine", "mock", "-E", "garbage=0.1", "-E", "seed=1").returncode == 0
    report = json.loads((tmp_path / f"o{ending}.run.json").read_text())
    good, failed = report["statuses"]["ok"], report["statuses"]["unparsed"]
    assert min(good, failed) > 0
    done = cli("pairs", ranked, "-o", train)
    assert (done.returncode, done.stdout) == (0, f"{train}: {3 * good} pairs of 6 rows; left out: {failed} unparsed\n")
    pairs = read_jsonl(train)
    assert all(list(pair) == ["id", "group", "prompt", "chosen", "rejected", "soft_label", "margin"] for pair in pairs)
    assert set(Counter(pair["group"] for pair in pairs).values()) == {3}
    for pair in pairs:
        given = lists[int(pair["group"])]
        chosen, rejected = (given["responses"].index(pair[name]) for name in ("chosen", "rejected"))
        assert pair["id"] == f"{pair['group']}/{chosen}-{rejected}"
        assert pair["prompt"] == given["prompt"]
        assert given["qualities"][chosen] > given["qualities"][rejected]


@pytest.mark.parametrize("ranked_first", [True, False])
def test_comparisons_and_rankings_in_one_file_are_refused(tmp_path: Path, ranked_first: bool) -> None:
    rows = [row(0.9), row(0.9), ranked_row((0, 1, 0.9))]
    path = write_jsonl(tmp_path / "o.jsonl", rows[::-1] if ranked_first else rows)
    done = cli("pairs", path, "-o", tmp_path / "t.jsonl")
    kind, line = ("a comparison", 2) if ranked_first else ("a ranking", 3)
    assert done.returncode == 2
    assert done.stderr == f"rlaif: {path} line {line}: {kind}, unlike the rows before it\n"
    assert not (tmp_path / "t.jsonl").exists()


def test_a_ranked_file_without_a_column_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "o.jsonl", [{k: v for k, v in ranked_row().items() if k != "responses"}])
    done = cli("pairs", path, "-o", tmp_path / "t.jsonl")
    assert done.returncode == 2
    assert "line 1: no column 'responses'; is this an output of `rlaif label` or `rlaif rank`?" in done.stderr


def test_no_pair_at_all_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "o.jsonl", [row(None), row(0.5)])
    done = cli("pairs", path, "-o", tmp_path / "t.jsonl", "--hard")
    assert done.returncode == 1
    assert done.stderr == f"rlaif: {path}: no row gives a pair (1 error, 1 tie)\n"
    assert not (tmp_path / "t.jsonl").exists()


# ------------------------------------------------------------ TRL takes the file as it is


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Llama of two layers over bytes: a folder, for a trainer loads its reference from there."""
    pytest.importorskip("trl")
    from tests.engines.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("trainer", ["dpo", "reward"])
@pytest.mark.parametrize("form", ["plain", "conversational"])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_trl_trains_on_the_file_as_it_is(tmp_path: Path, tiny: Path, trainer: str, form: str, ending: str) -> None:
    import datasets
    import trl

    rows = [
        {**row(0.9 if n % 2 else 0.3), "id": str(n), **{k: given[k] for k in ("response_a", "response_b")}}
        for n, given in enumerate(make_rows(8))
    ]
    rows[0]["prompt"], rows[1]["prompt"] = HH, HH
    path, train = write_jsonl(tmp_path / "o.jsonl", rows), tmp_path / f"t{ending}"
    assert cli("pairs", path, "-o", train, "--form", form).returncode == 0
    load = datasets.Dataset.from_json if ending == ".jsonl" else datasets.Dataset.from_parquet
    data = load(str(train), cache_dir=str(tmp_path / "cache"))
    knobs: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "max_length": 256,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    config, cls = (trl.DPOConfig, trl.DPOTrainer) if trainer == "dpo" else (trl.RewardConfig, trl.RewardTrainer)
    training = cls(model=str(tiny), args=config(**knobs), train_dataset=data)
    assert len(training.train_dataset) == len(rows)  # rows over the length would be dropped in silence
    before = {name: weight.detach().clone() for name, weight in training.model.named_parameters()}
    loss = training.train().training_loss
    assert training.state.global_step == 1
    assert loss == loss
    assert loss > 0.1
    assert any(not weight.equal(before[name]) for name, weight in training.model.named_parameters())


def test_the_columns_are_the_ones_trl_documents(labelled: Path) -> None:
    """The reward trainer subtracts `margin` where there is one; a null in it would end the training."""
    train = labelled.with_name("t.jsonl")
    assert cli("pairs", labelled, "-o", train, "--form", "conversational").returncode == 0
    for pair in read_jsonl(train):
        assert isinstance(pair["margin"], float)
        assert json.dumps(pair["prompt"]) == json.dumps([{"role": "user", "content": "Q?"}])
