"""Real vLLM, over HTTP and in-process, against the transformers engine: the same rows, the same soft labels.

vLLM is installed by `make proof-vllm` only, in an environment of its own; elsewhere this is skipped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SHARED, clean_env, cli, read_jsonl, shared_rows, write_jsonl

pytest.importorskip("vllm", reason="needs real vLLM: make proof-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

ROWS = 200
NEAR = 0.02
FLOAT32_HEAD = ("--hf-overrides", '{"head_dtype": "float32"}')
ROUNDED = "openai with bf16 logits"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real comparisons where they stand beside the checkout, else the sample set."""
    path = tmp_path_factory.mktemp("vllm") / "data.jsonl"
    if not (SHARED / "pandalm_test.jsonl.gz").exists():
        return write_jsonl(path, read_jsonl(Path(__file__).parents[1] / "rlaif" / "samples" / "comparisons.jsonl"))
    texts = ("prompt", "response_a", "response_b")
    rows = [
        row
        for row in shared_rows("pandalm_test.jsonl.gz")
        if all(isinstance(row[name], str) and row[name].strip() for name in texts) and row["response_a"] != row["response_b"]
    ]
    return write_jsonl(path, rows[:: len(rows) // ROWS][:ROWS])


@pytest.fixture(scope="module")
def model() -> str:
    from rlaif.engines.embedded import embedded_model

    return str(embedded_model())


@contextmanager
def vllm_server(model: str, *options: str) -> Iterator[str]:
    """vLLM's own server on a free port of loopback; gives its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "smollm2"]
    command += [
        "--dtype",
        "bfloat16",
        "--enforce-eager",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "8192",
        *options,
    ]
    env = clean_env({"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING"})
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 400
    while time.monotonic() < until:
        assert process.poll() is None, "vLLM's server ended"
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("vLLM's server did not come up")


def label(data: Path, name: str, *options: str) -> list[dict[str, Any]]:
    out = data.parent / f"{name}.jsonl"
    done = cli("label", data, "-o", out, "--template", "helpful-detailed", *options, timeout=1200)
    assert done.returncode == 0, done.stderr
    return read_jsonl(out)


def test_soft_labels_over_http_in_vllm_and_in_transformers_agree(data: Path, model: str) -> None:
    """All in bf16, the last layer in float32, as the two in-process engines have it.

    A server that computes the last layer in bf16 too, as vLLM does unless told, is measured beside them: its logits come in
    steps of 1/16 and, from 16 up, of 1/8, which alone moves a soft label by up to .03. Nothing is asserted of that one.
    """
    made = {}
    for name, options in (("openai", FLOAT32_HEAD), (ROUNDED, ())):
        with vllm_server(model, *options) as url:
            made[name] = label(data, name.replace(" ", "-"), "--engine", "openai", "--base-url", url)
    made |= {
        "vllm": label(data, "vllm", "--engine", "vllm", "--model", model),
        "transformers": label(data, "transformers", "--engine", "transformers", "--model", model, "-E", "dtype=bf16"),
    }
    soft = {name: np.array([row["soft_label"] for row in rows], dtype=float) for name, rows in made.items()}
    report = {}
    for one, other in [(a, b) for n, a in enumerate(soft) for b in list(soft)[n + 1 :]]:
        assert not np.isnan(soft[one]).any()
        gap = np.abs(soft[one] - soft[other])
        worst = int(gap.argmax())
        report[f"{one} against {other}"] = {
            "within": float((gap <= NEAR).mean()),
            "median": float(np.median(gap)),
            "p95": float(np.percentile(gap, 95)),
            "largest": float(gap[worst]),
            "why": _why(made[one][worst], made[other][worst]),
        }
    print(json.dumps(report, indent=2))
    if path := os.environ.get("PROOF_OUT"):
        Path(path).write_text(json.dumps(report, indent=2) + "\n")
    for pair, found in report.items():
        if ROUNDED not in pair:
            assert found["within"] >= 0.95, (pair, found)


def _why(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What lies behind a difference: the log-ratio of the two choices in each order, and the tokens that were read."""
    said = []
    for mine, theirs in zip(one["votes"], other["votes"], strict=True):
        ratios = [v["logprobs"]["1"] - v["logprobs"]["2"] for v in (mine, theirs)]
        tokens = "same tokens" if mine["prompt_tokens"] == theirs["prompt_tokens"] else "different prompts"
        said.append(f"{mine['order']}: log-ratio {ratios[0]:.3f} and {ratios[1]:.3f}, {tokens}")
    return "; ".join(said)
