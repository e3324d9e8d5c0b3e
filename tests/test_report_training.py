"""The report on a training run: what was planted is told, texts of samples stay texts, its list works in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.records import UsageError
from rlaif.report import write_report
from rlaif.report.common import Listing
from rlaif.rl.config import Ppo
from rlaif.train.config import Preference, Reward, Sft, Training
from rlaif.train.kinds import KINDS
from tests import test_report
from tests.conftest import cli, write_jsonl
from tests.test_report import HOSTILE, Elements, Row, Shown, data_of, planted

browser = test_report.browser

STOPPED = "the KL from the reference is 30.4 nats a response at step 20: above 30 (stop_when kl)"


# ---------------------------------------------------------------- planted runs


def ppo(**more: Any) -> Ppo:
    terms = [
        {"kind": "rating", "name": "judge", "labeler": "/home/me/kind.yaml"},
        {"kind": "length", "most": 120, "weight": 0.25},
        {"kind": "ensemble", "of": [{"kind": "model", "model": "/home/me/rm-1"}, {"kind": "model", "model": "/home/me/rm-2"}]},
        {"kind": "gate", "safety": {"kind": "model", "model": "/home/me/rm-3"}, "helpful": {"kind": "format", "pattern": "x"}},
    ]
    second = [{"kind": "rating", "labeler": "second.yaml"}]
    settings = {"name": "kinder", "data": "/home/me/prompts.jsonl", "out": "/home/me/runs/kinder", "eval_share": 0.1}
    return Ppo.model_validate({**settings, "reward": terms, "held_out": second, **more})


def metrics(steps: int = 20) -> list[Row]:
    """The reward rises by 1 a step, and the KL by 2; 3 responses of step 4 have no score; evaluations each 10 steps."""
    found = []
    for n in range(1, steps + 1):
        figures = {
            "reward": float(n),
            "reward/judge": n / 2,
            "kl": 2.0 * n,
            "failed": 3.0 if n == 4 else 0.0,
            "time/generation": 0.5,
        }
        found.append({"part": "train", "step": n, "epoch": n / 10, **figures})
        if n % 10 == 0:
            found.append({"part": "train", "step": n, "epoch": n / 10, "held_out/reward": 5 - n / 10, "held_out/failed": 1.0})
    return found


def samples(steps: int = 20) -> list[Row]:
    """Four samples each 10 steps: the second was cut, the third has no score."""
    return [
        {
            "part": "train",
            "step": step,
            "prompt": [{"role": "user", "content": f"Question {k}?"}],
            "response": f"Answer {k} of step {step}.",
            "reward": None if k == 2 else step / 10 + (k % 2),
            "terms": {"judge": None if k == 2 else 0.5, "length": -0.25 * k},
            "kl": 1.5 * k,
            "tokens": 10 + k,
            "ended": k != 1,
            "error": "judge: timed out" if k == 2 else None,
        }
        for step in range(10, steps + 1, 10)
        for k in range(4)
    ]


def finished(kind: str, config: Training, **more: Any) -> Row:
    train = {"source": "/home/me/prompts.jsonl", "sha256": "ab", "rows": 5000, "left_out": {"over 1024 tokens": 3, "bad": 0}}
    return {
        "kind": kind,
        "settings": config.model_dump(mode="json"),
        "data": {"stage-1": {"train": train, "held_out": {**train, "rows": 12, "left_out": {}}}},
        "labeler": [],
        "parts": [{"name": "train", "steps": 20, "seconds": 1234.5}],
        "versions": {"rlaif": "0.1.0"},
        "evaluation": {"stopped": None, "accuracy": {"value": 0.75, "low": 0.7, "high": 0.8, "n": 64}},
        "metrics": {},
        "wall_seconds": 1300.0,
        "finished_at": "2026-11-21T12:00:00Z",
        **more,
    }


def folder(place: Path, config: Training, logged: list[Row], said: list[Row] | None = None, run: Row | None = None) -> Path:
    place.mkdir()
    (place / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_jsonl(place / "metrics.jsonl", logged)
    if said is not None:
        write_jsonl(place / "samples.jsonl", said)
    if run is not None:
        (place / "run.json").write_text(json.dumps(run))
    return place


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., tuple[str, Row, Listing]]:
    """Write the report on a run's folder; returns its HTML, the data of its list, and what is listed."""

    def write(place: Path, **options: Any) -> tuple[str, Row, Listing]:
        out = tmp_path / "report.html"
        listing = write_report([str(place)], out, **options)
        html = out.read_text(encoding="utf-8")
        return html, data_of(html), listing

    return write


def table(html: str, name: str) -> dict[str, list[str]]:
    """A table's lines by their headings; of two with one heading, the second with a star."""
    body = re.search(r"<tbody>(.*?)</tbody>", html[html.index(f'id="{name}"') :], re.DOTALL)
    assert body
    found: dict[str, list[str]] = {}
    for head, line in re.findall(r'<th scope="row".*?>(.*?)</th>(.*?)</tr>', body[1], re.DOTALL):
        cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", line, re.DOTALL)]
        found[head + "*" * (head in found)] = cells
    return found


def facts(html: str) -> dict[str, str]:
    listed = re.search(r'<dl class="facts">(.*?)</dl>', html, re.DOTALL)
    assert listed
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", listed[1]))


# ---------------------------------------------------------------- what is told


def test_what_was_trained_and_how_it_went(tmp_path: Path, page: Callable[..., Any]) -> None:
    run = finished("ppo", ppo(), evaluation={"stopped": STOPPED, "accuracy": {"value": 0.75, "low": 0.7, "high": 0.8, "n": 64}})
    html, data, listing = page(folder(tmp_path / "run", ppo(), metrics(), samples(), run))
    assert "<h1>Training: kinder</h1>" in html
    assert facts(html) == {
        "kind": "ppo",
        "algorithm": "ppo",
        "model": "embedded",
        "took": "1,300 s",
        "finished": "2026-11-21 12:00:00 UTC",
    }
    assert STOPPED in html[html.index('id="stopped"') :].partition("</p>")[0]
    assert 'id="unfinished"' not in html
    assert table(html, "data-table") == {
        "prompts.jsonl": ["stage-1", "training", "5,000", "3 over 1024 tokens"],
        "prompts.jsonl*": ["stage-1", "held out", "12", "–"],
    }
    assert table(html, "measured") == {"accuracy": ["0.75", "0.7 to 0.8", "64"]}
    assert "train: 20 steps in 1,234 s." in html
    rewards = table(html, "reward-table")
    assert rewards["judge"] == ["training", "rating", "kind.yaml", "–", "1.00", "1.500", "9.000"]  # means of 5
    assert rewards["length"][:5] == ["training", "length", "–", "most 120", "0.25"]
    assert rewards["ensemble"][3].startswith("combine mean")
    assert (rewards["model"][2], rewards["model*"][2]) == ("rm-1", "rm-2")
    assert rewards["gate"][3] == "below 0.15"
    assert (rewards["safety"][1:3], rewards["helpful"][1:3]) == (["model", "rm-3"], ["format", "x"])
    assert rewards["rating"][:3] == ["held out", "rating", "second.yaml"]
    figures = table(html, "figure-table")
    assert figures["kl"] == ["train", "20", "6", "36", "2", "40"]
    assert figures["held_out/reward"] == ["train", "2", "4", "3", "3", "4"]
    assert re.search(r'id="failed">.*: 3 responses .* and 2 of the evaluations', html)
    assert "<div><dt>kl_target</dt><dd>6</dd></div>" in html
    assert "<div><dt>versions.rlaif</dt><dd>0.1.0</dd></div>" in html
    assert "/home/me" not in html
    assert (listing.rows, listing.total, listing.all_first, listing.what) == (8, 8, 2, "samples")
    assert "All 8 samples are listed." in html
    assert [row["id"] for row in data["rows"]] == [f"{step}.{k}" for step in (10, 20) for k in (1, 2, 3, 4)]
    assert [row["status"] for row in data["rows"][:4]] == ["ended", "cut", "failed", "ended"]
    assert data["rows"][1] == {
        "step": 10,
        "prompt": "Question 1?",
        "response": "Answer 1 of step 10.",
        "reward": 2.0,
        "terms": {"judge": 0.5, "length": -0.25},
        "kl": 1.5,
        "tokens": 11.0,
        "status": "cut",
        "error": None,
        "id": "10.2",
    }


def test_every_curve_is_there_and_says_what_it_shows(tmp_path: Path, page: Callable[..., Any]) -> None:
    html, _, _ = page(folder(tmp_path / "run", ppo(), metrics(), samples(), finished("ppo", ppo())))
    titles = re.findall(r"<figcaption><b>(.*?)</b>", html)
    assert titles == ["Reward.", "Frontier.", "KL.", "Failed.", "Time."]
    assert "reward: 1 at a KL of 2, 20 at 40; held_out/reward: 4 at a KL of 20, 3 at 40" in html
    assert (
        "reward: 1 at step 1, 20 at step 20; held_out/reward: 4 at step 10, 3 at step 20; reward/judge: 0.5 at step 1" in html
    )
    assert "var(--blue)" in html
    assert 'id="stopped"' not in html
    assert page(tmp_path / "run")[0] == html


def test_a_run_that_has_not_finished_is_told_as_such(tmp_path: Path, page: Callable[..., Any]) -> None:
    place = folder(tmp_path / "run", ppo(), metrics(7))
    with (place / "metrics.jsonl").open("a") as file:
        file.write('{"part": "train", "ste')  # it is just being written
    html, data, listing = page(place)
    assert "its metrics reach to step 7." in html[html.index('id="unfinished"') :].partition("</p>")[0]
    assert facts(html)["kind"] == "ppo"
    assert table(html, "data-table") == {"prompts.jsonl": ["stage-1", "training", "–", "–"]}
    assert table(html, "figure-table")["reward"][1] == "7"
    assert (listing.total, data["rows"]) == (0, [])
    assert 'id="rows"' not in html
    assert 'href="#rows"' not in html
    (place / "metrics.jsonl").unlink()
    assert "it has logged nothing yet" in page(place)[0]


@pytest.mark.parametrize(
    ("kind", "config", "algorithm"),
    [
        ("sft", Sft(data="a.jsonl", out="o"), None),
        ("reward", Reward(data={"helpful": "a.jsonl", "safe": "b.jsonl"}, out="o"), "auto"),
        ("dpo", Preference(data="a.jsonl", out="o", loss={"dpo": 1.0, "sft": 0.5}), "1 · dpo + 0.5 · sft"),
        ("kto", KINDS["kto"](data="a.jsonl", out="o"), "kto"),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_runs_of_every_kind_have_a_page(
    tmp_path: Path, page: Callable[..., Any], kind: str, config: Training, algorithm: str | None, done: bool
) -> None:
    logged: list[Row] = [{"part": f"stage-{n % 2 + 1}", "step": n, "epoch": 0, "loss": 1 / n} for n in range(1, 9)]
    logged += [{"part": "stage-2", "step": 8, "epoch": 0, "eval_loss": 0.25}, {"part": "stage-2", "step": 9, "loss": "nan"}]
    agreement = {"column": "human", "accuracy": {"value": 0.8, "low": 0.75, "high": 0.85, "n": 90}}
    settings = {"engine": {"model": "/models/judge"}, "template": "base"}
    labeler = [{"data": "/home/a.jsonl", "labels": "l.jsonl", "settings": settings, "agreement": agreement}]
    run = finished(kind, config, labeler=labeler) if done else None
    html, _, listing = page(folder(tmp_path / "run", config, logged, run=run))
    assert facts(html)["kind"] == kind
    assert facts(html).get("algorithm") == algorithm
    assert re.findall(r"<figcaption><b>(.*?)</b>", html) == ["Loss."]
    assert 'id="rewards"' not in html
    figures = table(html, "figure-table")
    assert figures["loss"][0] == "stage-2"
    assert "and 1 that are no number" in figures["loss*"][1] + figures["loss"][1]
    if done:
        assert table(html, "label-table") == {"a.jsonl": ["l.jsonl", "judge", "base", "0.8000.750 to 0.850"]}
    else:
        assert ("b.jsonl" in table(html, "data-table")) == (kind == "reward")
    assert listing.total == 0


def test_the_command_writes_it(tmp_path: Path) -> None:
    place = folder(tmp_path / "run", ppo(), metrics(), samples(), finished("ppo", ppo()))
    done = cli("report", place, "-o", tmp_path / "r.html", "--title", "Kinder & safer", "--max-rows", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'r.html'}: 5 of 8 samples listed\n"
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>Kinder &amp; safer</h1>" in html
    said = re.sub(r"<[^>]+>|\s+", " ", html[html.index('id="cut"') : html.index('id="filters"')])
    assert "5 of 8 samples are listed" in said
    assert "2 of the 2 without a score, and 3 of the 6 others" in said


# ---------------------------------------------------------------- hostile texts


def hostile(place: Path) -> Path:
    config = ppo(name=HOSTILE.replace("\0", "").replace("\ud800", ""), description="<b>bold</b>")
    logged = [{**line, f"reward/{HOSTILE}": 1.0} for line in metrics()]
    sample = {**samples()[0], "prompt": HOSTILE, "response": "said " + HOSTILE, "error": HOSTILE, "terms": {HOSTILE: 1.0}}
    run = finished("ppo", config, evaluation={"stopped": HOSTILE, HOSTILE: 1.0}, versions={HOSTILE: HOSTILE})
    return folder(place, config, logged, [*samples(), sample], run)


def test_texts_cannot_become_markup_and_nothing_is_loaded(tmp_path: Path, page: Callable[..., Any]) -> None:
    html, data, _ = page(hostile(tmp_path / "run"))
    assert data["rows"][-1]["response"] == "said " + HOSTILE
    assert data["rows"][-1]["terms"] == {HOSTILE: 1.0}
    parser = Elements()
    parser.feed(html)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 2
    assert not {"img", "link", "iframe", "object", "image", "foreignobject"} & set(tags)
    for _, attributes in parser.found:
        assert not {"src", "style", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("clip-path") or "url(#").startswith("url(#")
    policy = next(a["content"] for tag, a in parser.found if tag == "meta" and "http-equiv" in a)
    assert policy
    assert "unsafe" not in policy
    ids = [attributes["id"] for _, attributes in parser.found if "id" in attributes]
    assert len(ids) == len(set(ids))


# ---------------------------------------------------------------- bad input


def test_bad_input_is_named(tmp_path: Path) -> None:
    html = tmp_path / "r.html"
    good = str(folder(tmp_path / "run", ppo(), metrics(), samples()))

    def refused(expected: str, *outs: Path | str, **options: Any) -> None:
        with pytest.raises(UsageError, match=expected) as error:
            write_report([str(out) for out in outs], html, **options)
        assert "\n" not in str(error.value)
        assert not html.exists()

    def changed(name: str, file: str, text: str) -> Path:
        place = folder(tmp_path / name, ppo(), metrics(), samples())
        (place / file).write_text(text)
        return place

    empty = tmp_path / "empty"
    empty.mkdir()
    refused("empty", empty)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("port: 80\n")
    refused("other: holds no run of `rlaif train`", other)
    alone = tmp_path / "alone"
    alone.mkdir()
    write_jsonl(alone / "metrics.jsonl", metrics())
    refused("alone: holds no run of `rlaif train`", alone)
    refused("run.json: cannot be read", changed("cut", "run.json", '{"kind": '))
    refused("config.yaml.*not YAML", changed("yaml", "config.yaml", "a: [1"))
    refused("metrics.jsonl line 1: expected an object with part, step", changed("lines", "metrics.jsonl", '{"step": 1}\n'))
    refused("metrics.jsonl line 1", changed("list", "metrics.jsonl", "[1]\n"))
    refused("samples.jsonl line 1: .*step, response", changed("samples", "samples.jsonl", '{"step": "1", "response": "a"}\n'))
    refused("run.*run2 are outputs of `rlaif train`: a report takes one", good, folder(tmp_path / "run2", ppo(), metrics()))
    labels = write_jsonl(tmp_path / "labels.jsonl", planted())
    refused("run is an output of `rlaif train`, .*labels.jsonl is not", good, labels)
    refused("--human goes with labelled files", good, human="human")


# ---------------------------------------------------------------- in a browser


def test_the_list_of_samples_in_a_browser(tmp_path: Path, browser: Any, page: Callable[..., Any]) -> None:
    page(hostile(tmp_path / "run"))
    browser.get((tmp_path / "report.html").as_uri())
    shown = Shown(browser)
    assert shown.count() == 9
    assert [shown.choose("step", value) for value in ("10", "20", "")] == [5, 4, 9]
    assert [shown.choose("status", value) for value in ("ended", "cut", "failed", "")] == [5, 2, 2, 9]
    assert [shown.choose("order", "best"), first(shown)] == [9, "20.2"]
    assert [shown.choose("order", "worst"), first(shown)] == [9, "10.1"]
    assert [row.text.split()[0] for row in shown.all("#list tr.row")][-2:] == ["10.3", "20.3"]  # without a score
    shown.choose("step", "20")
    assert [row.text.split()[0] for row in shown.all("#list tr.row")] == ["20.1", "20.2", "20.4", "20.3"]
    shown.choose("step", "")
    shown.search("timed out", 2)
    shown.one("#list tr.row").click()
    assert shown.one(".detail .failed").text == "judge: timed out"
    assert [part.text for part in shown.all(".detail dd")][:2] == ["–", "–"]
    shown.search("said", 1)
    shown.one("#list tr.row").click()
    text = "<script>window.ran = 1</script></script><img src=x onerror='window.ran = 2'><!--"
    for selector in (".detail pre", ".detail pre + h4 + pre", ".detail .failed", ".detail dl"):
        assert text in shown.one(selector).text
    assert browser.execute_script("return window.ran") is None
    assert not shown.all("img")
    assert browser.get_log("browser") == []


def first(shown: Shown) -> str:
    return str(shown.one("#list tr.row").text.split()[0])


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen(tmp_path: Path, browser: Any, page: Callable[..., Any], width: int) -> None:
    page(folder(tmp_path / "run", ppo(), metrics(), samples(), finished("ppo", ppo())))
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get((tmp_path / "report.html").as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true })")
    browser.execute_script("document.querySelector('#list tr.row').click()")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    plots = Shown(browser).all(".plot svg")
    assert len(plots) == 5
    assert all(plot.rect["x"] >= 0 and plot.rect["x"] + plot.rect["width"] <= width for plot in plots)


def test_a_page_without_samples_runs_without_an_error(tmp_path: Path, browser: Any, page: Callable[..., Any]) -> None:
    page(folder(tmp_path / "run", ppo(), metrics()))
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.get_log("browser") == []
