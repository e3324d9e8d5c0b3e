"""Checkpoints: complete ones are known, by any damage; the newest counts, and older ones go only after it is complete."""

from __future__ import annotations

import json
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.train.checkpoints import MANIFEST, Checkpoints, Trained, clear, in_order, is_complete, newest, seal

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter/weights.bin")


def write(folder: Path, step: int, sealed: bool = True) -> Path:
    made = folder / f"checkpoint-{step}"
    for number, name in enumerate(FILES):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(bytes([step % 256]) * (10 + number))
    if sealed:
        seal(made)
    return made


def test_steps_are_numbers_and_not_texts(tmp_path: Path) -> None:
    for step in (9, 100, 10):
        write(tmp_path, step)
    for other in ("checkpoint-x", "checkpoint-200-old", "my-checkpoint-300", "checkpoint-"):
        (tmp_path / other).mkdir()
    assert [path.name for path in in_order(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert newest(tmp_path) == tmp_path / "checkpoint-100"


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") is None
    write(tmp_path, 3, sealed=False)
    assert newest(tmp_path) is None
    clear(tmp_path / "missing")


@pytest.mark.parametrize(
    "manifest", ["", "{", "null", "[]", "{}", "3", '"text"', '["model.safetensors"]', '{"model.safetensors": "10"}', "\ud800"]
)
def test_a_manifest_that_says_nothing_counts_for_nothing(manifest: str, tmp_path: Path) -> None:
    made = write(tmp_path, 5)
    assert is_complete(made)
    (made / MANIFEST).write_text(manifest, encoding="utf-8", errors="surrogatepass")
    assert not is_complete(made)


@given(
    damage=st.dictionaries(st.integers(1, 4), st.sampled_from(("none", "shorter", "longer", "gone", "manifest")), min_size=1),
    name=st.sampled_from(FILES),
)
def test_the_newest_is_that_with_most_steps_of_those_without_damage(damage: dict[int, str], name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for step, what in damage.items():
            made = write(folder, step)
            if what == "manifest":
                (made / MANIFEST).unlink()
            elif what == "gone":
                (made / name).unlink()
            elif what != "none":
                content = (made / name).read_bytes()
                (made / name).write_bytes(content[:-1] if what == "shorter" else content + b"x")
        whole = [step for step, what in damage.items() if what == "none"]
        expected = folder / f"checkpoint-{max(whole)}" if whole else None
        assert newest(folder) == expected
        clear(folder)
        assert [path.name for path in in_order(folder)] == [f"checkpoint-{step}" for step in sorted(whole)]
        assert newest(folder) == expected


# ---------------------------------------------------------------- while a run trains


def saved(callback: Checkpoints, folder: Path, step: int) -> None:
    write(folder, step, sealed=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=step)
    callback.on_save(SimpleNamespace(output_dir=str(folder)), state, None)


@given(keep=st.integers(2, 4), steps=st.lists(st.integers(1, 30), min_size=1, max_size=8, unique=True))
def test_the_newest_stay(keep: int, steps: list[int]) -> None:
    with tempfile.TemporaryDirectory() as place:
        callback = Checkpoints(keep)
        for step in sorted(steps):
            saved(callback, Path(place), step)
            assert newest(Path(place)) == Path(place) / f"checkpoint-{step}"
        assert [path.name for path in in_order(Path(place))] == [f"checkpoint-{step}" for step in sorted(steps)[-keep:]]


def test_an_old_one_goes_only_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Checkpoints(2)
    for step in (1, 2):
        saved(callback, tmp_path, step)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlaif.train.checkpoints.seal", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(callback, tmp_path, 3)
    assert [path.name for path in in_order(tmp_path) if is_complete(path)] == ["checkpoint-1", "checkpoint-2"]


def control(**set_already: bool) -> Any:
    return SimpleNamespace(**{"should_save": False, "should_log": False, "should_training_stop": False, **set_already})


def test_metrics_are_logged_with_each_checkpoint() -> None:
    state = SimpleNamespace(global_step=3, max_steps=9)
    for save in (False, True):
        given_control = control(should_save=save)
        Checkpoints(2).on_step_end(None, state, given_control)
        assert given_control.should_log is save
        assert not given_control.should_training_stop


def test_no_step_comes_after_the_last() -> None:
    callback = Checkpoints(2)
    callback.on_step_begin(None, SimpleNamespace(global_step=8, max_steps=9), control())
    with pytest.raises(Trained):
        callback.on_step_begin(None, SimpleNamespace(global_step=9, max_steps=9), control())


def test_signals_end_the_step_and_are_given_back() -> None:
    before = [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)]
    for asked in (signal.SIGINT, signal.SIGTERM):
        callback = Checkpoints(2)
        callback.on_train_begin(SimpleNamespace(world_size=1), None, None)
        try:
            signal.raise_signal(asked)
            assert callback.stopped
            found = control()
            callback.on_step_end(None, SimpleNamespace(global_step=1, max_steps=9), found)
            assert (found.should_save, found.should_training_stop, found.should_log) == (True, True, True)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(asked)
        finally:
            callback.restore()
    assert [signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)] == before


def test_several_processes_leave_the_signals_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    Checkpoints(2).on_train_begin(SimpleNamespace(world_size=2), None, None)
    assert signal.getsignal(signal.SIGINT) == before


def test_the_manifest_lists_every_file_but_itself(tmp_path: Path) -> None:
    made = write(tmp_path, 1)
    seal(made)  # again, as where a step is saved twice
    assert sorted(json.loads((made / MANIFEST).read_text())) == sorted(FILES)
