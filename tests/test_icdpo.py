"""In-context DPO's scores, against a plain loop over a tiny model: exact, whatever shares the batch, and resumable."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif.cli import app
from rlaif.data import responses
from rlaif.icdpo import InContextDpo, request
from rlaif.job import Job
from rlaif.records import Completion, Request, RlaifError, RowError, UsageError
from rlaif.runner import Limits
from rlaif.sample import load_icl
from tests.conftest import in_process, read_jsonl, write_jsonl

torch = pytest.importorskip("torch")

from rlaif.engines.likelihood import LikelihoodEngine  # noqa: E402
from tests.engines.tiny import CONTEXT, save_tiny  # noqa: E402

TEMPLATE = """---
exemplars: {exemplars}
---
{{% block sample %}}
{{% for e in exemplars %}}
Q: {{{{ e.prompt }}}}
A: {{{{ e.answer }}}}
{{% endfor %}}
Q: {{{{ prompt }}}}
{{% endblock %}}
{{% block ending %}}{{% endblock %}}
{{% block prefix %}}A:{{% endblock %}}
"""
DEMOS = {"good": [("Hi?", "Hello, dear."), ("Sky?", "Blue.")], "bad": [("Hi?", "Go away."), ("Sky?", "Dunno.")]}
ROWS = [
    {"id": "q", "prompt": "Why?", "responses": ["Because.", "I do not know at all, to be honest.", "No"]},
    {"id": "r", "prompt": "What is the colour of grass in the rain?", "responses": ["Green", "é ü — 天"]},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("icdpo") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, demos in DEMOS.items():
        (tmp_path / f"{name}.jinja").write_text(TEMPLATE.format(exemplars=f"{name}.yaml"))
        told = [{"prompt": prompt, "answer": answer} for prompt, answer in demos]
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"exemplars": told}))
    write_jsonl(tmp_path / "s.jsonl", ROWS)
    return tmp_path


def plain(model: Path, demos: list[tuple[str, str]], prompt: str, response: str) -> float:
    """The log-probability of the response's tokens, one at a time, each after all that stands before it; nothing is shared."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    shown = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in demos)
    text = f"<|turn|>user: {shown}Q: {prompt}<|end|>\n<|turn|>assistant: A:"
    ids, total = tokenizer.encode(text, add_special_tokens=False), 0.0
    for token in tokenizer.encode(response, add_special_tokens=False):
        with torch.inference_mode():
            logits = lm(torch.tensor([ids])).logits[0, -1].double()
        total += (logits - logits.exp().sum().log())[token].item()
        ids.append(token)
    return total


def scored(folder: Path, model: Path, *args: str | Path) -> str:
    out = folder / "o.jsonl"
    command = ["icdpo", folder / "s.jsonl", "-o", out, "--model", model, "--dtype", "fp32", "--device", "cpu", *args]
    return in_process(*command)


def test_scores_are_the_difference_of_a_plain_loops_log_probabilities(folder: Path, tiny: Path) -> None:
    scored(folder, tiny, "--icl", folder / "good.jinja")
    rows = read_jsonl(folder / "o.jsonl")
    assert [row["id"] for row in rows] == ["q/0", "q/1", "q/2", "r/0", "r/1"]
    for row in rows:
        first, second = (plain(tiny, demos, row["prompt"], row["response"]) for demos in (DEMOS["good"], []))
        assert row["status"] == "ok"
        assert row["scores"] == pytest.approx({"with": first, "without": second}, rel=1e-5)
        assert row["score"] == pytest.approx(first - second, abs=1e-3)
        assert abs(row["score"]) > 0.01  # the demonstrations do change something
    settings = json.loads((folder / "o.jsonl.run.json").read_text())["settings"]
    assert (settings["method"], settings["against"], settings["engine"]["engine"]) == ("icdpo", None, "likelihood")


def test_another_context_takes_the_place_of_none(folder: Path, tiny: Path) -> None:
    scored(folder, tiny, "--icl", folder / "good.jinja", "--against", folder / "bad.jinja")
    for row in read_jsonl(folder / "o.jsonl"):
        good, bad = (plain(tiny, DEMOS[name], row["prompt"], row["response"]) for name in ("good", "bad"))
        assert row["scores"] == pytest.approx({"with": good, "against": bad}, rel=1e-5)
        assert row["score"] == pytest.approx(good - bad, abs=1e-3)


def logprobs(engine: LikelihoodEngine, requests: list[Request]) -> list[Any]:
    async def all_of() -> list[Any]:
        return await asyncio.gather(*map(engine.complete, requests), return_exceptions=True)

    return [found.logprob if isinstance(found, Completion) else found for found in asyncio.run(all_of())]


def asked(context: str, response: str) -> Request:
    return Request(({"role": "user", "content": context}, {"role": "assistant", "content": response}), logprob=True)


def test_what_shares_the_batch_changes_nothing(tiny: Path) -> None:
    engine = LikelihoodEngine(str(tiny), "fp32", "cpu")
    requests = [asked("x" * (3 + 17 * n % 90), "yes " * (1 + n % 7)) for n in range(40)]
    together = logprobs(engine, requests)
    engine._max_rows = 3
    fewer = logprobs(engine, requests)
    engine._max_rows = 1
    assert logprobs(engine, requests) == pytest.approx(together, rel=1e-5)
    assert fewer == pytest.approx(together, rel=1e-5)
    assert len({round(found, 3) for found in together}) == 40


def test_a_batch_holds_no_more_tokens_than_fit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, answer, sizes = LikelihoodEngine(str(tiny), "fp32", "cpu"), LikelihoodEngine._answer, list[tuple[int, int]]()

    def counted(self: LikelihoodEngine, batch: list[Any]) -> list[Completion]:
        sizes.append((len(batch), max(job.size for job in batch)))
        return answer(self, batch)

    monkeypatch.setattr(LikelihoodEngine, "_answer", counted)
    logprobs(engine, [asked("x" * 200, f"{n}") for n in range(10)] + [asked("x", f"{n}") for n in range(10)])
    assert all(rows * width <= 1024 for rows, width in sizes)
    assert len(sizes) < 10  # and yet they share


def test_an_empty_or_too_long_one_fails_alone(tiny: Path) -> None:
    engine = LikelihoodEngine(str(tiny), "fp32", "cpu")
    (alone,) = logprobs(engine, [asked("Hi", "Yes.")])
    context = len(engine._chat.render(Request(({"role": "user", "content": "Hi"},))))
    texts = ["", "Yes.", "y" * (CONTEXT - context), "y" * (CONTEXT - context + 1)]
    found = logprobs(engine, [*(asked("Hi", text) for text in texts), asked("z" * CONTEXT, "Yes.")])
    assert [type(one) for one in found] == [RowError, float, float, RowError, RowError]
    assert found[1] == pytest.approx(alone, rel=1e-5)
    assert "the response is empty" in str(found[0])
    assert f"the prompt is {context} tokens, the context of {tiny} holds {CONTEXT}" in str(found[3])


def test_failed_rows_have_a_status_and_no_score(folder: Path, tiny: Path) -> None:
    rows = [ROWS[0], {"id": "f", "prompt": "Why?", "responses": [" ", "y" * CONTEXT]}]
    write_jsonl(folder / "s.jsonl", rows)
    with pytest.raises(UsageError, match="column 'response' is empty"):
        scored(folder, tiny, "--icl", folder / "good.jinja")
    with pytest.raises(RlaifError, match="2 rows met an error"):
        scored(folder, tiny, "--icl", folder / "good.jinja", "--bad-rows", "keep")
    made = read_jsonl(folder / "o.jsonl")
    assert [row["status"] for row in made] == ["ok", "ok", "ok", "error", "error"]
    assert all((row["score"] is None) == (row["status"] == "error") for row in made)
    assert "tokens" in made[4]["error"]


def test_the_same_command_goes_on_and_the_best_are_chosen(folder: Path, tiny: Path) -> None:
    class Stops(LikelihoodEngine):
        left = 4

        async def complete(self, request: Request) -> Completion:
            Stops.left -= 1
            if Stops.left < 0:
                raise RowError("not now")
            return await super().complete(request)

    method = InContextDpo(load_icl(str(folder / "good.jinja")))
    source, out = str(folder / "s.jsonl"), folder / "o.jsonl"
    job = Job(source, out, lambda: responses(source), method)
    first = job.run(Stops(str(tiny), "fp32", "cpu"), Limits(concurrency=1), job.check())
    assert first["statuses"]["error"] == 3
    scored(folder, tiny, "--icl", folder / "good.jinja")
    run = json.loads((folder / "o.jsonl.run.json").read_text())
    assert (run["this_run"]["calls"], run["all_runs"]["calls"]) == (6, 10)
    rows = read_jsonl(out)
    best = [max((row for row in rows if row["id"][0] == name), key=lambda row: row["score"]) for name in "qr"]
    done = CliRunner().invoke(app, ["build", "best-of-n", str(out), "-o", str(folder / "t.jsonl")])
    assert done.exit_code == 0, done.output
    assert [row["completion"] for row in read_jsonl(folder / "t.jsonl")] == [row["response"] for row in best]


def test_without_demonstrations_the_same_template_is_rendered_with_none() -> None:
    icl = load_icl("urial")
    (item,) = responses_of({"prompt": "Why?", "response": "So."})
    shown, bare = request(icl, item), request(icl, item, shown=False)
    first, second = (one.messages[0]["content"] for one in (shown, bare))
    assert (first.count("<question>"), second.count("<question>")) == (1 + len(icl.answers.exemplars), 1)
    assert first.partition("<question>")[0] == second.partition("<question>")[0]
    assert first.endswith("<question>\nWhy?\n</question>")
    assert second.endswith("<question>\nWhy?\n</question>")
    assert shown.prefix == bare.prefix == "<answer>"
    assert shown.messages[1] == bare.messages[1] == {"role": "assistant", "content": "So."}


def responses_of(row: dict[str, Any]) -> list[Any]:
    from rlaif.data import Item

    return [Item({"id": "0", **row}, row["prompt"], "here", None)]
