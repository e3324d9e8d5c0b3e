"""Settings of a run: the file's, those of `--set`, and what is wrong with them, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rlaif import cli_train
from rlaif.records import UsageError
from rlaif.train.config import Preference, Reward, Sft
from rlaif.train.folder import as_yaml
from rlaif.train.kinds import KINDS, load_config
from tests.conftest import write_jsonl
from tests.engines.tiny import save_tiny

BASE = {"data": "d.jsonl", "out": "out"}
NEEDED = {"ppo": {"reward": [{"kind": "length", "most": 9}]}, "online": {"judge": "embedded"}}
"""What kinds that have no stages cannot do without."""


def config(path: Path, kind: str = "reward", changes: tuple[str, ...] = (), **settings: Any) -> Any:
    path.write_text(yaml.safe_dump({**BASE, **settings}))
    return load_config(kind, path, changes)


# ---------------------------------------------------------------- files


def test_a_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    made = config(tmp_path / "mine.yaml", learning_rate=3e-4)
    assert isinstance(made, Reward)
    assert (made.name, made.learning_rate, made.loss, made.model) == ("mine", 3e-4, "auto", "embedded")


def test_names_of_files_are_looked_up_beside_the_config_first(tmp_path: Path) -> None:
    for name in ("d.jsonl", "e.jsonl", "s.jsonl", "safe.jsonl"):
        (tmp_path / name).touch()
    made = config(
        tmp_path / "c.yaml",
        data={"helpful": "d.jsonl", "safe": "safe.jsonl"},
        eval={"helpful": "e.jsonl", "safe": "hub/name"},
        stages=[{"epochs": 2}],
    )
    assert made.data == {"helpful": str(tmp_path / "d.jsonl"), "safe": str(tmp_path / "safe.jsonl")}
    assert made.eval == {"helpful": str(tmp_path / "e.jsonl"), "safe": "hub/name"}
    staged = config(tmp_path / "c.yaml", stages=[{"data": "s.jsonl"}, {"data": "hub/name"}])
    assert [stage.data for stage in staged.each_stage()] == [str(tmp_path / "s.jsonl"), "hub/name"]


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("reward", {"learning_rat": 1}, "learning_rat: Extra inputs are not permitted"),
        ("reward", {"learning_rate": 0}, "learning_rate: .*greater than 0"),
        ("reward", {"learning_rate": "fast"}, "learning_rate: .*valid number"),
        ("reward", {"epochs": -1}, "epochs"),
        ("reward", {"keep": 1}, "keep: .*greater than or equal to 2"),
        ("reward", {"out": None}, "out"),
        ("reward", {"data": None}, "data: Field required"),
        ("reward", {"data": {}}, "data: a file, or a file for each head"),
        ("reward", {"loss": "hinge"}, "loss"),
        ("reward", {"lora": {"rank": 8}}, "lora rank: Extra inputs"),
        ("reward", {"lora": {"r": 0}}, "lora r: "),
        ("reward", {"eval": "e.jsonl", "eval_share": 0.1}, "eval and eval_share"),
        ("reward", {"eval_share": 1.0}, "eval_share"),
        ("reward", {"stages": [{"epoch": 1}]}, "stages: stage 1: no field 'epoch'"),
        ("reward", {"stages": [{}, {"lora": {"r": 1}}]}, "stages: stage 2: 'lora' belongs to the whole run"),
        ("reward", {"data": None, "stages": [{"data": "a.jsonl"}, {}]}, "stage 2 has no data"),
        ("reward", {"margin_values": {"a": 1}}, "margin_values: goes with margin"),
        ("sft", {"context": "c.txt", "packing": True}, "context: goes with"),
        ("dpo", {"loss": "ppo"}, "loss: unknown loss 'ppo': choose one of dpo, "),
        ("dpo", {"loss": {"dpo": 1.0, "kto": 0.1}}, "unknown loss 'kto'"),
        ("dpo", {"loss": "ipo", "labels": "soft"}, "labels: ipo has no form for soft labels"),
        ("dpo", {"loss": "auto"}, "judge: goes with loss auto"),
        ("dpo", {"loss": "simpo", "reference": "other"}, "simpo has no reference model"),
        ("kto", {"loss": "dpo"}, "loss: one of kto"),
    ],
)
def test_what_is_wrong_is_named_with_the_file(kind: str, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"c.yaml: .*{said}"):
        config(tmp_path / "c.yaml", kind, **settings)


def test_a_stage_is_checked_with_the_rest(tmp_path: Path) -> None:
    made = config(tmp_path / "c.yaml", stages=[{"epochs": 1}, {"learning_rate": -1}])
    with pytest.raises(UsageError, match="learning_rate"):
        made.each_stage()


def test_a_stage_takes_all_it_does_not_name_from_the_run(tmp_path: Path) -> None:
    first, second = config(tmp_path / "c.yaml", epochs=3, stages=[{"epochs": 1}, {"loss": "binary"}]).each_stage()
    assert (first.epochs, first.loss, second.epochs, second.loss) == (1, "auto", 3, "binary")
    assert first.stages == second.stages == ()


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),
        ("epochs=2", "epochs", 2.0),
        ("model=some/name", "model", "some/name"),
        ("eval=", "eval", None),
        ("eval=null", "eval", None),
        ("report_to=[wandb, tensorboard]", "report_to", ("wandb", "tensorboard")),
        ("margin_values={much: 1, little: 0.3}", "margin_values", {"much": 1.0, "little": 0.3}),
        ("margin_values.much=2", "margin_values", {"much": 2.0}),
        ("trainer.adam_epsilon=1e-9", "trainer", {"adam_epsilon": 1e-9}),
        ("stages=[{epochs: 1}, {epochs: 2}]", "stages", ({"epochs": 1}, {"epochs": 2})),
        ("name=a=b", "name", "a=b"),
    ],
)
def test_set_changes_a_setting(change: str, field: str, value: Any, tmp_path: Path) -> None:
    assert getattr(config(tmp_path / "c.yaml", changes=(change,), margin="gap"), field) == value


def test_set_reaches_inside_and_leaves_the_rest(tmp_path: Path) -> None:
    assert config(tmp_path / "c.yaml", changes=("lora.r=8",), lora={"alpha": 4}).lora.model_dump(include={"r", "alpha"}) == {
        "r": 8,
        "alpha": 4,
    }
    assert config(tmp_path / "c.yaml", changes=("lora.r=8", "lora.r=4")).lora.r == 4
    assert config(tmp_path / "c.yaml", changes=("lora=null",), lora={"alpha": 4}).lora is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("epochs", "--set: expected NAME=VALUE, got 'epochs'"),
        ("=3", "--set: expected NAME=VALUE"),
        ("epochs=[1", "--set epochs: its value"),
        ("epochs=many", "epochs: .*valid number"),
        ("epoch=3", "epoch: Extra inputs"),
        ("lora.rank=8", "lora rank: Extra inputs"),
        ("model.name=x", "model: .*valid string"),
        ("stages=3", "stages: "),
    ],
)
def test_a_bad_change_is_named(change: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        config(tmp_path / "c.yaml", changes=(change,))


@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": st.floats(1e-9, 1, allow_nan=False),
            "seed": st.integers(0, 2**31),
            "max_steps": st.none() | st.integers(1, 10**6),
            "lora": st.none() | st.fixed_dictionaries({"r": st.integers(1, 64), "alpha": st.floats(0.1, 99)}),
            "stages": st.lists(st.fixed_dictionaries({"epochs": st.floats(0.01, 9)}), max_size=2),
            "description": st.text(),
        },
    ),
    kind=st.sampled_from(sorted(KINDS)),
)
@example(changes={"description": "\x85"}, kind="dpo")
@example(changes={"lora": None, "stages": []}, kind="gpo")
def test_settings_come_back_from_the_file_that_a_run_keeps(changes: dict[str, Any], kind: str) -> None:
    refused = {"stages"} if kind in NEEDED else {"stages", "lora"} if kind == "gpo" else set()
    changes = {name: value for name, value in changes.items() if name not in refused}
    made = KINDS[kind].model_validate({**BASE, **NEEDED.get(kind, {}), **changes})
    stored = yaml.safe_load(as_yaml(made.model_dump(mode="json")))
    assert KINDS[kind].model_validate(stored) == made
    assert stored == made.model_dump(mode="json")


# ---------------------------------------------------------------- what only the trainer knows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("config") / "tiny")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trainer": {"lerning_rate": 1}}, "trainer.lerning_rate: RewardConfig has no such field"),
        ({"trainer": {"learning_rate": 1}}, "trainer.learning_rate: is set by a field of its own"),
        ({"scheduler": "sideways"}, "sideways is not a valid SchedulerType"),
        ({"trainer": {"optim": "best"}}, "best is not a valid OptimizerNames"),
    ],
)
def test_a_field_that_the_trainer_refuses_is_found_before_the_model_loads(
    settings: dict[str, Any], said: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlaif.train.run import run

    def loading(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", loading)
    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q?", "chosen": "Yes", "rejected": "No"}] * 4)
    own = {"data": str(data), "out": str(tmp_path / "out"), "model": str(tiny), "device": "cpu"}
    with pytest.raises(UsageError, match=said):
        run("reward", Reward(**own, **settings))
    with pytest.raises(AssertionError, match="a model is loaded"):
        run("reward", Reward(**own))  # put right, it can begin in the same folder


def test_a_model_that_cannot_be_loaded_is_one_line(tiny: Path, tmp_path: Path) -> None:
    from rlaif.records import FatalError
    from rlaif.train.run import run

    data = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "Q?", "chosen": "Yes", "rejected": "No"}] * 4)
    own = {"data": str(data), "out": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(FatalError, match="cannot load the model '/nowhere/model'"):
        run("dpo", Preference(**own, model="/nowhere/model"))
    empty = tmp_path / "no-weights"
    empty.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (empty / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FatalError, match=f"cannot begin to train {empty}: .*no-weights"):
        run("dpo", Preference(**own, model=str(empty)))
    with pytest.raises(FatalError, match="Target modules"):
        run("dpo", Preference(**own, model=str(tiny), lora={"targets": ("nothing",)}))


# ---------------------------------------------------------------- the command


def test_of_several_processes_the_main_one_speaks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli_train.time, "sleep", waits.append)
    for rank, expected in (("0", []), ("1", [cli_train.PATIENCE])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UsageError, match="no such file"):
            cli_train._train("reward", str(tmp_path / "missing.yaml"), None, None, False)
        assert waits == expected


def test_all_kinds_have_a_command() -> None:
    assert {command.callback.__name__ for command in cli_train.train_app.registered_commands if command.callback} == set(KINDS)
    assert Sft(**BASE).name == ""
