"""The report on revised rows: planted counts in its figures and tables, texts that stay texts, its list in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlaif.records import UsageError
from rlaif.report import write_report
from tests import test_report
from tests.conftest import cli, write_jsonl
from tests.test_report import HOSTILE, Elements, Row, Shown, data_of, labelled

browser = test_report.browser

NO = "I cannot help with that."


# ---------------------------------------------------------------- planted rows


def made(number: int, principle: str | None, revision: str, **more: Any) -> Row:
    """A round that made this revision."""
    return {
        "round": number,
        "principle": principle,
        "critique": f"Round {number} could be kinder.",
        "revision": revision,
        "status": "ok",
        "unchanged": False,
        "refusal": False,
        "text": None,
        "completion_tokens": 10,
        "error": None,
        "key": "",
        **more,
    }


def failed(number: int, principle: str | None, status: str, text: str, **more: Any) -> Row:
    return {**made(number, principle, ""), "revision": None, "status": status, "text": text, **more}


def revised(name: str, response: str | None, rounds: list[Row], **more: Any) -> Row:
    status = rounds[-1]["status"] if rounds else "error"
    return {
        "id": name,
        "prompt": f"How does {name} learn to swim?",
        "response": response,
        "revisions": rounds,
        "revised": rounds[-1]["revision"] if status == "ok" else None,
        "status": status,
        "error": None,
        **more,
    }


FIRST = "Jump in the deep end, you fool, and swim."
SECOND = "Begin in the shallow end, you fool, and swim."
THIRD = "Begin in the shallow end, and swim."


def planted() -> list[Row]:
    """30 rows of at most two rounds.

    Round 1 (kind): 20 changed, 5 unchanged, 4 declining (1 of them unchanged too); 1 row has no round.
    Round 2 (safe, 29 rows): 17 changed, 3 unchanged, 4 declining, 3 unparsed critiques, 2 refused revisions.
    """
    rows = [revised(f"good-{n}", FIRST, [made(1, "kind", SECOND), made(2, "safe", THIRD)]) for n in range(12)]
    for n in range(5):
        rows.append(revised(f"late-{n}", FIRST, [made(1, "kind", FIRST, unchanged=True), made(2, "safe", THIRD)]))
    for n in range(3):
        same = made(2, "safe", SECOND, unchanged=True)
        rows.append(revised(f"early-{n}", FIRST, [made(1, "kind", SECOND), same]))
    for n in range(3):
        rows.append(revised(f"no-{n}", FIRST, [made(1, "kind", NO, refusal=True), made(2, "safe", NO + " Ask.", refusal=True)]))
    both = made(1, "kind", NO, refusal=True, unchanged=True)
    rows.append(revised("both", NO, [both, made(2, "safe", NO + " Ask.", refusal=True)]))
    for n in range(3):
        cut = failed(2, "safe", "unparsed", "Zebras are", critique="Zebras are")
        rows.append(revised(f"cut-{n}", FIRST, [made(1, "kind", SECOND), cut]))
    for n in range(2):
        said = failed(2, "safe", "refused", "Giraffes forbid it.")
        rows.append(revised(f"refused-{n}", FIRST, [made(1, "kind", SECOND), said]))
    rows.append(revised("bad", None, [], error="column 'response': expected text, got null"))
    return rows


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., tuple[str, Row]]:
    """Write the report on rows; returns its HTML and the data of its list."""

    def write(rows: list[Row], **options: Any) -> tuple[str, Row]:
        out = tmp_path / "report.html"
        write_report([str(write_jsonl(tmp_path / "revised.jsonl", rows))], out, **options)
        html = out.read_text(encoding="utf-8")
        return html, data_of(html)

    return write


def lines(html: str, table: str) -> dict[str, list[str]]:
    """A table's lines by their headings, each cell without its small print."""
    found = html[html.index(f'id="{table}"') :]
    body = re.search(r"<tbody>(.*?)</tbody>", found, re.DOTALL)
    assert body
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', body[1], re.DOTALL)
    return {name: [plain(cell) for cell in re.findall(r"<td.*?>(.*?)</td>", line, re.DOTALL)] for name, line in rows}


def plain(cell: str) -> str:
    return re.sub(r"<small>.*?</small>|<[^>]+>|\s+", "", cell, flags=re.DOTALL)


# ---------------------------------------------------------------- figures


def test_the_planted_counts_are_in_figures_and_tables(page: Callable[..., Any]) -> None:
    html = page(planted())[0]
    assert (
        "round 1: changed 20, declines 4, unchanged 5, failed 0; round 2: changed 17, declines 4, unchanged 3, failed 5" in html
    )
    assert "original: median 41, quartiles 41 and 41, of 29; 1: median 45" in html
    by_round = lines(html, "round-table")
    assert by_round["original"] == ["29", "–", "–", "–", "–", "–", "41"]
    assert by_round["1"][:5] == ["29", "20", "4", "5", "0"]
    assert by_round["2"][:5] == ["29", "17", "4", "3", "5"]
    principles = lines(html, "principle-table")
    assert principles["kind"][:7] == ["29", "0", "0.000", "6", "0.207", "4", "0.138"]
    assert principles["safe"][:7] == ["29", "5", "0.172", "3", "0.125", "4", "0.167"]
    assert "<small>0.098 to 0.384</small>" in html  # Wilson's interval of 6 in 29
    assert "53 revisions were made: 9 left the text as it was, 8 decline." in html


def test_change_is_the_share_of_characters_that_differ(page: Callable[..., Any]) -> None:
    rows = [revised(str(n), "abcdefgh", [made(1, "kind", "abXdefgh"), made(2, "kind", "abXd")]) for n in range(4)]
    html, data = page(rows)
    place = data["round"].index("change")
    assert [one[place] for one in data["rows"][0]["rounds"]] == [0.125, 0.5]
    assert data["rows"][0]["change"] == 0.625
    assert "1: median 0.125, quartiles 0.125 and 0.125, of 4; 2: median 0.5" in html
    assert "in all: median 0.625" in html
    assert (lines(html, "round-table")["1"][5:], lines(html, "round-table")["2"][5:]) == (["0.125", "8"], ["0.500", "4"])


def test_what_rlaif_revise_makes_is_reported_with_its_settings_and_cost(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "response": f"Answer {n}. [q=-1]"} for n in range(12)]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    mock = ("--engine", "mock", "-E", "garbage=0.1", "-E", "refuse=0.1", "--price", "100,200")
    for method, more in (("critique", ("--constitution", "general", "--rounds", "2")), ("clair", ())):
        out = tmp_path / f"{method}.jsonl"
        assert cli("revise", data, "-o", out, "--method", method, *more, *mock).returncode == 0
        done = cli("report", out, "-o", tmp_path / "r.html", "--title", "Kinder & safer")
        assert (done.returncode, done.stderr) == (0, "")
        assert "12 of 12 rows listed" in done.stdout
        html = (tmp_path / "r.html").read_text(encoding="utf-8")
        run = json.loads((tmp_path / f"{method}.jsonl.run.json").read_text())
        assert "<h1>Kinder &amp; safer</h1>" in html
        assert f'<td class="text">{run["settings"]["method"]}</td>' in html
        assert f"<div><dt>template_hash</dt><dd>{run['settings']['template_hash']}</dd></div>" in html
        cost = run["all_runs"]["cost_usd"]
        assert f"${cost:,.4f}" in html
        assert f"${1000 * cost / run['statuses']['ok']:,.2f}" in html
        head = html[html.index("<th scope") : html.index("Only <i>ok</i>")]
        counts = [run["rows"], *(run["statuses"][status] for status in ("ok", "unparsed", "refused", "error"))]
        assert [int(n) for n in re.findall(r"<td(?: class=\"none\")?>(\d+)</td>", head)] == counts
        assert ('id="principle-table"' in html) == (method == "critique")
        assert str(tmp_path) not in html


def test_failures_come_first_and_the_page_says_what_is_left_out(page: Callable[..., Any]) -> None:
    html, data = page(planted(), max_rows=10)
    missing = {"bad", *(f"cut-{n}" for n in range(3)), *(f"refused-{n}" for n in range(2))}
    assert missing <= {row["id"] for row in data["rows"]}
    said = re.sub(r"<[^>]+>|\s+", " ", html[html.index('id="cut"') : html.index('id="filters"')])
    assert "10 of 30 rows are listed" in said
    assert "6 of the 6 without a final revision, and 4 of the 24 others" in said
    assert page(planted())[0] == page(planted())[0]


def test_odd_rows_make_a_page_too(page: Callable[..., Any]) -> None:
    html, data = page([revised(str(n), None, [], prompt=None, id=n) for n in range(2)])
    assert "No row has a round of revision." in html
    assert "no run file: tokens are counted from the rounds" in html
    assert (data["rows"][0]["id"], data["rows"][0]["rounds"], data["rows"][0]["change"]) == ("0", [], None)
    messages = [{"role": "user", "content": "Hi"}]
    html, data = page([revised("a", "Yes.", [failed(1, None, "error", "", error="too long")], prompt=messages, revisions=None)])
    assert data["rows"][0]["prompt"] == "Hi"
    html, data = page([revised("a", "Yes.", [failed(1, None, "error", "", critique=None, error="too long")])])
    assert "changed 0, declines 0, unchanged 0, failed 1" in html
    assert "<b>Change.</b>" not in html
    assert data["principles"] == []


# ---------------------------------------------------------------- hostile texts


def hostile() -> Row:
    rounds = [
        made(1, HOSTILE, "plain " + HOSTILE, critique=HOSTILE, unchanged=True, refusal=True),
        failed(2, HOSTILE, "unparsed", "raw " + HOSTILE, critique=HOSTILE, error=HOSTILE),
    ]
    return revised("hostile", HOSTILE, rounds, prompt=HOSTILE, error=HOSTILE)


def test_texts_cannot_become_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    out = write_jsonl(tmp_path / "out<img src=x>&$x$.jsonl", [*planted(), hostile()])
    run = {"settings": {"method": HOSTILE, "constitution": {"constitution": HOSTILE}, HOSTILE: HOSTILE}, "notes": [HOSTILE]}
    (tmp_path / (out.name + ".run.json")).write_text(json.dumps(run))
    write_report([str(out)], tmp_path / "r.html", title=HOSTILE)
    html = (tmp_path / "r.html").read_bytes().decode()
    data = data_of(html)
    last = data["rows"][-1]
    assert (last["prompt"], last["response"], last["error"]) == (HOSTILE, HOSTILE, HOSTILE)
    assert last["rounds"][0][1:4] == [HOSTILE, HOSTILE, "plain " + HOSTILE]
    parser = Elements()
    parser.feed(html)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 2
    assert not {"img", "link", "iframe", "object", "image", "foreignobject"} & set(tags)
    for _, attributes in parser.found:
        assert not {"src", "style", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
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

    def refused(expected: str, *outs: str, **options: Any) -> None:
        with pytest.raises(UsageError, match=expected) as error:
            write_report(outs, html, **options)
        assert "\n" not in str(error.value)
        assert not html.exists()

    def changed(name: str, **changes: Any) -> str:
        return str(write_jsonl(tmp_path / name, [{**row, **(changes if n == 1 else {})} for n, row in enumerate(planted())]))

    def changed_round(name: str, **changes: Any) -> str:
        return changed(name, revisions=[{**planted()[1]["revisions"][0], **changes}])

    other = str(write_jsonl(tmp_path / "labelled.jsonl", [labelled(n, 0.9, "a") for n in range(3)]))
    for outs in ((good, other), (other, good)):
        refused("good.jsonl is an output of `rlaif revise`, .*labelled.jsonl is not", *outs)
    refused("a report takes one of them", good, changed("second.jsonl"))
    refused("--human goes with labelled files; .*good.jsonl is an output of `rlaif revise`", good, human="human")
    refused("--human-values goes with labelled files", good, values={"0": "a"})
    refused("id.jsonl: row 2, column 'id': True", changed("id.jsonl", id=True))
    refused("status.jsonl: row 2, column 'status': 'fine' is none of", changed("status.jsonl", status="fine"))
    refused("tie.jsonl: row 2, column 'status': 'tie'", changed("tie.jsonl", status="tie"))
    refused("revised.jsonl: row 2, column 'revised'", changed("revised.jsonl", revised=3))
    for n, wrong in enumerate(("two", ["two"], [{"round": 1}])):
        refused(
            f"list{n}.jsonl: row 2, column 'revisions': expected a list of rounds", changed(f"list{n}.jsonl", revisions=wrong)
        )
    odd: list[Row] = [{"revision": None}, {"unchanged": None}, {"principle": 3}, {"status": "good"}, {"completion_tokens": "9"}]
    for n, changes in enumerate(odd):
        refused(f"round{n}.jsonl: row 2, column 'revisions'", changed_round(f"round{n}.jsonl", **changes))
    rows = planted()
    del rows[1]["revised"]
    refused("short.jsonl line 2: no column 'revised'", str(write_jsonl(tmp_path / "short.jsonl", rows)))
    done = cli("report", good, "-o", html, "--human", "human")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# ---------------------------------------------------------------- in a browser


def test_the_list_of_rows_in_a_browser(tmp_path: Path, browser: Any) -> None:
    out = write_jsonl(tmp_path / "out.jsonl", [*planted(), hostile()])
    write_report([str(out)], tmp_path / "r.html")
    browser.get((tmp_path / "r.html").as_uri())
    shown = Shown(browser)
    assert shown.count() == 31
    assert len(shown.all("#list tr.row")) == 25
    check_filters(shown)
    check_an_opened_row(shown)
    check_failed_rows(shown)
    check_a_hostile_row(shown)
    ids = [element.get_attribute("id") for element in shown.all("body [id]:not(svg *)")]
    assert len(ids) == len(set(ids))
    assert browser.get_log("browser") == []


def check_filters(shown: Shown) -> None:
    statuses = ("ok", "unparsed", "refused", "error", "")
    assert [shown.choose("status", value) for value in statuses] == [24, 4, 2, 1, 31]
    assert [shown.choose("revision", value) for value in ("unchanged", "refusal", "neither", "")] == [10, 5, 18, 31]
    assert [shown.choose("principle", value) for value in ("kind", "safe", "")] == [29, 29, 31]
    shown.choose("principle", "kind")
    assert [shown.choose("revision", value) for value in ("unchanged", "refusal", "")] == [6, 4, 29]  # in rounds of `kind`
    shown.choose("principle", "safe")
    assert [shown.choose("revision", value) for value in ("unchanged", "refusal", "")] == [3, 4, 29]
    assert shown.choose("status", "refused") == 2
    assert [row.text.split()[0] for row in shown.all("#list tr.row")] == ["refused-0", "refused-1"]
    shown.choose("status", "")
    shown.choose("principle", "")
    shown.search("ZEBRAS", 3)
    shown.search("giraffes", 2)
    clear_search(shown)
    shown.choose("order", "most")
    assert shown.one("#list tr.row").text.startswith("no-0")
    shown.choose("order", "least")
    assert shown.one("#list tr.row").text.startswith("both")
    shown.choose("order", "")


def check_an_opened_row(shown: Shown) -> None:
    from selenium.webdriver.common.keys import Keys

    button = shown.one("#list tr.row button")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    left, right = shown.all(".detail > div > .pair pre")
    assert left.location["y"] == right.location["y"]
    assert left.location["x"] + left.size["width"] <= right.location["x"]
    assert (left.text, right.text) == (FIRST, THIRD)
    assert [mark.text for mark in shown.all(".before mark")] == ["Jump", "deep", ", you fool"]
    assert [mark.text for mark in shown.all(".detail > div > .pair .after mark")] == ["Begin", "shallow"]
    first, second = shown.all(".round")
    assert [part.text for part in inside(first, "h4, h5")] == [
        "Round 1 kind ok 0.267 changed, 10 tokens written",
        "Critique",
        "Revision",
    ]
    assert [part.text for part in inside(first, "pre")] == ["Round 1 could be kinder.", SECOND]
    assert [part.text for part in inside(first, "mark")] == ["Begin", "shallow"]
    gone = [part.get_attribute("title") for part in inside(first, "del")]
    assert gone == ["left out: Jump", "left out: deep"]
    assert inside(second, "h4")[0].text.startswith("Round 2 safe ok")
    assert inside(second, ".revision pre")[0].text == THIRD
    assert not inside(second, "mark")
    assert [part.get_attribute("title") for part in inside(second, "del")] == ["left out: you fool,"]
    button.send_keys(Keys.ENTER)
    assert not shown.all(".detail")


def clear_search(shown: Shown) -> None:
    from selenium.webdriver.common.keys import Keys

    shown.one("#search").send_keys(Keys.BACKSPACE * 20)
    shown.search("", 31)


def find(shown: Shown, text: str, first: str) -> None:
    """Search, and wait for this row to be the first that is found."""
    from selenium.webdriver.support.ui import WebDriverWait

    shown.one("#search").clear()
    shown.one("#search").send_keys(text)
    script = "return document.querySelector('#list tr.row button')?.textContent"
    WebDriverWait(shown.driver, 10).until(lambda _: shown.driver.execute_script(script) == first)


def inside(element: Any, selector: str) -> list[Any]:
    found: list[Any] = element.find_elements("css selector", selector)
    return found


def check_failed_rows(shown: Shown) -> None:
    for name, count, titles, texts in (
        ("cut", 3, ["Critique, which failed: raw text"], ["Zebras are"]),
        ("refused", 2, ["Critique", "Revision, which failed: raw text"], ["Round 2 could be kinder.", "Giraffes forbid it."]),
    ):
        find(shown, f"{name}-", f"{name}-0")
        assert shown.count() == count
        shown.one("#list tr.row").click()
        assert shown.all(".detail h4")[2].text.startswith("No final revision: ")
        assert not shown.all(".before mark")
        second = shown.all(".round")[1]
        assert [part.text for part in inside(second, "h5")] == titles
        assert [part.text for part in inside(second, "pre")] == texts
        assert len(inside(second, "h4 .failed")) == 1
        shown.one("#list tr.row").click()
    find(shown, "does both", "both")
    assert [tag.text for tag in shown.all("#list tr.row .tag")] == ["unchanged", "declines"]
    find(shown, "expected text, got null", "bad")
    shown.one("#list tr.row").click()
    assert "No round is stored." in shown.one(".detail").text


def check_a_hostile_row(shown: Shown) -> None:
    find(shown, "hostile", "hostile")
    shown.one("#list tr.row").click()
    text = "<script>window.ran = 1</script></script><img src=x onerror='window.ran = 2'><!--"
    for selector in (".detail pre", ".before pre", ".critique pre", ".revision pre", ".raw pre", ".principle", ".failed.text"):
        assert text in shown.one(selector).text
    assert "&lt;b&gt;" in shown.one(".revision pre").text
    assert [mark.text for mark in shown.all(".revision mark")] == ["plain"]
    assert shown.driver.execute_script("return window.ran") is None
    assert not shown.all("img")
    assert len(shown.all("script")) == 2
