"""The shipped configs: each is what its kind of training, or `accelerate launch`, takes; and their guide is whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser

from rlaif.labeler import load_labeler
from rlaif.records import UsageError
from rlaif.rl.config import Online, Ppo, Rollouts, StopWhen, Term
from rlaif.train.config import LOSSES, Gpo, Lora, Preference, Reward, Sft, Training
from rlaif.train.kinds import load_config
from rlaif.yamlfile import named, shipped
from tests.conftest import cli, write_jsonl

CONFIGS = sorted(shipped("pipelines/train").glob("*.yaml"))
LAUNCHES = sorted(shipped("pipelines/accelerate").glob("*.yaml"))
DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "training.md").read_text(encoding="utf-8")
REINFORCEMENT = (DOCS / "reinforcement.md").read_text(encoding="utf-8")


def command(path: Path) -> tuple[str, str]:
    """The kind and the name in a config's first line, which says how it is used."""
    found = re.fullmatch(r"# rlaif train (\w+) ([\w-]+)", path.read_text(encoding="utf-8").partition("\n")[0])
    assert found, f"{path.name}: its first line is not its command"
    return found[1], found[2]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_one_of_the_kind_that_its_first_line_says(path: Path) -> None:
    kind, name = command(path)
    assert name == path.stem
    config = load_config(kind, named("pipelines/train", name))
    assert config.name == name
    assert config.model == "embedded"
    assert config.out == f"runs/{name}"
    for stage in config.each_stage():
        assert all(re.fullmatch(r"\w+\.jsonl", file) for file in stage.files)
    judge = getattr(config, "judge", None)
    assert judge is None or load_labeler(judge)


def test_the_configs_mean_what_their_names_say() -> None:
    loaded = {path.stem: load_config(command(path)[0], path) for path in CONFIGS}
    losses = {name: config.loss for name, config in loaded.items() if hasattr(config, "loss") and command_of(name) == "dpo"}
    assert losses == {
        "dpo": "dpo",
        "dpo-soft": "dpo",
        "sdpo": "dpo",
        "apo-zero": "apo_zero",
        "apo-auto": "auto",
        "simpo": "simpo",
        "orpo": "orpo",
    }
    rewards = {name: config for name, config in loaded.items() if isinstance(config, Reward)}
    assert rewards["reward"].labels == rewards["reward-ranking"].labels == "soft"
    assert rewards["reward-ranking"].loss == "ranking"
    assert rewards["reward-llama2"].margin_values["slightly better"] == pytest.approx(1 / 3)
    assert rewards["reward-heads"].heads == ("helpful", "safe")
    first, second = rewards["reward-pretrained"].each_stage()
    assert (first.loss, first.labels, second.loss, second.labels) == ("binary", "hard", "pairwise", "soft")
    assert len(loaded["sdpo"].each_stage()) == 3
    online = {name: config for name, config in loaded.items() if isinstance(config, Online)}
    assert {name: (config.loss, config.mixture > 0, config.reference_update) for name, config in online.items()} == {
        "online-dpo": ("dpo", False, None),
        "ipo-md": ("ipo", True, None),
        "nash-md": ("nash_md", True, None),
        "bpo": ("dpo", False, 1.0),
    }


def command_of(name: str) -> str:
    return command(named("pipelines/train", name))[0]


def test_the_command_takes_a_shipped_configs_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "Q?", "chosen": "Yes.", "rejected": "Yes."}])
    done = cli("train", "dpo", "dpo", cwd=tmp_path)
    assert done.returncode == 2
    assert "train.jsonl line 1: columns 'chosen' and 'rejected' are identical" in done.stderr
    done = cli("train", "dpo", "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "no file 'nothing'" in done.stderr
    assert "dpo-soft" in done.stderr


def test_a_config_of_another_kind_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"reward-heads\.yaml: data: expected a file's name"):
        load_config("dpo", named("pipelines/train", "reward-heads"))


# ------------------------------------------------------------ accelerate


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_a_launch_file(path: Path) -> None:
    ClusterConfig.from_yaml_file(str(path))  # refuses unknown keys
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {action.dest for action in launch_command_parser()._actions}
    inner = {key for name in ("fsdp_config", "deepspeed_config") for key in content.get(name, {})}
    assert inner <= known  # which accelerate itself does not check
    assert f"pipelines/accelerate/{path.name}" in path.read_text(encoding="utf-8").partition("\n")[0]


def test_the_launch_files_are_those_of_the_guide() -> None:
    assert [path.stem for path in LAUNCHES] == ["cpu-2", "ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp"]
    assert all(f"{path.stem}.yaml" in GUIDE for path in LAUNCHES)


# ------------------------------------------------------------ the guide


def table_rows(heading: str, guide: str = GUIDE) -> dict[str, list[str]]:
    """The rows of the tables under a heading of a guide, by their first cell's code."""
    text = guide.partition(f"\n{heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith("| `")]
    return {row[0].strip("`"): row for row in rows}


@pytest.mark.parametrize(
    ("heading", "model", "base", "lead"),
    [
        ("## Settings of every kind", Training, None, ""),
        ("## Supervised fine-tuning", Sft, Training, ""),
        ("## Reward models", Reward, Training, ""),
        ("## Preference losses", Preference, Training, ""),
        ("## Group preferences", Gpo, Training, ""),
        ("## LoRA", Lora, None, "lora."),
        ("## Settings of both", Rollouts, Training, ""),
        ("## PPO and its kin", Ppo, Rollouts, ""),
        ("## Online preference learning", Online, Rollouts, ""),
    ],
)
def test_the_guide_has_every_setting_with_its_default(heading: str, model: Any, base: Any, lead: str) -> None:
    inherited = base.model_fields if base else {}
    own = {name: field for name, field in model.model_fields.items() if repr(field) != repr(inherited.get(name))}
    rows = table_rows(heading, REINFORCEMENT if issubclass(model, Rollouts) else GUIDE)
    for name, field in own.items():
        if name not in ("data", "eval") or model is Training:  # of which reward models may have several
            assert rows[lead + name][1].strip("`") == shown(field), f"{name}: the guide says {rows[lead + name][1]}"


def shown(field: Any) -> str:
    """A default as the guide writes it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}, "", StopWhen()):
        return "–"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def test_the_guide_has_every_loss() -> None:
    told = {name for row in table_rows("## Preference losses") for name in row.split("`, `")}
    assert set(LOSSES) <= told


def test_the_guide_has_every_algorithm_and_rule() -> None:
    told = table_rows("## PPO and its kin", REINFORCEMENT)
    assert set(get_args(Ppo.model_fields["algorithm"].annotation)) <= told.keys()
    assert all(f"`{loss}`" in REINFORCEMENT for loss in get_args(Online.model_fields["loss"].annotation))
    assert {name.partition(":")[0] for name in table_rows("## Over-optimisation", REINFORCEMENT)} >= set(StopWhen.model_fields)
    kinds = [get_args(term.model_fields["kind"].annotation)[0] for term in get_args(get_args(Term)[0])]
    assert "gate" in kinds
    assert all(f"kind: {kind}" in REINFORCEMENT for kind in kinds)
