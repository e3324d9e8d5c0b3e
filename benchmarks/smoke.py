"""Run every shipped recipe in its smoke size on the embedded model, and tell how long each took.

    python benchmarks/smoke.py --out smoke --json benchmarks/smoke.json

Recipes that are done are not run again. The seconds are those of the steps, each with the loading of what it needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlaif.pipeline.lineage import Lineage
from rlaif.pipeline.status import total
from rlaif.yamlfile import listed


def main(
    out: Annotated[Path, typer.Option(help="The folder of the runs.")],
    table: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="These recipes alone.")] = None,
) -> None:
    """Run the recipes; exit code 1 where one failed, after the others."""
    figures, failed = {}, []
    for name in only or listed("pipelines"):
        words = [sys.executable, "-m", "rlaif.cli", "run", name, "--size", "smoke", "-o", str(out / name)]
        if subprocess.run(words).returncode:
            failed.append(name)
            continue
        lineage = Lineage.load(out / name)
        whole = total(lineage, lineage.steps)
        calls = whole["usage"]["calls"] if whole["usage"] else 0
        figures[name] = {"steps": len(lineage.steps), "calls": calls, "seconds": round(whole["seconds"])}
        if table:
            table.write_text(json.dumps(figures, indent=1) + "\n")
    print("| recipe | steps | calls | seconds |\n|---|---:|---:|---:|")
    for name, own in figures.items():
        print(f"| `{name}` | {own['steps']} | {own['calls']} | {own['seconds']} |")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    typer.run(main)
