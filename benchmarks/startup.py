"""The time that `--help` takes: ours against TRL's, by turns.

python benchmarks/startup.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    here = Path(sys.executable).parent
    times: dict[str, list[float]] = {"rlaif": [], "trl": []}
    for number in range(given.rounds + 1):
        for name, found in times.items():
            begun = time.perf_counter()
            subprocess.run([here / name, "--help"], check=True, capture_output=True)
            if number:  # the first reads the files from the disk
                found.append(time.perf_counter() - begun)
    middle = {name: statistics.median(found) for name, found in times.items()}
    share = middle["rlaif"] / middle["trl"]
    print(f"rlaif --help {middle['rlaif']:.3f} s, trl --help {middle['trl']:.3f} s: {share:.3f} of it")
    if given.json:
        given.json.write_text(json.dumps({"seconds": middle, "share": share, "rounds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
