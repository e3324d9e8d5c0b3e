"""The kinds of training, and a run's settings from its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlaif.records import UsageError
from rlaif.rl.config import Online, Ppo
from rlaif.train.config import Gpo, Kto, Preference, Reward, Sft, Training
from rlaif.yamlfile import beside, in_words, parse_yaml, read_yaml

KINDS: dict[str, type[Training]] = {
    "sft": Sft,
    "reward": Reward,
    "dpo": Preference,
    "kto": Kto,
    "gpo": Gpo,
    "ppo": Ppo,
    "online": Online,
}
"""What `rlaif train KIND` reads."""

FILES = ("data", "eval", "context", "judge", "ptx", "reward", "held_out")
"""Fields that may name a file beside the config, or hold some that do."""


def load_config(kind: str, path: Path, changes: Sequence[str] = ()) -> Training:
    """The settings of a file, with `name=value` changes; dots lead inside, as in `lora.r=8`, and values are YAML.

    Raises: UsageError naming the file and the field of what is wrong.
    """
    content = {"name": path.stem, **read_yaml(path)}
    for field in FILES:
        if field in content:
            content[field] = _beside(path, content[field])
    if isinstance(content.get("stages"), list):
        content["stages"] = [
            {k: _beside(path, v) if k in FILES else v for k, v in stage.items()} if isinstance(stage, dict) else stage
            for stage in content["stages"]
        ]
    for change in changes:
        _set(content, change)
    try:
        return KINDS[kind].model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {in_words(error, content)}") from error


def _beside(path: Path, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _beside(path, own) for key, own in value.items()}
    if isinstance(value, list):
        return [_beside(path, own) for own in value]
    if not isinstance(value, str) or not value:
        return value
    file, mark, name = value.rpartition(".py:")  # a function in a file
    return f"{beside(path, f'{file}.py')}:{name}" if mark else beside(path, value)


def _set(content: dict[str, Any], change: str) -> None:
    name, mark, text = change.partition("=")
    if not (name and mark):
        raise UsageError(f"--set: expected NAME=VALUE, got '{change}'")
    *path, last = name.split(".")
    for part in path:
        inner = content.get(part)
        content[part] = content = dict(inner) if isinstance(inner, dict) else {}
    content[last] = parse_yaml(f"value: {text}", f"--set {name}: its value")["value"] if text else None
