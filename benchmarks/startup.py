"""The time that `--help` takes: ours against TRL's, by turns.

    python benchmarks/startup.py [--rounds 15] [--json FILE]

Twice: by the scripts that pip has installed, and by what uv and newer versions of pip write, which do not import `re` first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

MAINS = {"rlaif": "rlaif.start", "trl": "trl.cli"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    here = Path(sys.executable).parent
    bare = "import sys; sys.argv = ['x', '--help']; from {} import main; sys.exit(main())"
    ways = {
        "installed": {name: [str(here / name), "--help"] for name in MAINS},
        "bare": {name: [sys.executable, "-c", bare.format(module)] for name, module in MAINS.items()},
    }
    found = {way: compare(commands, given.rounds) for way, commands in ways.items()}
    for way, own in found.items():
        print(f"{way:10} rlaif --help {own['rlaif']:.4f} s, trl --help {own['trl']:.4f} s: {own['share']:.3f} of it")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def compare(commands: dict[str, list[str]], rounds: int) -> dict[str, float]:
    """Median seconds of each command, and our share."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if number:  # the first reads the files from the disk
                times[name].append(time.perf_counter() - begun)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {**middle, "share": middle["rlaif"] / middle["trl"]}


if __name__ == "__main__":
    main()
