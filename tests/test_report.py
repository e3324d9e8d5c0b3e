"""The report: its figures are the leaderboard's, its texts stay texts, and its list of rows works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlaif.evaluate import agreement
from rlaif.records import UsageError
from rlaif.report import write_report
from tests.conftest import cli, make_rows, read_jsonl, write_jsonl

Row = dict[str, Any]

HOSTILE = (
    "<script>window.ran = 1</script></script><img src=x onerror='window.ran = 2'><!--<script> \u2028\u2029 "
    "&lt;b&gt; {{ 7 * 7 }} \"' \x00 \ud800 $x^2$"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")


# ---------------------------------------------------------------- planted rows


def vote(order: str, soft: float | None, **more: Any) -> Row:
    return {
        "principle": None,
        "order": order,
        "soft_label": soft,
        "status": "unparsed" if soft is None else "ok",
        "logprobs": None,
        "text": "Purple." if soft is None else "1",
        "rationale": None,
        "sample": 0,
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "error": None,
        "key": "",
        **more,
    }


def labelled(n: int, soft: float | None, human: str | None, votes: list[Row] | None = None, **more: Any) -> Row:
    label = None if soft is None else "tie" if soft == 0.5 else "a" if soft > 0.5 else "b"
    return {
        "id": f"row-{n}",
        "prompt": f"Which of them answers question {n}?",
        "response_a": f"The quick brown fox jumps over dog {n}",
        "response_b": f"The slow brown fox jumps over the lazy dog {n}",
        "human": human,
        "status": "unparsed" if soft is None else "tie" if soft == 0.5 else "ok",
        "soft_label": soft,
        "label": label,
        "dispersion": None,
        "votes": votes if votes is not None else [vote("ab", soft), vote("ba", soft)],
        "error": None,
        **more,
    }


def planted() -> list[Row]:
    """40 rows: 24 right, 8 wrong (4 of them with disagreeing orders), 5 without a label, 3 without a human label."""
    rows = [labelled(n, 0.9 if n % 2 else 0.2, "a" if n % 2 else "b") for n in range(24)]
    rows += [labelled(n, 0.8, "b") for n in range(24, 28)]
    rows += [labelled(n, 0.55, "b", [vote("ab", 0.9), vote("ba", 0.2)]) for n in range(28, 32)]
    rows += [labelled(n, None, "a") for n in range(32, 37)]
    rows += [labelled(n, 0.7, None) for n in range(37, 40)]
    rows[3]["votes"][0]["rationale"] = "Because zebras are striped."
    return rows


def hostile() -> Row:
    texts = {"prompt": HOSTILE, "response_a": HOSTILE, "response_b": "plain " + HOSTILE}
    return labelled(99, 0.9, "a", [vote("ab", 0.9, text=HOSTILE, rationale=HOSTILE), vote("ba", 0.9)], **texts, error=HOSTILE)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are `agreement`'s, and tested with it; only the command line takes all its resamples here."""
    monkeypatch.setattr("rlaif.report.RESAMPLES", 100)


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., tuple[str, Row]]:
    """Write the report on lists of rows; returns its HTML and the data of its list."""

    def write(*lists: list[Row], **options: Any) -> tuple[str, Row]:
        outs = [str(write_jsonl(tmp_path / f"out{n}.jsonl", rows)) for n, rows in enumerate(lists)]
        out = tmp_path / "report.html"
        write_report(outs, out, **{"human": "human", **options})
        html = out.read_text(encoding="utf-8")
        return html, data_of(html)

    return write


def data_of(html: str) -> Row:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    data: Row = json.loads(found[1])
    return data


def cells(html: str, metric: str) -> list[str]:
    """The values that the table of metrics shows for one metric."""
    line = re.search(rf'<th scope="row">{re.escape(metric)}<small>.*?</tr>', html, re.DOTALL)
    assert line, metric
    return re.findall(r"<b>(.*?)</b>", line[0])


# ---------------------------------------------------------------- figures


def test_the_figures_are_those_of_the_leaderboard(tmp_path: Path) -> None:
    rows = [{**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b"} for row in make_rows(60, 40)]
    data, outs = write_jsonl(tmp_path / "d.jsonl", rows), []
    for name, k in (("sharp", "5"), ("noisy", "0.1")):
        outs.append(tmp_path / f"{name}.jsonl")
        mock = ("--engine", "mock", "-E", f"k={k}", "-E", "noise=2", "-E", "garbage=0.1", "--price", "1,2")
        assert cli("label", data, "-o", outs[-1], *mock).returncode == 0
    done = cli("report", *outs, "-o", tmp_path / "r.html", "--human", "human", "--title", "Sharp & noisy", "--max-rows", "30")
    assert done.returncode == 0, done.stderr
    assert "30 of 60 rows listed" in done.stdout
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    board = agreement.leaderboard({out.name: read_jsonl(out) for out in outs}, "human")
    for metric, title in (("accuracy", "accuracy"), ("accuracy_all", "accuracy, all rows"), ("kappa", "Cohen&#39;s kappa")):
        values = [f"{result['metrics'][metric]['value']:.3f}".replace("-", "−") for result in board]
        assert cells(html, title) == values
    mine = next(result for result in board if result["name"] == "sharp.jsonl")
    low, high = mine["metrics"]["accuracy_all"]["low"], mine["metrics"]["accuracy_all"]["high"]
    assert f"<small>{low:.3f} to {high:.3f}</small>" in html
    run = json.loads((tmp_path / "sharp.jsonl.run.json").read_text())
    cost = run["all_runs"]["cost_usd"]
    assert f"${cost:,.4f}" in html
    assert f"${1000 * cost / (run['statuses']['ok'] + run['statuses']['tie']):,.4f}" in html
    assert "<h1>Sharp &amp; noisy</h1>" in html
    assert "Between labelers" in html
    assert str(tmp_path) not in html


def test_failures_and_wrong_labels_are_listed_first_and_the_page_says_what_is_left_out(page: Callable[..., Any]) -> None:
    html, data = page(planted(), max_rows=20)
    assert len(data["rows"]) == 20
    wanted = {f"row-{n}" for n in range(24, 37)}
    assert wanted <= {row["id"] for row in data["rows"]}
    said = re.sub(r"<[^>]+>|\s+", " ", html[html.index('id="cut"') : html.index('id="filters"')])
    assert "20 of 40 rows are listed" in said
    assert re.search(r"13 of the 13 without a label or with a wrong one,\s+and 7 of the 27 others", said)
    fewer = page(planted(), max_rows=5)[1]["rows"]
    assert len(fewer) == 5
    assert {row["id"] for row in fewer} < wanted
    assert "All 40 rows are listed" in page(planted())[0]


def test_a_failure_has_no_label_and_is_not_right_or_wrong(page: Callable[..., Any]) -> None:
    odd = labelled(0, None, "a", soft_label=0.9, label="a")
    result = page([odd, *planted()[1:]])[1]["rows"][0]["results"][0]
    assert (result["status"], result["label"], result["soft"], result["right"]) == ("unparsed", None, None, None)


def test_the_confusion_matrix_counts_every_row_with_a_human_label(page: Callable[..., Any]) -> None:
    html = page(planted())[0]
    table = html[html.index("<b>Confusion.</b>") :]
    rows = re.findall(r'<th scope="row">(?:label: )?(\w+)</th>(.*?)</tr>', table[: table.index("</table>")])
    counts = {name: [int(n) for n in re.findall(r">(\d+)<small>", line)] for name, line in rows}
    assert counts == {"a": [12, 8, 0], "b": [0, 12, 0], "tie": [0, 0, 0], "none": [5, 0, 0]}


def test_without_humans_the_page_says_so(page: Callable[..., Any]) -> None:
    html, data = page(planted(), human=None)
    assert "No human labels were given" in html
    assert 'id="metrics"' not in html
    assert "<b>Confusion.</b>" not in html
    assert "<b>Position bias.</b>" in html
    assert "<b>Soft labels.</b>" in html
    assert data["human"] is False


def test_principles_are_compared_with_one_another_and_with_humans(page: Callable[..., Any]) -> None:
    def both(n: int) -> Row:
        kind, terse = (0.9, 0.9 if n % 4 else 0.1)  # they disagree on every fourth row
        votes = [
            vote(order, soft, principle=name) for name, soft in (("kind", kind), ("terse", terse)) for order in ("ab", "ba")
        ]
        return labelled(n, (kind + terse) / 2, "a", votes)

    html, data = page([both(n) for n in range(20)])
    assert "Between principles" in html
    section = html[html.index("Between principles") : html.index('id="cost"')]
    assert re.search(r'class="heat-8"[^>]*>0.750<', section)
    accuracies = dict(re.findall(r'<th scope="row">(kind|terse)</th><td>20</td><td>20</td><td><b>(.*?)</b>', section))
    assert accuracies == {"kind": "1.000", "terse": "0.750"}
    differing = [row["id"] for row in data["rows"] if "principles" in row["results"][0]["disagree"]]
    assert differing == [f"row-{n}" for n in range(0, 20, 4)]


def test_labelers_are_matched_by_id_whatever_their_order(page: Callable[..., Any]) -> None:
    other = [labelled(n, 0.9, "a" if n % 2 else "b") for n in reversed(range(24))]
    html, data = page(planted(), other)
    assert [row["id"] for row in data["rows"]] == [f"row-{n}" for n in range(40)]
    assert [row["id"] for row in data["rows"] if "labelers" in row["disagree"]] == [f"row-{n}" for n in range(0, 24, 2)]
    assert all(row["results"][1] is None for row in data["rows"][24:])
    assert re.search(r'class="heat-5"[^>]*>0.500<', html)
    assert "no run file: counted from the votes" in html


def test_the_same_rows_make_the_same_page(page: Callable[..., Any]) -> None:
    assert page(planted())[0] == page(planted())[0]


def test_odd_rows_make_a_page_too(page: Callable[..., Any]) -> None:
    alone = labelled(0, 0.9, "a", [], prompt=[{"role": "user", "content": "Hi"}], id=7)
    del alone["votes"]
    data = page([alone])[1]
    assert (data["rows"][0]["id"], data["rows"][0]["prompt"], data["rows"][0]["results"][0]["votes"]) == ("7", "Hi", [])
    failed = [labelled(n, None, "a", [], status="error", response_a=None, prompt=None, error="empty") for n in range(3)]
    html = page(failed)[0]
    assert "No row has a soft label." in html
    assert "No row was judged in both orders" in html
    assert cells(html, "accuracy, all rows")[-1] == "0.000"
    assert "No row has a soft label." in page(failed, human=None)[0]


# ---------------------------------------------------------------- hostile texts


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_texts_cannot_become_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    rows = [{**row, "extra": HOSTILE} for row in planted()] + [hostile()]
    for row in rows:
        for n, one in enumerate(row["votes"]):
            one["principle"] = (HOSTILE.replace("\x00", ""), "b$a$d")[n]
    out = write_jsonl(tmp_path / "out<img src=x>&$x$.jsonl", rows)
    run = {"settings": {"engine": {"model": HOSTILE}, HOSTILE: HOSTILE, "template": HOSTILE}, "notes": [HOSTILE]}
    (tmp_path / (out.name + ".run.json")).write_text(json.dumps(run))
    write_report([str(out)], tmp_path / "r.html", "human", title=HOSTILE)
    html = (tmp_path / "r.html").read_bytes().decode()
    data = data_of(html)
    last = data["rows"][-1]
    assert (last["prompt"], last["a"], last["results"][0]["votes"][0][6]) == (HOSTILE, HOSTILE, HOSTILE)
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
    assert "@import" not in html
    assert "url(" not in html[html.index("<style>") : html.index("</style>")]
    policy = next(a["content"] for tag, a in parser.found if tag == "meta" and "http-equiv" in a)
    assert policy
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    ids = [attributes["id"] for _, attributes in parser.found if "id" in attributes]
    assert len(ids) == len(set(ids))


# ---------------------------------------------------------------- bad input


def test_bad_input_is_named(tmp_path: Path) -> None:
    good = str(write_jsonl(tmp_path / "good.jsonl", planted()))
    html = tmp_path / "r.html"

    def refused(expected: str, *outs: str, out: Path = html, **options: Any) -> None:
        with pytest.raises(UsageError, match=expected):
            write_report(outs or [good], out, **options)
        assert not html.exists()

    def changed(name: str, **changes: Any) -> str:
        return str(write_jsonl(tmp_path / name, [{**row, **(changes if n == 1 else {})} for n, row in enumerate(planted())]))

    refused("no such folder", out=tmp_path / "none" / "r.html")
    refused("must end in .html", out=tmp_path / "good.jsonl")
    refused("is a folder", out=make_folder(tmp_path / "folder.html"))
    refused("no such file", str(tmp_path / "none.jsonl"))
    refused("good.jsonl is given twice", good, good)
    refused("good.jsonl: no column 'votes_of_humans'", human="votes_of_humans")
    refused("human.jsonl: row 2, column 'human': 'x'", changed("human.jsonl", human="x"), human="human")
    refused("label.jsonl: row 2, column 'label'", changed("label.jsonl", label="c"))
    refused("soft.jsonl: row 2, column 'soft_label'", changed("soft.jsonl", soft_label=2))
    refused("status.jsonl: row 2, column 'status'", changed("status.jsonl", status="fine"))
    refused("votes.jsonl: row 2, column 'votes'", changed("votes.jsonl", votes="two"))
    refused("other.jsonl row 2: id 'row-1' has another response_a", good, changed("other.jsonl", response_a="other"))
    refused("twice.jsonl row 2, column 'id': 'row-0' is there twice", good, changed("twice.jsonl", id="row-0"))
    others = [{**row, "id": f"other {n}"} for n, row in enumerate(planted())]
    refused("others.jsonl: no row has an id of", good, str(write_jsonl(tmp_path / "others.jsonl", others)))
    (tmp_path / "good.jsonl.run.json").write_text("{")
    refused("good.jsonl.run.json: cannot be read")
    done = cli("report", good, "-o", tmp_path / "none" / "r.html")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("needs chromium and chromedriver, which are not on PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


class Shown:
    """The list of rows, as a user works it."""

    def __init__(self, driver: Any):
        self.driver = driver

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.driver.find_elements("css selector", selector)
        return found

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def choose(self, name: str, value: str) -> int:
        from selenium.webdriver.support.ui import Select

        Select(self.one(f"#by-{name}")).select_by_value(value)
        return self.count()

    def count(self) -> int:
        return int(re.findall(r"(\d+) found", self.one("#found").text)[0])

    def search(self, text: str, expected: int) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        self.one("#search").clear()
        self.one("#search").send_keys(text)
        WebDriverWait(self.driver, 10).until(lambda _: self.count() == expected)


def test_the_list_of_rows_in_a_browser(tmp_path: Path, browser: Any) -> None:
    rows = [*planted(), hostile()]
    out = write_jsonl(tmp_path / "out.jsonl", rows)
    write_report([str(out)], tmp_path / "r.html", "human")
    browser.get((tmp_path / "r.html").as_uri())
    shown = Shown(browser)
    assert shown.count() == 41
    assert len(shown.all("#list tr.row")) == 25
    check_filters(shown)
    check_paging(shown)
    check_an_opened_row(shown)
    check_a_hostile_row(shown)
    assert browser.get_log("browser") == []


def check_filters(shown: Shown) -> None:
    assert [shown.choose("status", value) for value in ("ok", "unparsed", "refused", "")] == [36, 5, 0, 41]
    assert [shown.choose("human", value) for value in ("right", "wrong", "none", "unjudged", "")] == [25, 8, 5, 3, 41]
    assert [shown.choose("disagreement", value) for value in ("orders", "principles", "nothing", "")] == [4, 0, 37, 41]
    assert shown.choose("human", "wrong") == 8
    assert shown.choose("disagreement", "orders") == 4
    assert [row.text.split()[0] for row in shown.all("#list tr.row")] == [f"row-{n}" for n in range(28, 32)]
    shown.choose("disagreement", "")
    shown.choose("human", "")
    shown.search("ZEBRAS", 1)
    shown.search("question 31", 1)
    shown.search("", 41)
    shown.choose("order", "unsure")
    assert shown.one("#list tr.row").text.startswith("row-28")
    shown.choose("order", "")


def check_paging(shown: Shown) -> None:
    assert not shown.all("#pages button")[0].is_enabled()
    shown.driver.execute_script("arguments[0].click()", shown.all("#pages button")[1])
    assert len(shown.all("#list tr.row")) == 16
    assert shown.one("#pages").text.split("\n")[0].startswith("Previous")
    assert not shown.all("#pages button")[1].is_enabled()
    shown.driver.execute_script("arguments[0].click()", shown.all("#pages button")[0])


def check_an_opened_row(shown: Shown) -> None:
    from selenium.webdriver.common.keys import Keys

    button = shown.all("#list tr.row button")[3]
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    left, right = shown.all(".pair pre")
    assert left.location["y"] == right.location["y"]
    assert left.location["x"] + left.size["width"] <= right.location["x"]
    assert left.text == "The quick brown fox jumps over dog 3"
    assert [mark.text for mark in shown.all(".response-a mark")] == ["quick"]
    assert [mark.text for mark in shown.all(".response-b mark")] == ["slow", "the lazy"]
    assert shown.one(".more.rationale").text == "rationale: Because zebras are striped."
    assert "A, B" in shown.one("table.votes").text
    assert "0.900" in shown.one("table.votes").text
    assert "preferred by humans" in shown.one(".response-a h4").text
    button.send_keys(Keys.ENTER)
    assert not shown.all(".detail")
    shown.all("#list tr.row")[0].click()
    assert len(shown.all(".detail")) == 1
    shown.all("#list tr.row")[0].click()
    assert not shown.all(".detail")


def check_a_hostile_row(shown: Shown) -> None:
    shown.search("row-99", 1)
    shown.one("#list tr.row").click()
    for selector in (".detail pre", ".response-a pre", ".more.rationale", ".failed", "td.said"):
        assert "<script>window.ran = 1</script></script><img src=x onerror='window.ran = 2'><!--" in shown.one(selector).text
    assert "&lt;b&gt;" in shown.one(".response-a pre").text
    assert [mark.text for mark in shown.all(".response-b mark")] == ["plain"]
    assert shown.driver.execute_script("return window.ran") is None
    assert not shown.all("img")
    assert len(shown.all("script")) == 2


def test_long_responses_open_at_once_in_a_browser(tmp_path: Path, browser: Any) -> None:
    a = " ".join(f"w{n * 7919 % 5003}" + "." * (n % 12 == 0) for n in range(6000))
    b = " ".join(f"w{n * 7907 % 5003}" + "." * (n % 12 == 0) for n in range(6000))
    rows = [{**row, "response_a": f"same {a} same", "response_b": f"same {b} same"} for row in planted()[:3]]
    out = write_jsonl(tmp_path / "out.jsonl", rows)
    write_report([str(out)], tmp_path / "r.html", "human")
    browser.get((tmp_path / "r.html").as_uri())
    milliseconds = browser.execute_script(
        "const start = performance.now(); document.querySelector('#list tr.row').click(); return performance.now() - start"
    )
    assert milliseconds < 2000
    shown = Shown(browser)
    assert shown.one(".response-a pre").text == rows[0]["response_a"]
    assert shown.all(".response-a mark")
    assert "whole sentences are compared" in shown.one(".detail .note").text
