"""Every shipped recipe, from its prompts to its report: with a tiny model, a mock labeler and mock answers, in smoke size."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlaif.pipeline import recipe
from rlaif.pipeline.estimate import rehearse
from rlaif.pipeline.recipe import Recipe, Value
from rlaif.pipeline.status import labelers
from rlaif.pipeline.work import Work
from rlaif.yamlfile import listed, load, shipped
from tests.conftest import write_jsonl
from tests.pipeline.conftest import Run

NAMES = listed("pipelines")
SYSTEMS = """
rlaif-distilled rlaif-direct rlaif-same-size constitutional-sl constitutional-rl constitutional-full clair-apo
instructgpt llama2 rest rest-em rs-dpo rso sdpo kto orpo simpo slic-hf grpo online-dpo nash-md bpo urial icdpo gpo discopop
context-distillation
"""


def test_all_systems_have_a_recipe() -> None:
    assert set(SYSTEMS.split()) <= set(NAMES)


def changed(settings: dict[str, Value], tiny: Path, labeler: Path) -> list[str]:
    """Settings that put a tiny model and mock answers in the place of the embedded model."""
    return [
        f"{name}={new}"
        for name, value in settings.items()
        if (new := _in_place(name, value, str(tiny), str(labeler))) is not None
    ]


def _in_place(name: str, value: Value, tiny: str, labeler: str) -> str | None:
    if not isinstance(value, str):
        return None
    if "judge" in name:
        return labeler
    return {"embedded": tiny, "transformers": "mock"}.get(value)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs_from_prompts_to_report(name: str, tmp_path: Path, tiny: Path, labeler: Path, run: Run) -> None:
    path = shipped("pipelines") / f"{name}.yaml"
    written = load(Recipe, path)
    assert next(iter(written.sizes)) == "smoke"
    settings = {**written.settings, **written.sizes["smoke"]}
    lineage = run(path, tmp_path / "out", changed(settings, tiny, labeler))
    assert {own["status"] for own in lineage.steps.values()} == {"done"}
    page = next(made for own in reversed(lineage.steps.values()) for made in own["outputs"] if made.endswith(".html"))
    assert "<html" in (tmp_path / "out" / page).read_text(encoding="utf-8")[:1000]
    models = [made for own in lineage.steps.values() for made in own["outputs"] if (tmp_path / "out" / made / "model").is_dir()]
    for judge in labelers(lineage, lineage.ancestors(models[-1])) if models else ():
        assert judge["agreement"], f"{name}: the labeler of {models[-1]} is never measured"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_a_size_for_real_models(name: str, tmp_path: Path) -> None:
    """Which is whole but for the user's own data, and is told its price before it begins."""
    path = shipped("pipelines") / f"{name}.yaml"
    written = load(Recipe, path)
    own = {**written.settings, **written.sizes["full"]}
    data = written.settings
    missing = [setting for setting, value in own.items() if value is None]
    changes = [f"{setting}={str(data[setting]).replace('${samples}', recipe.BUILT_IN['samples'])}" for setting in missing]
    read = recipe.read(path, tmp_path / "out", "full", changes)
    assert not any(value == "embedded" for name, value in read.settings.items() if name != "policy")
    found = rehearse(Work(read, tmp_path / "out"))
    asking = [step.name for step in read.steps if step.asks and step.command in ("label", "score", "rank", "sample", "revise")]
    unknown = {step: found[step].remark for step in asking if not (found[step].usage or {}).get("calls")}
    assert not unknown


def test_a_rehearsal_counts_what_a_run_asks(tmp_path: Path, tiny: Path, labeler: Path, run: Run) -> None:
    path = shipped("pipelines") / "constitutional-full.yaml"
    written = load(Recipe, path)
    changes = changed({**written.settings, **written.sizes["smoke"]}, tiny, labeler)
    told = rehearse(Work(recipe.read(path, tmp_path / "plan", None, changes), tmp_path / "plan"))
    lineage = run(path, tmp_path / "out", changes)
    for name, own in lineage.steps.items():
        expected = (told[name].usage or {}).get("calls", 0)
        assert ((own["usage"] or {}).get("calls") or 0) == pytest.approx(expected), name


def test_a_rehearsal_tells_the_price(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Question {n}?"} for n in range(100)])
    (tmp_path / "judge.yaml").write_text("engine: openai\nmodel: m\nprice: [1.0, 1000000.0]\n")
    (tmp_path / "p.yaml").write_text("""
steps:
  sample: sample rows.jsonl -o a.jsonl --labeler judge.yaml --n 3 --max-tokens 10
  rank: rank a.jsonl -o r.jsonl --labeler judge.yaml
""")
    found = rehearse(Work(recipe.read(tmp_path / "p.yaml", tmp_path / "out"), tmp_path / "out"))
    sampled, ranked = found["sample"].usage, found["rank"].usage
    assert sampled
    assert ranked
    assert sampled["calls"] == 300
    assert sampled["completion_tokens"] == 3000
    assert sampled["cost_usd"] == pytest.approx(3000, rel=0.01)
    assert ranked["calls"] == 100 * 3 * 2  # three pairs, both orders
    assert not (tmp_path / "out").exists()
