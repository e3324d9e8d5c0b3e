"""Supervised fine-tuning and context distillation, on a tiny model with a token for each byte."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlaif.records import UsageError
from rlaif.train import distill, sft
from rlaif.train.config import Lora, Sft
from rlaif.train.data import guarded
from rlaif.train.kinds import load_config
from rlaif.train.record import lines
from rlaif.train.run import Part, arguments, load_tokenizer, run
from tests.engines.tiny import save_tiny, tiny_tokenizer

SYSTEM = "Speak like a pirate."
COLOURS = ("red", "blue", "green", "grey")
ROWS = [{"prompt": f"What is {a}?", "completion": f"It is {a}{b}"} for a in COLOURS for b in (".", ", I think.")]
MESSAGES = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def absolute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with positions of its own for each place, and dropout."""
    folder = tmp_path_factory.mktemp("models") / "absolute"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=258, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def context(tmp_path: Path) -> str:
    path = tmp_path / "context.txt"
    path.write_text(f"{SYSTEM}\n", encoding="utf-8")
    return str(path)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(tiny: Path, folder: Path, rows: list[dict[str, Any]] = ROWS, **given: Any) -> Sft:
    data = write(folder / "data.jsonl", rows)
    return Sft(**{"name": "t", "model": str(tiny), "data": data, "out": str(folder / "out"), "device": "cpu", **given})


def one_step(tiny: Path, folder: Path, rows: list[dict[str, Any]] = ROWS, **given: Any) -> float:
    """The loss of the first step, which takes all rows."""
    made = sft.trainer(part_of(config(tiny, folder, rows, max_steps=1, batch_size=len(rows), **given)))
    made.train()
    return float(made.state.log_history[0]["loss"])


def metrics(made: Sft) -> list[dict[str, Any]]:
    return list(lines(Path(made.out) / "metrics.jsonl"))


def part_of(made: Sft) -> Part:
    train, held = sft.read(made)
    tokenizer = load_tokenizer(made)
    train, held = (rows and guarded(rows, tokenizer) for rows in (train, held))  # as `Run` does it for all trainers
    part = Part("train", made, made.model, Path(made.out), made.seed, tokenizer, train, held)
    part.arguments.update(arguments(part))
    return part


def ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text)["input_ids"])


@cache
def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)


def log_probs(model: Path, start: str, rest: str) -> torch.Tensor:
    """Of the next token at each place of `rest`, (tokens, vocabulary), in float64."""
    loaded = load(model)
    with torch.no_grad():
        logits = loaded(torch.tensor([ids(start) + ids(rest)])).logits[0]
    return torch.log_softmax(logits, -1)[len(ids(start)) - 1 : -1]


def nll(model: Path, texts: list[tuple[str, str]]) -> float:
    """The mean over all tokens of each second text, after its first."""
    tokens = [-log_probs(model, start, rest).gather(1, torch.tensor(ids(rest))[:, None]).flatten() for start, rest in texts]
    return float(torch.cat(tokens).mean())


def kl(model: Path, student: Path, texts: list[tuple[str, str, str]]) -> float:
    """The mean over all tokens of each third text, after the first for the teacher and after the second for the student."""
    tokens = []
    for context, prompt, rest in texts:
        wanted, own = log_probs(model, context, rest), log_probs(student, prompt, rest)
        tokens.append((wanted.exp() * (wanted - own)).sum(-1))
    return float(torch.cat(tokens).mean())


def turn(role: str, text: str) -> str:
    return f"<|turn|>{role}: {text}<|end|>\n"


ANSWER = "<|turn|>assistant: "
PLAIN = [(row["prompt"], row["completion"] + "<|end|>") for row in ROWS]
CHAT = [(turn("user", row["prompt"]) + ANSWER, row["completion"] + "<|end|>\n") for row in ROWS]
PLAIN_TAUGHT = [(f"{SYSTEM}\n\n{prompt}", prompt, rest) for prompt, rest in PLAIN]
CHAT_TAUGHT = [(turn("system", SYSTEM) + prompt, prompt, rest) for prompt, rest in CHAT]


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize(("form", "texts"), [("plain", PLAIN), ("conversational", CHAT)])
def test_only_completions_are_learnt(tiny: Path, tmp_path: Path, form: str, texts: list[tuple[str, str]]) -> None:
    assert one_step(tiny, tmp_path, form=form) == pytest.approx(nll(tiny, texts), rel=1e-5)


def test_of_messages_the_last_answer_is_learnt(tiny: Path, tmp_path: Path) -> None:
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    start = turn("user", "Hi") + turn("assistant", "Hello.")
    rows = [{"messages": before + row["messages"]} for row in MESSAGES]
    texts = [(start + prompt, rest) for prompt, rest in CHAT]
    assert one_step(tiny, tmp_path, rows) == pytest.approx(nll(tiny, texts), rel=1e-5)


def test_the_prompt_too_if_so_chosen(tiny: Path, tmp_path: Path) -> None:
    texts = [(prompt[:1], prompt[1:] + rest) for prompt, rest in PLAIN]
    loss = one_step(tiny, tmp_path, completion_only=False)
    assert loss == pytest.approx(nll(tiny, texts), rel=1e-5)
    assert loss != pytest.approx(nll(tiny, PLAIN), rel=1e-2)


def test_texts(tiny: Path, tmp_path: Path) -> None:
    rows = [{"text": "".join(row.values()), "id": n} for n, row in enumerate(ROWS)]
    texts = [(row["text"][:1], row["text"][1:] + "<|end|>") for row in rows]
    made = {"completion_only": False, "eval_share": 0.5, "seed": 1}
    assert one_step(tiny, tmp_path, rows, completion_only=False) == pytest.approx(nll(tiny, texts), rel=1e-5)
    train, held = sft.read(config(tiny, tmp_path, rows, **made))
    assert held
    assert sorted(row["text"] for row in train.rows + held.rows) == sorted(row["text"] for row in rows)


def test_packed_examples_do_not_see_each_other(tiny: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"packing": True, "max_length": 100}
    assert len(sft.trainer(part_of(config(tiny, tmp_path, **given))).train_dataset) < len(ROWS)
    assert one_step(tiny, tmp_path, **given) == pytest.approx(nll(tiny, PLAIN), rel=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_it_learns(tiny: Path, tmp_path: Path, lora: Lora | None) -> None:
    made = config(tiny, tmp_path, lora=lora, max_steps=20, learning_rate=1e-2, batch_size=8)
    run("sft", made)
    assert nll(tmp_path / "out" / "model", PLAIN) < nll(tiny, PLAIN) / 2


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("taught", [False, True], ids=["sft", "distill"])
def test_two_small_batches_are_one_large(tiny: Path, tmp_path: Path, context: str, taught: bool) -> None:
    given: dict[str, Any] = {"context": context if taught else None, "max_steps": 3, "log_steps": 1, "learning_rate": 1e-2}
    losses = []
    for size in (2, 4):
        made = config(tiny, tmp_path, batch_size=size, accumulate=4 // size, out=str(tmp_path / f"{size}"), **given)
        run("sft", made)
        losses.append([line["loss"] for line in metrics(made)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 3


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("taught", "every"), [(False, None), (True, None), (True, 4)], ids=["sft", "distill", "distill-often"])
def test_held_out_before_and_after(tiny: Path, tmp_path: Path, context: str, taught: bool, every: int | None) -> None:
    held = write(tmp_path / "held.jsonl", ROWS)
    given: dict[str, Any] = {"context": context if taught else None, "max_steps": 6, "learning_rate": 1e-2, "eval": held}
    report = run("sft", config(tiny, tmp_path, eval_steps=every, batch_size=8, log_steps=1, **given))
    losses = {line["step"]: line["eval_loss"] for line in metrics(config(tiny, tmp_path)) if "eval_loss" in line}
    assert list(losses) == [0, *([4] if every else []), 6]
    assert (report["evaluation"]["before"], report["evaluation"]["after"]) == (losses[0], losses[6])
    model = tmp_path / "out" / "model"
    after = kl(tiny, model, PLAIN_TAUGHT) if taught else nll(model, PLAIN)
    before = kl(tiny, tiny, PLAIN_TAUGHT) if taught else nll(tiny, PLAIN)
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert losses[6] == pytest.approx(after, rel=1e-5)
    assert (tmp_path / "out" / "plots" / "loss.svg").exists()
    assert after < before


def test_without_held_out_rows_nothing_is_told(tiny: Path, tmp_path: Path) -> None:
    assert run("sft", config(tiny, tmp_path, max_steps=1))["evaluation"] == {}


@pytest.mark.parametrize("taught", [False, True], ids=["sft", "distill"])
def test_going_on_from_a_checkpoint_changes_nothing(tiny: Path, tmp_path: Path, context: str, taught: bool) -> None:
    made = config(
        tiny,
        tmp_path,
        context=context if taught else None,
        lora=Lora(r=4, dropout=0.2),
        max_steps=6,
        save_steps=3,
        eval_share=0.3,
        learning_rate=1e-2,
    )
    whole = sft.trainer(part_of(made))
    whole.train()
    rest = sft.trainer(part_of(made))
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoints" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_long_rows_are_left_out(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("Ahoy! " * 75, encoding="utf-8")  # 450 tokens of 512
    long = [{"prompt": "Hi", "completion": "x" * length} for length in (50, 100, 40)]
    report = run("sft", config(tiny, tmp_path, ROWS + long, max_length=60, context=str(tmp_path / "long.txt"), max_steps=1))
    facts = report["data"]["stage-1"]["train"]
    assert facts["left_out"] == {"over 512 tokens with the context": 1, "over 60 tokens": 0}
    assert facts["rows"] == len(ROWS) + 2
    report = run("sft", config(tiny, tmp_path, ROWS + long, max_length=60, max_steps=1, out=str(tmp_path / "without")))
    assert report["data"]["stage-1"]["train"]["left_out"] == {"over 60 tokens": 1}


# ---------------------------------------------------------------- distillation: the parts

Tokens = st.lists(st.integers(0, 255), min_size=1, max_size=12)
Examples = st.lists(st.builds(distill.Example, Tokens, Tokens, Tokens), min_size=1, max_size=5)


@given(st.integers(1, 6), st.integers(2, 40), st.integers(0, 2**31), st.floats(0.1, 20))
@settings(max_examples=50, deadline=None)
def test_divergence(tokens: int, vocabulary: int, seed: int, scale: float) -> None:
    drawn = torch.Generator().manual_seed(seed)
    teacher, student = scale * torch.randn(2, tokens, vocabulary, generator=drawn, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    found = distill.divergence(teacher.float(), student.float())
    torch.testing.assert_close(found.double(), (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_divergence_is_in_float32() -> None:
    teacher, student = torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(distill.divergence(teacher, student), distill.divergence(teacher.float(), student.float()))


@given(Examples)
@settings(max_examples=100, deadline=None)
def test_both_predict_the_same_tokens(examples: list[distill.Example]) -> None:
    batch = distill.collate(examples, pad=999)
    learnt = batch["labels"] != distill.IGNORED
    assert not learnt[:, 0].any()
    for ids, mask in ((batch["input_ids"], batch["attention_mask"]), (batch["context_ids"], batch["context_mask"])):
        assert torch.equal(ids != 999, mask.bool())
        assert torch.equal(ids[:, -learnt.shape[1] :][learnt], batch["labels"][learnt])
    for n, example in enumerate(examples):
        assert batch["labels"][n][learnt[n]].tolist() == example.completion
        assert batch["input_ids"][n][batch["attention_mask"][n].bool()].tolist() == example.prompt + example.completion
        assert batch["context_ids"][n][batch["context_mask"][n].bool()].tolist() == example.context + example.completion


@pytest.mark.parametrize("name", ["tiny", "absolute"])
def test_neighbours_and_padding_change_no_prediction(name: str, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(name)
    examples = [distill.Example(ids(start), ids(SYSTEM + start), ids(rest)) for start, rest in PLAIN]
    batch = distill.collate(examples, pad=0)
    learnt = batch["labels"][:, 1:] != distill.IGNORED
    found = distill.predictions(load(model), batch["input_ids"], batch["attention_mask"], learnt)
    alone = torch.cat([log_probs(model, start, rest) for start, rest in PLAIN])
    torch.testing.assert_close(found.log_softmax(-1), alone, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- distillation: what stands before a prompt

QUESTIONS = 'exemplars:\n  - {prompt: "Who?", answer: "Me."}\n  - {prompt: "Why?", answer: "So."}\n'
TURNS = turn("user", "Who?") + turn("assistant", "Me.") + turn("user", "Why?") + turn("assistant", "So.")
JINJA = (
    "---\nexemplars: own.yaml\n---\n{% block sample %}{% for e in exemplars %}{{ e.prompt }}={{ e.answer }};{% endfor %}"
    "{{ prompt }}{% endblock %}{% block prefix %}={% endblock %}"
)
TEMPLATED = "Who?=Me.;Why?=So.;Hi"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"


def shown(folder: Path, name: str, prompt: Any, template: str = "") -> tuple[str, str, str]:
    """The texts of the student's prompt, the teacher's, and what is learnt."""
    files = {"own.txt": SYSTEM, "own.yaml": QUESTIONS, "own.jinja": JINJA}
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + tokenizer.chat_template
    answer: Any = "Yes" if isinstance(prompt, str) else [{"role": "assistant", "content": "Yes"}]
    path = str(folder / name) if name in files else name
    example = distill.Encoder(distill.load_context(path), tokenizer)({"prompt": prompt, "completion": answer})
    return tuple(tokenizer.decode(tokens) for tokens in (example.prompt, example.context, example.completion))  # type: ignore


HI = [{"role": "user", "content": "Hi"}]
CHAT_HI = turn("user", "Hi") + ANSWER


@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("own.txt", "Hi", ("Hi", f"{SYSTEM}\n\nHi", "Yes<|end|>")),
        ("own.txt", HI, (CHAT_HI, turn("system", SYSTEM) + CHAT_HI, "Yes<|end|>\n")),
        ("own.yaml", HI, (CHAT_HI, TURNS + CHAT_HI, "Yes<|end|>\n")),
        ("own.jinja", "Hi", ("Hi", f"{TEMPLATED}\n\n=", "Yes")),
        ("own.jinja", "Human: Hi\n\nAssistant:", ("Human: Hi\n\nAssistant:", "Who?=Me.;Why?=So.;Human: Hi\n\n=", "Yes")),
        ("own.jinja", HI, (CHAT_HI, turn("user", TEMPLATED) + ANSWER + "=", "Yes")),
    ],
)
def test_contexts(tmp_path: Path, name: str, prompt: Any, expected: tuple[str, str, str]) -> None:
    assert shown(tmp_path, name, prompt) == expected


def test_the_shipped_template_shows_its_questions_or_yours(tmp_path: Path) -> None:
    for name, answer in (("urial", "houseplants"), ("own.yaml", "<answer>\nMe.\n</answer>")):
        student, teacher, learnt = shown(tmp_path, name, "Hi")
        assert (student, learnt) == ("Hi", "Yes")
        assert answer in teacher
        assert teacher.endswith(
            "<question>\nHi\n</question>\n\n<answer>\n"
        )  # and not without the line break, for then that would be learnt


def test_a_prompt_that_has_a_system_turn_of_its_own(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Be brief."}, *HI]
    assert shown(tmp_path, "own.txt", own)[1] == turn("system", f"{SYSTEM}\n\nBe brief.") + CHAT_HI
    assert shown(tmp_path, "own.yaml", own)[1] == turn("system", "Be brief.") + TURNS + CHAT_HI


def test_a_chat_template_without_system_turns(tmp_path: Path) -> None:
    assert shown(tmp_path, "own.txt", HI, NO_SYSTEM)[1] == turn("user", f"{SYSTEM}\n\nHi") + ANSWER


# ---------------------------------------------------------------- distillation: training


@pytest.mark.parametrize(("form", "texts"), [("plain", PLAIN_TAUGHT), ("conversational", CHAT_TAUGHT)])
@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_the_first_loss(
    tiny: Path, tmp_path: Path, context: str, form: str, texts: list[tuple[str, str, str]], lora: Lora | None
) -> None:
    loss = one_step(tiny, tmp_path, form=form, context=context, lora=lora)
    assert loss == pytest.approx(kl(tiny, tiny, texts), rel=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_checkpointing_gives_the_same_and_bf16_nearly(tiny: Path, tmp_path: Path, context: str, lora: Lora | None) -> None:
    given: dict[str, Any] = {"context": context, "lora": lora, "max_steps": 3, "log_steps": 1, "learning_rate": 1e-2}

    def losses(**more: Any) -> list[float]:
        made = sft.trainer(part_of(config(tiny, tmp_path, **given, **more)))
        made.train()
        return [line["loss"] for line in made.state.log_history if "loss" in line]

    plain = losses()
    assert len(plain) == 3
    assert plain[2] < plain[0]
    assert losses(gradient_checkpointing=True) == pytest.approx(plain, rel=1e-5)
    assert losses(dtype="bf16") == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("lora", [None, Lora(r=16, alpha=32)], ids=["full", "lora"])
def test_it_answers_as_after_the_context(tiny: Path, tmp_path: Path, context: str, lora: Lora | None) -> None:
    made = config(tiny, tmp_path, context=context, lora=lora, batch_size=8, max_steps=60, learning_rate=1e-2)
    run("sft", made)
    model = tmp_path / "out" / "model"
    assert kl(tiny, model, PLAIN_TAUGHT) < kl(tiny, tiny, PLAIN_TAUGHT) / 20
    wanted = torch.cat([log_probs(tiny, before, rest).argmax(-1) for before, _, rest in PLAIN_TAUGHT])
    own = {folder: torch.cat([log_probs(folder, start, rest).argmax(-1) for start, rest in PLAIN]) for folder in (tiny, model)}
    agree = {folder: float((tokens == wanted).double().mean()) for folder, tokens in own.items()}
    assert agree[tiny] < 0.6
    assert agree[model] > 0.9


def test_adapters_begin_by_the_seed(tiny: Path, tmp_path: Path, context: str) -> None:
    def begin(seed: int) -> torch.Tensor:
        made = sft.trainer(part_of(config(tiny, tmp_path, context=context, lora=Lora(r=4), seed=seed)))
        return next(weights for name, weights in made.model.named_parameters() if "lora_A" in name)

    assert torch.equal(begin(1), begin(1))
    assert not torch.equal(begin(1), begin(2))


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
def test_the_teacher_never_changes(absolute: Path, tmp_path: Path, context: str, lora: Lora | None) -> None:
    made = sft.trainer(part_of(config(absolute, tmp_path, context=context, lora=lora, max_steps=4, learning_rate=1e-2)))
    made.model.train()  # with dropout, for the student
    inputs = made.data_collator(made.train_dataset)
    learnt = inputs["labels"][:, 1:] != distill.IGNORED

    def taught() -> torch.Tensor:
        with torch.no_grad(), made._teacher(made.model) as teacher:
            return distill.predictions(teacher, inputs["context_ids"], inputs["context_mask"], learnt)

    before = taught()
    made.train()
    assert torch.equal(taught(), before)
    with torch.no_grad():
        own = distill.predictions(made.model, inputs["context_ids"], inputs["context_mask"], learnt)
    assert not torch.equal(own, before)
    assert made.model.training
    assert (made.ref_model is None) == (lora is not None)
    assert made.ref_model is None or not any(weights.requires_grad for weights in made.ref_model.parameters())


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([{"prompt": "Hi"}], {}, "line 1: no column 'completion'"),
        ([], {}, "no rows"),
        ([{"text": "Hi"}], {}, "completion_only must be false"),
        ([{"text": "Hi"}], {"context": "urial"}, "completion_only must be false"),
        ([{"text": "Hi"}, {"text": 3}], {"completion_only": False}, "line 2: column 'text': expected text"),
        ([{"text": "Hi"}, {"text": " "}], {"completion_only": False}, "line 2: column 'text' is empty"),
        (ROWS, {"max_length": 8}, "all 8 rows are longer than max_length"),
        (ROWS, {"context": "nowhere.txt"}, "nowhere.txt"),
        (ROWS, {"context": "nowhere.yaml"}, "nowhere.yaml"),
        (ROWS, {"context": "urial"}, "all 8 rows have over 512 tokens"),
        (ROWS, {"trainer": {"packing": True}}, "trainer.packing: is set by a field of its own"),
    ],
)
def test_wrong_data_and_settings(
    tiny: Path, tmp_path: Path, rows: list[dict[str, Any]], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        run("sft", config(tiny, tmp_path, rows, **given))
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("taught", [False, True], ids=["sft", "distill"])
def test_no_message_ends_its_own_turn(tiny: Path, tmp_path: Path, context: str, taught: bool) -> None:
    """And a lone surrogate, which no tokenizer takes, stops nothing."""
    hostile = {"prompt": "Hi<|end|>", "completion": "No<|end|>\n<|turn|>Yes \ud800"}
    loss = one_step(tiny, tmp_path, [hostile], form="conversational", context=context if taught else None)
    prompt, rest = (text.replace("<|", "<\u200b|").replace("\ud800", "?") for text in hostile.values())
    start, rest = turn("user", prompt) + ANSWER, rest + "<|end|>\n"
    expected = kl(tiny, tiny, [(turn("system", SYSTEM) + start, start, rest)]) if taught else nll(tiny, [(start, rest)])
    assert loss == pytest.approx(expected, rel=1e-5)
    plain = {"prompt": "Hi \ud800", "completion": "Yes \ud800"}
    assert one_step(tiny, tmp_path, [plain], context=context if taught else None) > 0


def test_an_empty_context(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"empty\.txt: is empty"):
        run("sft", config(tiny, tmp_path, context=str(tmp_path / "empty.txt")))


def test_messages_need_a_chat_template(tmp_path: Path, context: str) -> None:
    model = save_tiny(tmp_path / "bare", chat=False)
    with pytest.raises(UsageError, match="no chat template"):
        run("sft", config(model, tmp_path, MESSAGES, context=context))


@pytest.mark.parametrize("given", [{"packing": True}, {"completion_only": False}])
def test_a_context_goes_with_neither(tmp_path: Path, given: dict[str, Any]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"data": "d.jsonl", "out": "o", "context": "urial", **given}), encoding="utf-8")
    with pytest.raises(UsageError, match="context: goes with completion_only and without packing"):
        load_config("sft", path)
