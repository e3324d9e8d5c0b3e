"""Cards tell what a run did, as it did it; what is pushed is exactly that, and nothing where a secret or a path is in it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rlaif.pipeline.cards import SECTION, bare, with_section
from rlaif.pipeline.publish import PICKLES, Parcel, check
from rlaif.pipeline.scan import SHORTEST, Found, Scanner, of_environment
from rlaif.records import FatalError, RlaifError, UsageError
from rlaif.show import SAMPLES
from tests.conftest import in_process, make_rows, read_jsonl, write_jsonl
from tests.engines.tiny import save_tiny
from tests.pipeline.hub import Hub

TOKEN = "hf_" + "Ab1" * 10

PIPELINE = """
description: "Of | <b>us</b> in /srv/secret/place"
settings: {judge: judge.yaml, policy: ./tiny}
steps:
  sample: sample rows.jsonl -o sampled.jsonl --engine mock --n 3 --limit 8
  rank: rank sampled.jsonl -o ranked.jsonl --labeler ${judge}
  pairs: pairs ranked.jsonl -o train.jsonl --min-confidence 0.6
  measure: label rows.jsonl -o measured.jsonl --labeler ${judge} --both-orders
  agreement: align measured.jsonl --human human -o agreement.json
  other: label rows.jsonl -o other.jsonl --engine mock -E k=9
  more: pairs other.jsonl -o more.parquet
  dpo: train dpo dpo -o dpo --set model=${policy} --set data=train.jsonl --set max_steps=1 --set eval_share=0
    --set max_length=256 --set device=cpu --set precompute=false
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline that has run in `out`."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b"} for row in make_rows(20)]
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "judge.yaml").write_text("engine: mock\noptions: {k: 2}\n", encoding="utf-8")
    (folder / "pipe.yaml").write_text(PIPELINE, encoding="utf-8")
    save_tiny(folder / "tiny")
    in_process("run", folder / "pipe.yaml", "-o", folder / "out")
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made" / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield running


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


# ------------------------------------------------------------ cards


def test_a_models_card_tells_its_steps_labelers_and_cost_and_twice_gives_the_same(out: Path) -> None:
    path = out / "dpo" / "model" / "README.md"
    before = path.read_text(encoding="utf-8")
    assert str(path) in in_process("card", out)
    card = path.read_text(encoding="utf-8")
    assert card.startswith(before.rstrip())
    found = SECTION.findall(card)
    assert len(found) == 1
    told = json.loads((out / "lineage.json").read_text(encoding="utf-8"))["steps"]
    for step in ("sample", "rank", "pairs", "dpo"):
        assert f"| {step} | rlaif {told[step]['words'][0]} " in found[0]
        assert all(sha in found[0] for sha in told[step]["outputs"].values())
        assert all(own["sha256"] in found[0] for own in told[step]["inputs"].values())
    assert "| other |" not in found[0]
    assert "rows.jsonl | from outside |" in found[0]
    accuracy = told["agreement"]["agreement"][0]["metrics"]["accuracy"]
    assert f"| accuracy | {accuracy['value']:.4g} |" in found[0]
    assert "(column human, rows of measured.jsonl)" in found[0]
    assert "was not measured" not in found[0]
    assert "| sample | planted (mock) | sample |" in found[0]
    assert "| rank | planted (mock)" not in found[0]
    calls = told["sample"]["usage"]["calls"] + told["rank"]["usage"]["calls"]
    assert f"| in all | {calls} |" in found[0]
    in_process("card", out)
    assert path.read_text(encoding="utf-8") == card


def test_no_card_tells_where_a_file_stands(out: Path, made: Path) -> None:
    in_process("card", out)
    for path in (out / "dpo" / "model" / "README.md", *out.glob("cards/*/README.md")):
        own = "".join(SECTION.findall(path.read_text(encoding="utf-8")))
        assert own
        assert "../" not in own
        assert made.name not in own
        assert tempfile.gettempdir() not in own


def test_a_training_sets_card_is_the_hubs_and_tells_rows_columns_and_what_was_left_out(out: Path) -> None:
    in_process("card", out)
    card = (out / "cards" / "train" / "README.md").read_text(encoding="utf-8")
    rows = read_jsonl(out / "train.jsonl")
    assert front(card) == {
        "tags": ["rlaif", "trl", "synthetic", "preference"],
        "size_categories": ["n<1K"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}],
    }
    run = json.loads((out / "train.jsonl.run.json").read_text(encoding="utf-8"))
    assert run["left_out"]["below the minimum confidence"] + len(rows) == 8 * 3
    assert f"| below the minimum confidence | {run['left_out']['below the minimum confidence']} |" in card
    assert f"{len(rows)} rows, made from 8." in card
    for column in rows[0]:
        assert re.search(rf"^\| {column} \| (text|a number) \|  \|$", card, re.MULTILINE)
    assert "| dpo |" not in card
    assert "<b>" not in card
    assert "/srv" not in card


def test_the_other_set_says_that_its_labeler_was_not_measured(out: Path) -> None:
    in_process("card", out)
    card = (out / "cards" / "more" / "README.md").read_text(encoding="utf-8")
    assert "Its agreement with humans was not measured." in card
    assert "accuracy" not in card
    assert "more.parquet" in card


def test_a_labeler_measured_with_other_knobs_is_told_apart(out: Path) -> None:
    told = json.loads((out / "lineage.json").read_text(encoding="utf-8"))
    told["steps"]["measure"]["asked"][0]["both_orders"] = False
    (out / "lineage.json").write_text(json.dumps(told), encoding="utf-8")
    in_process("card", out)
    assert "**with another template or other knobs**" in (out / "cards" / "train" / "README.md").read_text(encoding="utf-8")


def test_what_has_changed_since_gets_no_card(out: Path) -> None:
    rows = read_jsonl(out / "train.jsonl")
    write_jsonl(out / "train.jsonl", rows[1:])
    with pytest.raises(UsageError, match=r"train\.jsonl: has changed since it was made"):
        in_process("card", out)


def test_a_model_whose_data_was_made_anew_since_gets_no_card(out: Path) -> None:
    told = json.loads((out / "lineage.json").read_text(encoding="utf-8"))
    told["steps"]["pairs"]["inputs"]["ranked.jsonl"]["sha256"] = "0" * 64
    (out / "lineage.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(UsageError, match=r"ranked\.jsonl was made anew since"):
        in_process("card", out)


def test_a_run_that_made_nothing_to_publish_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pipeline has run there"):
        in_process("card", tmp_path)
    (tmp_path / "p.yaml").write_text("steps: {one: sample rows.jsonl -o s.jsonl --engine mock}\n", encoding="utf-8")
    write_jsonl(tmp_path / "rows.jsonl", make_rows(2))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi?"}\n', encoding="utf-8")
    in_process("run", tmp_path / "p.yaml", "-o", tmp_path / "out")
    with pytest.raises(UsageError, match="no training set and no model has been made"):
        in_process("card", tmp_path / "out")
    with pytest.raises(UsageError, match="no training set or model of this run"):
        in_process("push", tmp_path / "out", "me/x")


def test_the_section_is_put_in_place_of_the_one_that_is_there() -> None:
    card = "# T\n\n## Lineage\n\nold\n\n### Labelers\n\nold\n\n## Use\n\nmine\n"
    assert with_section(card, "## Lineage\n\nnew") == "# T\n\n## Lineage\n\nnew\n\n## Use\n\nmine\n"
    assert with_section("# T\n", "## Lineage\n\nnew") == "# T\n\n## Lineage\n\nnew\n"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("../../work/a/rows.jsonl", "rows.jsonl"),
        ("--set=data=../x", "--set=data=x"),
        ("a/../b", "a/../b"),
        ("dpo/model", "dpo/model"),
    ],
)
def test_files_from_outside_are_told_by_their_last_name(word: str, name: str) -> None:
    assert bare(word) == name


# ------------------------------------------------------------ pushing


def test_a_model_arrives_as_it_is_with_its_card(out: Path, hub: Hub) -> None:
    said = in_process("push", out, "me/mine")
    model = {path.name: path.read_bytes() for path in (out / "dpo" / "model").iterdir()}
    assert hub.repos == {"me/mine": {"kind": "model", "private": True, "files": model}}
    assert b"## Lineage" in model["README.md"]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(model)
    assert all(token == f"Bearer {TOKEN}" for _, path, token in hub.asked if path.startswith("/api/repos"))
    assert TOKEN not in said
    assert "private" in said
    assert TOKEN.encode() not in hub.sent
    assert not any(TOKEN in path.read_text("utf-8", "replace") for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("file", ["train.jsonl", "more.parquet"])
def test_a_training_set_arrives_with_its_card(out: Path, hub: Hub, file: str) -> None:
    said = in_process("push", out, "me/rows", "--file", file, "--public")
    name = Path(file).name
    files = hub.repos["me/rows"]["files"]
    assert hub.repos["me/rows"]["kind"] == "dataset"
    assert hub.repos["me/rows"]["private"] is False
    assert "public" in said
    assert set(files) == {"README.md", name}
    assert files[name] == (out / file).read_bytes()
    assert front(files["README.md"].decode())["configs"][0]["data_files"] == [{"split": "train", "path": name}]


@pytest.mark.parametrize("file", ["dpo", "dpo/model"])
def test_another_model_is_chosen_by_its_folder(out: Path, hub: Hub, file: str) -> None:
    in_process("push", out, "me/mine", "--file", str(out / file))
    assert "config.json" in hub.repos["me/mine"]["files"]


@pytest.mark.parametrize("file", ["ranked.jsonl", "../rows.jsonl", "dpo/run.json", "none"])
def test_what_is_no_training_set_and_no_model_is_not_pushed(out: Path, hub: Hub, file: str) -> None:
    with pytest.raises(UsageError, match=r"no training set or model of this run; there are: train\.jsonl, more\.parquet, dpo"):
        in_process("push", out, "me/mine", "--file", file)
    assert hub.asked == []


def test_nothing_is_sent_where_a_card_holds_a_secret(out: Path, hub: Hub) -> None:
    card = out / "dpo" / "model" / "README.md"
    in_process("card", out)
    lines = len(card.read_text(encoding="utf-8").splitlines())
    own = card.read_text(encoding="utf-8").replace("## Lineage", f"Mine: {TOKEN}.\n\n## Lineage")
    card.write_text(own, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        in_process("push", out, "me/mine")
    line = own.splitlines().index(f"Mine: {TOKEN}.") + 1
    assert f"README.md line {line}: a token of the hub (hf_…)" in str(error.value)
    assert line < lines
    assert TOKEN not in str(error.value)
    assert hub.asked == []


def test_nothing_is_sent_where_rows_hold_a_value_of_the_environment(
    out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_jsonl(out / "train.jsonl")
    value = rows[3]["chosen"][-12:]
    monkeypatch.setenv("MY_DB_PASSWORD", value)
    first = next(n for n, row in enumerate(rows, 1) if value in json.dumps(row))
    with pytest.raises(UsageError, match=rf"train\.jsonl line {first}: the value of MY_DB_PASSWORD") as error:
        in_process("push", out, "me/mine", "--file", "train.jsonl")
    assert value not in str(error.value)
    assert hub.asked == []
    in_process("push", out, "me/mine", "--file", "train.jsonl", "--allow", value)
    assert "train.jsonl" in hub.repos["me/mine"]["files"]


def test_nothing_is_sent_where_a_card_holds_a_path(out: Path, hub: Hub) -> None:
    card = out / "dpo" / "model" / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nIt stands in /srv/models/x.\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"README\.md line \d+: an absolute path: /srv/models/x"):
        in_process("push", out, "me/mine")
    assert hub.asked == []
    in_process("push", out, "me/mine", "--allow", "/srv/models/x.")


def test_a_private_push_never_goes_to_a_public_repository(out: Path, hub: Hub) -> None:
    hub.repos["me/mine"] = {"kind": "model", "private": False, "files": {}}
    with pytest.raises(UsageError, match="me/mine is there already, and public"):
        in_process("push", out, "me/mine")
    assert hub.repos["me/mine"]["files"] == {}
    assert b"tokenizer" not in hub.sent
    in_process("push", out, "me/mine", "--public")
    assert "config.json" in hub.repos["me/mine"]["files"]


def test_what_the_hub_refuses_is_told_without_the_token(out: Path, hub: Hub) -> None:
    hub.refuse = True
    with pytest.raises(FatalError, match=r"me/mine: the hub does not take it: .*403") as error:
        in_process("push", out, "me/mine")
    assert TOKEN not in str(error.value)


def test_a_name_that_is_none_is_a_usage_error(out: Path, hub: Hub) -> None:
    with pytest.raises(UsageError, match="no name for the hub"):
        in_process("push", out, "a/b/c")
    assert hub.asked == []


# ------------------------------------------------------------ what is looked for


def scanned(folder: Path, name: str, content: bytes | str, scanner: Scanner | None = None) -> list[Found]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list((scanner or Scanner({}, ())).file(path, name))


@pytest.mark.parametrize("suffix", [*PICKLES, ".store", ".log", ".db", ".zip", ""])
def test_pickles_stores_and_logs_are_not_pushed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(UsageError, match="not pushed: " + ("a pickle" if suffix in PICKLES else "it belongs to no model")):
        check(Parcel("model", {path.name: path}), Scanner({}, ()))


def test_links_and_hidden_files_are_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    for name, path in (("b.json", "b.json"), (".a.json", "a.json"), ("x/.cache/a.json", "a.json")):
        with pytest.raises(UsageError, match="a link or a hidden file"):
            check(Parcel("model", {name: tmp_path / path}), Scanner({}, ()))
    check(Parcel("model", {"a.json": tmp_path / "a.json"}), Scanner({}, ()))


ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def token(head: str, least: int, alphabet: str = ALNUM, tail: str = "aZ9") -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=least, max_size=least + 30).map(lambda text: head + text + tail)


JWT_PART = token("eyJ", 10, ALNUM + "-_")
SECRET = st.one_of(
    token("sk-", 20),
    token("sk-proj-", 20, ALNUM + "-_"),
    token("hf_", 30),
    token("ghp_", 36),
    token("github_pat_", 40, ALNUM + "_"),
    st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=16, max_size=16).map("AKIA".__add__),
    token("AIza", 32, ALNUM + "-_"),
    token("xoxb-", 20, ALNUM + "-"),
    token("xoxp-", 20, ALNUM + "-"),
    token("Bearer ", 16, ALNUM + "-._~+/"),
    st.tuples(JWT_PART, JWT_PART, token("", 10)).map(".".join),
    st.sampled_from(["", "RSA ", "EC ", "OPENSSH "]).map(lambda kind: f"-----BEGIN {kind}PRIVATE KEY-----\nMIIEow\n"),
)
AROUND = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
MINE = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=SHORTEST, max_size=30)


def jsonl(text: str) -> bytes:
    return f'{{"id": "0"}}\n{json.dumps({"id": "1", "prompt": [{"role": "user", "content": text}]})}\n'.encode()


def as_json(text: str) -> bytes:
    return json.dumps({"a": {text: [text]}}, indent=2, ensure_ascii=False).encode()


def as_gzip(text: str) -> bytes:
    return gzip.compress(jsonl(text))


def as_parquet(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ["0", "1"], "more": [None, [{"text": text}]]}), sink)
    return bytes(sink.getvalue())


def as_schema(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ["0"]}).replace_schema_metadata({"note": text}), sink)
    return bytes(sink.getvalue())


def as_weights(text: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file({"w": torch.zeros(2)}, Path(folder) / "w", metadata={"note": text})
        return (Path(folder) / "w").read_bytes()


FILES: list[tuple[str, Callable[[str], bytes]]] = [
    ("README.md", str.encode),
    (
        "README.md",
        lambda text: "".join(f"&#{ord(char)};" if char.isascii() and not char.isalnum() else char for char in text).encode(),
    ),
    ("merges.txt", str.encode),
    ("chat_template.jinja", str.encode),
    ("code.py", str.encode),
    ("tokenizer.model", lambda text: b"\x0a\xff\x00" + text.encode() + b"\xff"),
    ("tokenizer.json", as_json),
    ("config.json", as_json),
    ("train.jsonl", jsonl),
    ("train.jsonl.gz", as_gzip),
    ("train.parquet", as_parquet),
    ("model.safetensors", as_weights),
]


@pytest.mark.parametrize(("name", "written"), FILES)
@settings(max_examples=60, deadline=None)
@given(before=AROUND, secret=SECRET, after=AROUND)
def test_a_planted_secret_is_found_wherever_it_stands(
    tmp_path_factory: pytest.TempPathFactory, name: str, written: Callable[[str], bytes], before: str, secret: str, after: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = scanned(Path(folder), name, written(before + secret + after))
    assert any(own.secret for own in found)
    for own in found:
        assert secret.strip() not in str(own)


@pytest.mark.parametrize(("name", "written"), [*FILES[:5], *FILES[6:]])
@settings(max_examples=40, deadline=None)
@given(before=AROUND, value=MINE, after=AROUND)
@example("", 'p"a\\ss<w>&amp;😀', "")
def test_a_value_of_the_environment_is_found_wherever_it_stands(
    tmp_path_factory: pytest.TempPathFactory, name: str, written: Callable[[str], bytes], before: str, value: str, after: str
) -> None:
    assume(value not in name)  # a file that is named so is another test's
    with tempfile.TemporaryDirectory() as folder:
        scanner = Scanner({value: "the value of X_KEY"}, ())
        found = scanned(Path(folder), name, written(before + value + after), scanner)
    assert any(own.kind == "the value of X_KEY" for own in found)
    assert value not in scanner.masked(f"the hub said {value}")


def test_secrets_in_a_parquet_files_schema_and_in_a_files_name_are_found(tmp_path: Path) -> None:
    assert scanned(tmp_path, "train.parquet", as_schema(TOKEN))
    mine = "it's \\ mine \"é"
    assert scanned(tmp_path, "train.parquet", as_schema(mine), Scanner({mine: "the value of X_KEY"}, ()))
    with pytest.raises(UsageError, match="a file is named as a secret") as error:
        scanned(tmp_path, f"{TOKEN}.json", "{}")
    assert TOKEN not in str(error.value)


def test_the_environments_secrets_are_those_that_are_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_token_B", "first line of it\n  second line of it ")
    monkeypatch.setenv("SOME_KEY", "short")
    monkeypatch.setenv("OTHER", "something else")
    found = of_environment(the_hub_token="from the login")
    assert found["first line of it"] == found["second line of it"] == "the value of A_token_B"
    assert found["from the login"] == "the value of the hub token"
    assert not {"short", "something else"} & set(found)


def test_a_file_that_is_no_text_is_refused_rather_than_passed(tmp_path: Path) -> None:
    for content in (f'{{"a": "{TOKEN}"}}'.encode("utf-16"), f'{{"a": "{TOKEN}"}}'.encode("utf-16-le"), b"\xff\xfe"):
        with pytest.raises(UsageError, match="is no text in UTF-8"):
            scanned(tmp_path, "train.jsonl", content)
    with pytest.raises(UsageError, match="is no safetensors file"):
        scanned(tmp_path, "w.safetensors", b"\xff" * 20)


PEOPLES = [
    "/home/ann/x",
    "/Users/ann",
    "C:\\Users\\ann\\x",
    "c:/users/ann",
    "/mnt/c/Users/ann",
    "/root/x",
    "/root",
    "file:///home/ann",
]
PLACES = ["/work/of/mine", "/tmp", "D:\\my\\place"]


@pytest.mark.parametrize("path", [*PEOPLES, "/work/of/mine/x", "x/work/of/mine", "/tmp/x", "D:\\my\\place\\x"])
@pytest.mark.parametrize("name", ["train.jsonl", "README.md", "config.json", "chat_template.jinja", "train.parquet"])
def test_places_of_people_and_of_this_machine_are_found_in_rows_and_metadata(tmp_path: Path, path: str, name: str) -> None:
    written: dict[str, Callable[[str], bytes]] = {"train.jsonl": jsonl, "config.json": as_json, "train.parquet": as_parquet}
    for text in (path, f"see {path}, then", f"x={path}"):
        found = scanned(tmp_path, name, written.get(name, str.encode)(text), Scanner({}, PLACES))
        assert found, text
        assert not scanned(
            tmp_path, name, written.get(name, str.encode)(text), Scanner({}, PLACES, frozenset(own.text for own in found))
        )


@pytest.mark.parametrize("path", ["/data/x", "/data", "file:///data/x", "E:\\models\\x", "/opt/a b/c", "/srv/x.jsonl"])
@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer_config.json", "x.yaml"])
def test_any_absolute_path_is_found_in_metadata_alone(tmp_path: Path, path: str, name: str) -> None:
    for text in (path, f"see {path}, then", f"model={path}"):
        assert scanned(tmp_path, name, as_json(text) if name.endswith(".json") else text), text
        assert not scanned(tmp_path, "train.jsonl", jsonl(text))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "https://host/home-page/x",
            "and/or",
            "a </s> b",
            "[INST] x [/INST]",
            "<think>\n</think>",
            "../tmp/x",
            "5 tokens / s",
            "~/x",
        ),
        *(
            "https://host.org/tmp/x",
            "</root>",
            "org/model",
            "km/h",
            "1/2/3",
            "A:\nB",
            "risk-adjusted-return-on-capital-employed",
        ),
        *(
            "task-oriented-dialogue-systems-2024",
            "a bearer of bad news",
            "the shelf_life",
            "eyJust a word",
            "2024/05/06",
            "Q: why\\n",
        ),
        *("/rooted", "x/home/y", "the /tmpfs"),
    ],
)
def test_what_is_none_is_let_pass(tmp_path: Path, text: str) -> None:
    scanner = Scanner({}, ["/tmp", "/work"])
    assert not scanned(tmp_path, "train.jsonl", jsonl(text), scanner)
    if not text.startswith("/") and "/tmpfs" not in text:
        assert not scanned(tmp_path, "README.md", text, scanner)
        assert not scanned(tmp_path, "tokenizer_config.json", as_json(text), scanner)


def test_words_of_a_vocabulary_are_no_places_but_paths_are(tmp_path: Path) -> None:
    scanner = Scanner({}, PLACES)
    words = json.dumps({"model": {"vocab": {"/tmp": 1, "/tmp/": 2, "/root": 3, "/home/ann": 4, "/usr/bin": 5, "</s>": 6}}})
    assert not scanned(tmp_path, "tokenizer.json", words, scanner)
    assert scanned(tmp_path, "tokenizer.json", words.replace("/usr/bin", "/tmp/made/x"), scanner)


def test_shipped_rows_and_a_real_tokenizer_pass(tmp_path: Path) -> None:
    scanner = Scanner({}, PLACES)
    assert {own.text for own in scanner.file(SAMPLES, SAMPLES.name)} <= {"/tmp"}
    model = save_tiny(tmp_path / "tiny")
    for path in model.iterdir():
        assert list(scanner.file(path, path.name)) == []


def test_a_path_with_a_secret_in_it_is_not_told(tmp_path: Path) -> None:
    found = scanned(tmp_path, "config.json", as_json(f"/home/ann/{TOKEN}/x"))
    assert len(found) >= 2
    assert not any(TOKEN in str(own) for own in found)


def test_errors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(jsonl(f"/home/ann{n}") for n in range(9)))
    with pytest.raises(RlaifError, match="and 4 more") as error:
        check(Parcel("dataset", {path.name: path}), Scanner({}, ()))
    assert "\n" not in str(error.value)
