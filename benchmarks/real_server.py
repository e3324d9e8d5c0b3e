"""Labelling through vLLM's own server on loopback against a bare aiohttp window of the same width, fresh prompts each time.

    .venv-vllm/bin/python benchmarks/real_server.py [--rows 200] [--json FILE]

The server has the embedded model. Prompts that it has seen it answers faster, so each measurement has its own; the two rivals
take turns, and change who comes first.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from over_http import bare, bodies, ours

from rlaif.engines.embedded import embedded_model


def start() -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded_model())]
    words += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    server = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    for _ in range(300):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(1)
            continue
        return server, f"http://127.0.0.1:{port}/v1"
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    server, url = start()
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    try:
        first = 10_000
        bare(url, bodies(url, given.rows, first), given.width)  # the first is slower
        for number in range(given.rounds):
            for who in sorted(times, reverse=bool(number % 2)):
                first += given.rows
                if who == "bare":
                    spent = bare(url, bodies(url, given.rows, first), given.width)
                else:
                    spent = ours(url, given.rows, given.width, first)
                times[who].append(given.rows / spent)
                print(f"round {number + 1}  {who:5} {times[who][-1]:6.2f} labels a second", flush=True)
    finally:
        server.terminate()
        server.wait(60)
    middle = {who: statistics.median(found) for who, found in times.items()}
    found = {"rows": given.rows, "width": given.width, "labels_a_second": middle, "share": middle["ours"] / middle["bare"]}
    print(f"share of the bare window's rate: {found['share']:.3f}")
    if given.json:
        given.json.write_text(json.dumps({**found, "rounds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
