"""GPO: groups with known preferences are predicted from a few examples; runs go on after a kill; the whole way by commands."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from rlaif.build.groups import groups, read_grouped
from rlaif.build.rows import Build
from rlaif.cli import app
from rlaif.constitution import load_constitution
from rlaif.gpo import Embedder, GroupModule, few_shots, read_folder
from rlaif.records import Row, UsageError
from rlaif.train import gpo
from rlaif.train.config import Gpo
from rlaif.train.curves import FAMILIES, curves
from rlaif.train.data import Rows
from rlaif.train.gpo import Learner, Points, figures, measure
from rlaif.train.run import Part, run
from tests.conftest import read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny
from tests.train.children import KILLED, Death, train

DIM, ITEMS, OWN = 4, 240, 40


def config(**changes: Any) -> Gpo:
    small = {"layers": 2, "width": 32, "batch_size": 32, "learning_rate": 3e-3, "eval_draws": 2, "device": "cpu"}
    return Gpo.model_validate({"name": "gpo", "data": "groups.jsonl", "out": "out", **small, **changes})


def module(dim: int = DIM, seed: int = 0) -> GroupModule:
    torch.manual_seed(seed)
    return GroupModule(dim, 32, 2, 4).eval()


def ok(*args: str | Path) -> str:
    done = CliRunner().invoke(app, [*map(str, args)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


# ------------------------------------------------------------ planted groups


def planted(first: int, count: int) -> Points:
    """Groups that have an opinion of each direction of the vectors: score = tanh(w · x), with w of their own."""
    x = torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(0))
    items, scores = [], []
    for group in range(first, first + count):
        draw = torch.Generator().manual_seed(group + 1)
        items.append(torch.randperm(ITEMS, generator=draw)[:OWN])
        scores.append(torch.tanh(x[items[-1]] @ torch.randn(DIM, generator=draw)))
    return Points(x, torch.arange(ITEMS) // 12, [f"group {n}" for n in range(first, first + count)], items, scores)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Learner, Points, Points]:
    place, many, new = tmp_path_factory.mktemp("gpo"), planted(0, 100), planted(100, 8)
    part = Part("train", config(max_steps=250), "", place, 0, None, Rows("", []), None)
    learner = Learner(part, many, new)
    for _ in range(250):
        learner.learn()
    return learner, many, new


def test_examples_of_an_unseen_group_tell_its_scores(learned: tuple[Learner, Points, Points]) -> None:
    learner, many, new = learned
    found = measure(learner.model, many, new, learner.config)
    told = found["predictions"]
    assert told["with examples"]["correlation"] > 0.75
    assert told["with examples"]["accuracy"] > 0.75
    for baseline in ("without examples", "other groups", "examples' mean"):
        assert told["with examples"]["mse"] < 0.5 * told[baseline]["mse"]
        assert abs(told[baseline]["accuracy"] - 0.5) < 0.1
    assert found["held_out_groups"] == len(found["groups"]) == 8
    assert found["pairs"] == "responses to one prompt"
    assert all(own["with examples"]["mse"] < own["other groups"]["mse"] for own in found["groups"])


def test_more_examples_tell_more(learned: tuple[Learner, Points, Points]) -> None:
    learner, many, new = learned
    errors = [
        measure(learner.model, many, new, learner.config.changed(shots=shots))["predictions"]["with examples"]["mse"]
        for shots in (1, 4, 16)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_other_groups_scores_are_those_of_the_item_or_of_its_nearest() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.0, 3.0]])
    two = [torch.tensor([0, 1]), torch.tensor([0, 1])]
    known = Points(x, torch.tensor([0, 0, 1, 1]), ["a", "b"], two, [torch.tensor([1.0, 0.0]), torch.tensor([0.5, -1.0])])
    asked = Points(x, known.prompts, ["c"], [torch.tensor([0, 2, 3])], [torch.tensor([0.0, 0.0, 1.0])])
    found = gpo._by_others(GroupModule(2, 4, 1, 1), known, asked)
    assert found[[0, 2, 3]].tolist() == pytest.approx([0.75, 0.75, -0.5])


def test_figures() -> None:
    predicted, scores = torch.tensor([0.1, 0.4, 0.2, 0.9]), torch.tensor([0.0, 1.0, 2.0, 2.0])
    found = figures(predicted, scores, torch.tensor([0, 0, 1, 1]))
    assert found["mse"] == pytest.approx(np.mean((predicted.numpy() - scores.numpy()) ** 2))
    assert found["correlation"] == pytest.approx(np.corrcoef(predicted, scores)[0, 1])
    assert found["accuracy"] == 1.0  # of the one pair: the other has equal scores
    assert figures(predicted, scores, torch.zeros(4))["accuracy"] == pytest.approx(4 / 5)
    assert figures(torch.full((4,), 0.3), scores, torch.zeros(4)) == {
        "mse": pytest.approx(float((0.3 - scores).square().mean())),
        "correlation": None,
        "accuracy": 0.5,
    }


# ------------------------------------------------------------ what attends to what


def task(shown: int = 5, asked: int = 7) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(3)
    sizes = ((1, shown, DIM), (1, shown), (1, asked, DIM))
    return tuple(torch.randn(size, generator=draw) for size in sizes)


@pytest.mark.parametrize("shown", [0, 5])
def test_what_is_asked_for_does_not_see_its_like(shown: int) -> None:
    own, (context_x, context_y, x) = module(), task(shown)
    before = own(context_x, context_y, x)[0]
    changed = x.clone()
    changed[0, 2] += 5
    after = own(context_x, context_y, changed)[0]
    moved = (after - before).abs()[0] > 1e-5
    assert moved.tolist() == [n == 2 for n in range(7)]
    alone = [own(context_x, context_y, x[:, n : n + 1])[0][0, 0] for n in range(7)]
    assert torch.allclose(torch.stack(alone), before[0], atol=1e-5)


def test_the_order_of_examples_does_not_matter_and_each_of_them_does() -> None:
    own, (context_x, context_y, x) = module(), task()
    before = own(context_x, context_y, x)
    order = torch.tensor([3, 1, 4, 0, 2])
    for one, other in zip(before, own(context_x[:, order], context_y[:, order], x), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    for n in range(5):
        changed = context_y.clone()
        changed[0, n] += 2
        assert not torch.allclose(own(context_x, changed, x)[0], before[0], atol=1e-3)


def test_what_only_fills_up_the_context_is_not_seen() -> None:
    own, (context_x, context_y, x) = module(), task()
    counts = torch.tensor([[True, True, True, False, False]])
    short = own(context_x[:, :3], context_y[:, :3], x)
    for one, other in zip(short, own(context_x, context_y, x, counts), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_predictions_are_on_the_scale_of_the_scores() -> None:
    own, (context_x, context_y, x) = module(), task()
    before = own(context_x, context_y, x)
    own.scale(torch.randn(50, DIM), torch.randn(50))
    own.x_mean.zero_(), own.x_std.fill_(1.0), own.y_mean.fill_(10.0), own.y_std.fill_(3.0)
    mean, spread = own(context_x, 10 + 3 * context_y, x)
    assert torch.allclose(mean, 10 + 3 * before[0], atol=1e-4)
    assert torch.allclose(spread, 3 * before[1], atol=1e-4)


def test_a_step_draws_other_points_to_predict_than_it_shows(tmp_path: Path) -> None:
    points = planted(0, 3)
    learner = Learner(Part("train", config(shots=4, targets=3), "", tmp_path, 0, None, Rows("", []), None), points, None)
    seen = set()
    for step in range(20):
        learner.step = step
        context_x, context_y, counts, x, y, asked = learner._drawn()
        assert context_x.shape[:2] == context_y.shape == counts.shape
        assert x.shape[:2] == y.shape == asked.shape == (32, 3)
        for n in range(32):
            seen.add(int(counts[n].sum()))
            shown = {tuple(one.tolist()) for one in context_x[n][counts[n]]}
            wanted = {tuple(one.tolist()) for one in x[n][asked[n]]}
            assert len(shown) == counts[n].sum()
            assert not shown & wanted
    assert seen == {0, 1, 2, 3, 4}


# ------------------------------------------------------------ vectors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gpo") / "tiny")


def test_a_vector_is_the_mean_over_the_responses_tokens(tiny: Path) -> None:
    embedder = Embedder(str(tiny), device="cpu")
    texts = [embedder.text("A question? ", "Yes."), embedder.text("B? ", "A longer answer than that.")]
    model, tokenizer = AutoModel.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    for text, prompt, response, vector in zip(
        texts, ("A question? ", "B? "), ("Yes.", "A longer answer than that."), embedder.all(texts), strict=True
    ):
        ids = tokenizer(f"{prompt}{response}<|end|>", return_tensors="pt")
        assert text.ids == ids["input_ids"][0].tolist()
        with torch.no_grad():
            states = model(**ids).last_hidden_state[0, len(prompt) :]  # a token a byte
        assert torch.allclose(vector, states.mean(0), atol=1e-4)
    turns = embedder.text([{"role": "user", "content": "Q?"}], [{"role": "assistant", "content": "Yes."}])
    assert tokenizer.decode(turns.ids[turns.start :]) == "Yes.<|end|>\n"


# ------------------------------------------------------------ rlaif build groups


def vote(principle: str | None, score: float | None, status: str = "ok") -> Row:
    return {"principle": principle, "attribute": "constitution", "score": score, "status": status}


def scored(name: str, *votes: Row, status: str = "ok", **changes: Any) -> Row:
    row = {
        "id": name,
        "prompt": "Q?",
        "response": f"Answer {name}.",
        "status": status,
        "score": 0.5 if status == "ok" else None,
    }
    return {**row, "votes": list(votes), **changes}


def test_failed_votes_and_rows_never_become_a_score() -> None:
    rows = [
        scored("0", vote("kind", 0.25), vote("kind", 0.75), vote("true", None, "unparsed")),
        scored("1", vote("kind", -1.0), vote("kind", 0.9, "error"), vote("true", 1.0)),
        scored("2", vote("kind", 0.5), status="error"),
        scored("3", status="refused"),
        scored("1 again", vote("kind", 0.0), response="Answer 1."),
    ]
    build = Build()
    found = list(groups(rows, build))
    assert [(row["id"], row["group"], row["response"], row["score"]) for row in found] == [
        ("0", "kind", "Answer 0.", 0.5),
        ("1", "kind", "Answer 1.", -0.5),  # the mean of both rows
        ("1", "true", "Answer 1.", 1.0),
    ]
    assert list(found[0]) == ["id", "group", "prompt", "response", "score"]
    assert build.dropped == {"votes that failed": 2, "error": 1, "refused": 1}


def test_groups_of_a_column(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "Q?", "response": "A.", "country": "FR", "score": 0.5},
        {"prompt": "Q?", "response": "A.", "country": "FR", "score": 1},
        {"prompt": "Q?", "response": "A.", "country": 7, "score": -1},
        {"prompt": "Q?", "response": "B.", "country": "FR", "score": None},
        {"prompt": "Q?", "response": "B.", "country": None, "score": 1},
        {"prompt": "Q?", "response": "B.", "country": "FR", "score": 1, "status": "error"},
    ]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    said = ok("build", "groups", source, "-o", out, "--group", "country")
    assert [(row["group"], row["score"]) for row in read_jsonl(out)] == [("FR", 0.75), ("7", -1.0)]
    assert "left out: 1 without score, 1 without country, 1 error" in said


@pytest.mark.parametrize(
    ("row", "column", "problem"),
    [
        (scored("0", vote(None, 0.5)), None, r"row '0': column 'votes': a vote names no principle; `rlaif score --attribute"),
        (scored("0", vote("kind", None)), None, "row '0': column 'votes': expected a number, got None"),
        (scored("0", vote("kind", 1.0), nation=1.5), "nation", "column 'nation': expected a group's name, got 1.5"),
        (scored("0", vote("kind", 1.0)), "nation", r"line 1: no column 'nation'"),
        ({"id": "0", "prompt": "Q?", "response": "A.", "status": "ok"}, None, "line 1: no column 'votes'"),
    ],
)
def test_what_is_no_groups_score_is_refused(row: Row, column: str | None, problem: str, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    with pytest.raises(UsageError, match=problem):
        list(groups(read_grouped(str(source), column), Build(), column))


# ------------------------------------------------------------ runs


def group_rows(count: int = 5, items: int = 8) -> list[Row]:
    return [
        {
            "group": f"g{n}",
            "prompt": f"Question {k // 2}?",
            "response": f"Answer {k * 7 % 11} to it.",
            "score": math.sin(k * (n + 1)),
        }
        for n in range(count)
        for k in range(items)
    ]


Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tiny: Path, tmp_path: Path) -> Settings:
    def made(out: str, rows: list[Row] | None = None, **changes: Any) -> dict[str, Any]:
        data = write_jsonl(tmp_path / f"{out}.jsonl", group_rows() if rows is None else rows)
        small = {"layers": 1, "width": 16, "heads": 2, "batch_size": 4, "max_steps": 12, "shots": 3, "targets": 4}
        often = {"log_steps": 2, "save_steps": 5, "eval_steps": 3, "eval_draws": 2, "eval_share": 0.3}
        told = {"model": str(tiny), "data": str(data), "out": str(tmp_path / out), "device": "cpu", "max_length": 128}
        return {**small, **often, **told, **changes}

    return made


def test_killed_and_resumed_it_is_the_same_run(settings: Settings) -> None:
    alone, killed = settings("alone"), settings("killed")
    killed["data"] = alone["data"]
    code, said = train("gpo", alone)
    assert code == 0, said
    deaths = [
        Death("rlaif.train.gpo.embed"),
        Death("rlaif.train.gpo.Learner.learn", 9),
        Death("rlaif.train.gpo.seal"),
        Death("rlaif.train.gpo.Learner.save_model", after=True),
        Death("rlaif.train.gpo.finish"),
    ]
    vectors = Path(killed["out"], "parts", "train", gpo.VECTORS)
    for number, death in enumerate(deaths):
        code, said = train("gpo", killed, resume=number > 0, death=death)
        assert code == KILLED, said
        if number == 1:
            first = vectors.stat()
    assert (vectors.stat().st_ino, vectors.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)  # computed once
    code, said = train("gpo", killed, resume=True)
    assert code == 0, said
    one, other = (Path(run["out"]) for run in (alone, killed))
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    logged = read_jsonl(one / "metrics.jsonl")
    assert logged == read_jsonl(other / "metrics.jsonl")
    reports = [json.loads((folder / "run.json").read_text()) for folder in (one, other)]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 6, 8, 9, 10, 12]
    drawn = [name for family in ("squared-error", "correlation") for name, *_ in curves(logged, FAMILIES[family])]
    assert drawn == ["mse", "eval_mse", "eval_correlation"]


@pytest.mark.parametrize(
    ("rows", "changes", "problem"),
    [
        ([{**row, "group": "one"} for row in group_rows(1)], {"eval_share": 0}, "column 'group': at least two groups"),
        (group_rows(2), {"eval_share": 0.5}, "at least two groups to learn from are needed, beside those held out"),
        ([*group_rows(), group_rows()[0]], {}, "the group 'g0' has one response to a prompt twice"),
        ([{**row, "score": "high"} for row in group_rows()], {}, "line 1: column 'score': expected a number, got 'high'"),
        ([{**row, "score": None} for row in group_rows()], {}, "line 1: column 'score': expected a number, got None"),
        ([{**row, "group": " "} for row in group_rows()], {}, "line 1: column 'group': expected a group's name"),
        ([{k: v for k, v in row.items() if k != "group"} for row in group_rows()], {}, "line 1: no column 'group'"),
        ([{**row, "response": " "} for row in group_rows()], {}, "line 1: column 'response' is empty"),
        (group_rows(3, 1), {}, "column 'group': every group has a single row"),
        ([{**row, "score": 0.5} for row in group_rows()], {}, "column 'score': every row has the same"),
    ],
)
def test_bad_rows_are_named(rows: list[Row], changes: dict[str, Any], problem: str, settings: Settings) -> None:
    with pytest.raises(UsageError, match=problem):
        run("gpo", Gpo.model_validate({"name": "x", **settings("bad", rows, **changes)}))


def test_held_out_groups_must_be_others(settings: Settings, tmp_path: Path) -> None:
    same = write_jsonl(tmp_path / "eval.jsonl", group_rows(1))
    with pytest.raises(UsageError, match=r"eval\.jsonl: the group 'g0' is in .* too"):
        gpo.read(Gpo.model_validate({"name": "x", **settings("bad", eval=str(same), eval_share=0)}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"lora": {"r": 2}}, "lora"), ({"accumulate": 2}, "accumulate"), ({"heads": 3}, "heads: must divide width")],
)
def test_settings_that_have_no_part_in_it_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        config(**changes)


# ------------------------------------------------------------ the whole way, by the command line


@pytest.fixture(scope="module")
def way(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From `rlaif score` to a module: three responses to each of six prompts, scored by ten principles."""
    place = tmp_path_factory.mktemp("way")
    names = [principle.name for principle in load_constitution("helpfulness").principles]
    samples = [
        {
            "id": f"{p}/{k}",
            "prompt": f"Question {p}?",
            "response": f"Answer {p * k % 5}, {'so ' * k}it is.",
            "quality": {name: math.sin((n + 1) * (3 * p + k)) for n, name in enumerate(names)},
        }
        for p in range(6)
        for k in range(3)
    ]
    write_jsonl(place / "samples.jsonl", samples)
    principles = ("--attribute", "constitution", "--constitution", "helpfulness", "--principles", "all")
    ok("score", place / "samples.jsonl", "-o", place / "scored.jsonl", "--engine", "mock", *principles)
    ok("build", "groups", place / "scored.jsonl", "-o", place / "groups.jsonl")
    small = ("max_steps=3", "layers=1", "width=16", "heads=2", "shots=4", "device=cpu", "max_length=128", f"model={tiny}")
    sets = [part for one in (f"data={place / 'groups.jsonl'}", f"out={place / 'run'}", *small) for part in ("--set", one)]
    said = ok("train", "gpo", "gpo", *sets)
    assert "held-out groups, with examples: mse" in said
    return place


def test_from_scores_to_each_groups_best(way: Path) -> None:
    rows = read_jsonl(way / "groups.jsonl")
    assert len(rows) == 18 * 10
    report = json.loads((way / "run" / "run.json").read_text())
    assert report["evaluation"]["held_out_groups"] == 2
    assert report["labeler"][0]["settings"]["method"] == "rating"
    card = (way / "run" / "model" / "README.md").read_text()
    assert "predicts a group's scores of responses" in card
    assert "rlaif reward groups" in card
    command = ("reward", "groups", way / "samples.jsonl", "--model", way / "run" / "model", "--context", way / "groups.jsonl")
    found = {}
    for group in ("correctness", "completeness"):
        out = way / f"{group}.jsonl"
        ok(*command, "--group", group, "-o", out)
        found[group] = read_jsonl(out)
        assert [row["id"] for row in found[group]] == [f"{p}/{k}" for p in range(6) for k in range(3)]
        assert {row["status"] for row in found[group]} == {"ok"}
        ok("build", "best-of-n", out, "-o", way / f"best-{group}.jsonl")
        assert len(read_jsonl(way / f"best-{group}.jsonl")) == 6
    assert [row["score"] for row in found["correctness"]] != [row["score"] for row in found["completeness"]]
    folder, shots = read_folder(way / "run" / "model"), [row for row in rows if row["group"] == "correctness"]
    embedder = Embedder(folder.embedder, device="cpu")

    def vectors(some: list[Row]) -> torch.Tensor:
        return embedder.all([embedder.text(row["prompt"], row["response"]) for row in some])

    scores = torch.tensor([row["score"] for row in shots])
    wanted = folder.module().predict(vectors(shots), scores, vectors(found["correctness"]))
    assert [row["score"] for row in found["correctness"]] == pytest.approx(wanted.tolist(), abs=1e-4)
    with pytest.raises(UsageError, match=r"was made with other settings \(engine\.examples"):
        ok(
            *command[:-1],
            write_jsonl(way / "fewer.jsonl", shots[:4]),
            "--group",
            "correctness",
            "-o",
            way / "correctness.jsonl",
        )


def test_what_cannot_score_is_named(way: Path, tmp_path: Path) -> None:
    model = way / "run" / "model"

    def scoring(folder: Path, context: Path, *more: str | Path) -> None:
        given = ("--group", "nobody", "-o", tmp_path / "out.jsonl", *more)
        ok("reward", "groups", way / "samples.jsonl", "--model", folder, "--context", context, *given)

    with pytest.raises(UsageError, match=r"groups\.jsonl: no row of the group 'nobody'; there are: .*correctness"):
        scoring(model, way / "groups.jsonl")
    with pytest.raises(UsageError, match=r"no gpo\.json in it.*did you mean .*model\?"):
        scoring(way / "run", way / "groups.jsonl")
    some = [{"prompt": "Q?", "response": f"A{n}.", "score": n} for n in range(3)]
    plain = write_jsonl(tmp_path / "few.jsonl", some)
    assert len(few_shots(str(plain), "nobody", read_folder(model)).rows) == 3
    with pytest.raises(UsageError, match="not the model whose vectors run was trained on"):
        scoring(model, plain, "--embedder", save_tiny(tmp_path / "other", seed=1))
    with pytest.raises(UsageError, match=r"long\.jsonl: prompt and response are .* tokens, run was trained on 128"):
        scoring(model, write_jsonl(tmp_path / "long.jsonl", [{**some[0], "response": "long " * 50}]))
    with pytest.raises(UsageError, match="line 1: column 'score': expected a number, got None"):
        scoring(model, write_jsonl(tmp_path / "none.jsonl", [{**some[0], "score": None}]))
    damaged = shutil.copytree(model, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UsageError, match="the weights are not those that were trained here"):
        scoring(damaged, plain)
    scoring(model, plain)
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 18


def test_a_row_that_is_too_long_has_no_score(way: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "Q?", "response": text} for text in ("Short.", "long " * 50)])
    model, out = way / "run" / "model", tmp_path / "out.jsonl"
    few = ("--context", way / "groups.jsonl", "--group", "correctness")
    done = CliRunner().invoke(app, [*map(str, ("reward", "groups", data, "--model", model, *few, "-o", out))])
    assert "1 rows met an error" in str(done.exception)
    assert [(row["status"], row["score"] is None) for row in read_jsonl(out)] == [("ok", False), ("error", True)]
