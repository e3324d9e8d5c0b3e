"""Prompts of a run: what is read and refused, what is left out and guarded, their tokens, and the order they are dealt in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.records import UsageError
from rlaif.rl.config import Ppo
from rlaif.rl.prompts import Encoder, deal, fitting, read
from rlaif.train.data import Rows, pairs
from tests.conftest import write_jsonl
from tests.engines.tiny import tiny_tokenizer

USER = [{"role": "user", "content": "Why?"}]
DIALOGUE = "\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Really?\n\nAssistant: Yes."
TURNS = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "Really?"},
]
AS_TEXT = "Human: Why?\n\nAssistant: Because.\n\nHuman: Really?"


def config(data: Path | str = "none.jsonl", **more: Any) -> Ppo:
    own = {"name": "run.yaml", "data": str(data), "out": "out", "reward": [{"kind": "length", "most": 5}]}
    return Ppo.model_validate({**own, "max_length": 64, "max_new_tokens": 14, **more})


def prompt_of(tmp_path: Path, row: dict[str, Any], **more: Any) -> Any:
    found, held = read(config(write_jsonl(tmp_path / "data.jsonl", [row]), **more))
    assert held is None
    assert found.rows == [{**row, "prompt": found.rows[0]["prompt"]}]  # all else stays as it is
    return found.rows[0]["prompt"]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("row", "form", "wanted"),
    [
        ({"prompt": "Why?"}, "auto", "Why?"),
        ({"prompt": "Why?"}, "plain", "Why?"),
        ({"prompt": "Why?"}, "conversational", USER),
        ({"prompt": AS_TEXT + "\n\nAssistant:"}, "auto", AS_TEXT + "\n\nAssistant:"),
        ({"prompt": AS_TEXT + "\n\nAssistant:"}, "conversational", TURNS),
        ({"prompt": USER}, "auto", USER),
        ({"prompt": USER}, "plain", "Why?"),
        ({"prompt": TURNS}, "plain", AS_TEXT + "\n\nAssistant:"),
        ({"chosen": DIALOGUE}, "auto", TURNS),
        ({"chosen": DIALOGUE}, "conversational", TURNS),
        ({"chosen": DIALOGUE}, "plain", AS_TEXT + "\n\nAssistant:"),
        ({"chosen": [*TURNS, {"role": "assistant", "content": "Yes."}]}, "auto", TURNS),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, "auto", "Why?"),
    ],
)
def test_prompts_are_read_in_each_form(tmp_path: Path, row: dict[str, Any], form: str, wanted: Any) -> None:
    assert prompt_of(tmp_path, {**row, "topic": ["a", 1]}, form=form) == wanted


@pytest.mark.parametrize("form", ["auto", "plain", "conversational"])
@pytest.mark.parametrize("prompt", ["Why?", AS_TEXT, AS_TEXT + "\n\nAssistant:", USER, TURNS, None])
def test_a_prompt_is_what_training_on_the_same_row_makes_of_it(tmp_path: Path, form: Any, prompt: Any) -> None:
    """Then the policy meets prompts in the form in which it was fine-tuned, and in which its reward model was trained."""
    if prompt is None:
        row = {"chosen": DIALOGUE, "rejected": DIALOGUE.replace("Yes.", "No.")}
    else:
        row = {"prompt": prompt, "chosen": "Yes.", "rejected": "No."}
    trained = pairs(str(write_jsonl(tmp_path / "pairs.jsonl", [row])), form).rows[0]["prompt"]
    if isinstance(prompt, list) and form == "auto":
        trained = prompt  # where responses are texts, training takes texts
    assert prompt_of(tmp_path, row, form=form) == trained


BAD = [
    ({"prompt": None}, r"data\.jsonl line 2: column 'prompt': expected text or messages, got null"),
    ({"prompt": 7}, r"data\.jsonl line 2: column 'prompt': expected text or messages, got a number"),
    ({"prompt": ["Why?"]}, r"data\.jsonl line 2: column 'prompt': expected text or messages, got a list"),
    ({"prompt": " \n"}, r"data\.jsonl line 2: column 'prompt' is empty"),
    ({"prompt": []}, r"data\.jsonl line 2: column 'prompt' is empty"),
    ({"chosen": None}, r"data\.jsonl line 2: column 'chosen': expected a dialogue ending with an assistant turn, got null"),
    ({"chosen": USER}, r"data\.jsonl line 2: column 'chosen': expected a dialogue ending with an assistant turn, got a list"),
    ({"chosen": "Because."}, r"data\.jsonl line 2: column 'chosen': expected a dialogue .* got text"),
    ({"chosen": "\n\nAssistant: Yes."}, r"data\.jsonl line 2: column 'chosen' has a prompt that is empty"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows_are_named_or_left_out(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "Why?"}, row, {"prompt": "How?"}])
    with pytest.raises(UsageError, match=message):
        read(config(data))
    found, _ = read(config(data, bad_rows="drop"))
    assert [one["prompt"] for one in found.rows] == ["Why?", "How?"]
    assert found.facts()["left_out"] == {"that cannot be trained on": 1}
    write_jsonl(data, [row])
    with pytest.raises(UsageError, match=r"no rows that can be trained on, of 1"):
        read(config(data, bad_rows="drop"))


def test_a_missing_column_stops_a_run_whatever_is_left_out(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "Why?", "id": 3}])
    with pytest.raises(UsageError, match=r"data\.jsonl line 1: no column 'prompt'; there are: question, id"):
        read(config(data, bad_rows="drop"))
    with pytest.raises(UsageError, match=r"data\.jsonl: no rows$"):
        read(config(write_jsonl(data, [])))


def test_prompts_are_held_out_and_limited(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": f"Why {n % 20}?"} for n in range(40)])
    assert len(read(config(data, limit=7))[0].rows) == 7
    train, held = read(config(data, eval_share=0.3))
    assert held
    assert len(train.rows) + len(held.rows) == 40
    assert not {row["prompt"] for row in train.rows} & {row["prompt"] for row in held.rows}
    other = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "When?"}])
    train, held = read(config(data, eval=str(other)))
    assert held
    assert (len(train.rows), held.rows) == (40, [{"prompt": "When?"}])


# ---------------------------------------------------------------- fitting


def rows(*prompts: Any, **more: Any) -> Rows:
    return Rows("data.jsonl", [{"prompt": prompt, **more} for prompt in prompts])


def test_prompts_that_leave_no_room_for_a_response_are_left_out_and_counted() -> None:
    tokenizer = tiny_tokenizer()  # a token for each byte
    found = rows("x" * 50, "x" * 51, "x" * 49, "é" * 26)
    found.dropped["that cannot be trained on"] = 2
    kept = fitting(found, config(), tokenizer)
    assert [len(row["prompt"]) for row in kept.rows] == [50, 49]
    assert kept.dropped == {"that cannot be trained on": 2, "over 50 tokens": 2}
    assert found.dropped == {"that cannot be trained on": 2}
    with pytest.raises(UsageError, match=r"data\.jsonl: no prompt that leaves room .*: 1 over 50 tokens"):
        fitting(rows("x" * 51), config(), tokenizer)
    whole = len(tokenizer.apply_chat_template(USER, add_generation_prompt=True)["input_ids"])
    assert fitting(rows(USER), config(max_length=whole + 14), tokenizer).rows
    with pytest.raises(UsageError, match="leaves room"):
        fitting(rows(USER), config(max_length=whole + 13), tokenizer)


pieces = st.sampled_from(["<|end|>", "<|turn|>", "<|pad|>", "<|", "turn|>", "assistant: ", "\n", "a"])


@given(st.lists(pieces, max_size=8).map("".join))
def test_no_message_ends_its_own_turn(content: str) -> None:
    tokenizer = tiny_tokenizer()
    prompt = [{"role": "user", "content": "x" + content}]
    (row,) = fitting(rows(prompt), config(max_length=512), tokenizer).rows
    controls = [token for token in Encoder(tokenizer)(row["prompt"]) if token >= 256]
    assert controls == tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>", "<|turn|>"])
    assert Encoder(tokenizer)(row["prompt"]) == Encoder(tokenizer)(prompt)  # whichever of both is encoded
    whole = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    assert whole == Encoder(tokenizer)(prompt)  # a judge that renders it by itself is as safe


def test_other_columns_stay_as_they_are() -> None:
    odd = {
        "responses": ["<|end|>", "b"],
        "chosen": [{"role": "assistant", "content": "<|end|>"}],
        "number": 3.5,
        "nested": {"a": [None, "<|turn|>"]},
        "lone": "\ud800",
    }
    (row,) = fitting(rows([{"role": "user", "content": "<|end|>"}], **odd), config(), tiny_tokenizer()).rows
    assert {name: row[name] for name in odd} == odd
    assert row["prompt"][0]["content"] != "<|end|>"


# ---------------------------------------------------------------- tokens


def test_messages_are_encoded_by_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    wanted = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"]
    assert Encoder(tokenizer)(TURNS) == wanted
    assert tokenizer.decode(wanted).endswith("Really?<|end|>\n<|turn|>assistant: ")


def test_texts_are_encoded_as_they_are() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    encode = Encoder(tokenizer)
    assert encode("Why <|end|>é") == tokenizer("Why <|end|>é")["input_ids"]
    assert tokenizer.eos_token_id in encode("Why <|end|>")
    assert tokenizer.decode(encode("a\ud800")) == "a?"
    with pytest.raises(UsageError, match=r"has no chat template, which messages need: .* form: plain"):
        encode(USER)


# ---------------------------------------------------------------- dealing


@given(st.integers(1, 12), st.integers(0, 3), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_all_prompts_come_once_each_time_through_whatever_the_steps(count: int, seed: int, steps: list[int]) -> None:
    whole = deal(count, 0, sum(steps), seed)
    starts = [sum(steps[:n]) for n in range(len(steps))]
    assert [place for start, number in zip(starts, steps, strict=True) for place in deal(count, start, number, seed)] == whole
    for start in range(0, sum(steps) - count + 1, count):
        assert sorted(whole[start : start + count]) == list(range(count))


def test_each_time_through_and_each_seed_has_an_order_of_its_own() -> None:
    orders = [tuple(deal(20, 20 * through, 20, seed)) for through in range(3) for seed in range(3)]
    assert len(set(orders)) == 9
    assert deal(20, 20, 20, 1) == list(orders[4])
    first = Counter(deal(4, 4 * through, 1, 0)[0] for through in range(400))
    assert all(60 < first[place] < 140 for place in range(4))
