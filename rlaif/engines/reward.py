"""Trained reward models, in this process: the answer to a request is the scores of its last message, the response."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from rlaif.engines.batching import BATCH_TOKENS, Batching, Job, device_of, dtype_of
from rlaif.engines.chat import cannot_load, load_tokenizer
from rlaif.engines.transformers import quiet
from rlaif.records import Completion, FatalError, Request, RowError, UsageError
from rlaif.reward import Folder, weights_hash
from rlaif.train.data import encoder


@dataclass(frozen=True, slots=True)
class _Job(Job):
    """A request with its tokens for each folder, `ids` being the longest of them."""

    texts: list[list[int]]


class RewardEngine(Batching[_Job]):
    """Scores responses with the models of all `folders`.

    Texts become tokens as in training: messages by the chat template, of plain texts the prompt is one user message. The
    answer's text is JSON, a list for each member with a score for each head. A text of more tokens than training took is the
    row's failure. dtype: as in training, `bf16` on a GPU (the head in fp32, for its steps would be coarse) and `fp32` on a
    CPU, unless given.

    Raises: UsageError for an unknown dtype or device, or weights that are not those that were trained; FatalError where a
    model cannot be loaded.
    """

    def __init__(
        self,
        folders: Sequence[Folder],
        dtype: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ):
        place = device_of(device)
        dtype = dtype or ("fp32" if place.type == "cpu" else "bf16")
        kind = dtype_of(dtype)
        for folder in folders:
            if weights_hash(folder.path) != folder.weights:
                raise UsageError(f"{folder.path}: the weights are not those that were trained here: their hash differs")
        self.identity: dict[str, Any] = {
            "engine": "reward",
            "model": ", ".join(folder.name for folder in folders),
            "weights": [folder.weights for folder in folders],
            "dtype": dtype,
        }
        self.notes: list[str] = []
        self._folders = folders
        tokenizers = [load_tokenizer(str(folder.models[0]), trust_remote_code) for folder in folders]
        self._encoders = [encoder(tokenizer) for tokenizer in tokenizers]
        self._pads = [tokenizer.pad_token_id for tokenizer in tokenizers]
        models = [
            [load_reward_model(path, len(folder.heads), pad, kind, trust_remote_code).to(place) for path in folder.models]
            for folder, pad in zip(folders, self._pads, strict=True)
        ]
        super().__init__(place, models)

    def _job(self, request: Request, future: asyncio.Future[Completion]) -> _Job:
        *turns, response = request.messages
        texts = []
        for folder, encode in zip(self._folders, self._encoders, strict=True):
            ids = encode(turns, [response]) if folder.conversational else encode(turns[0]["content"], response["content"])
            if len(ids) > folder.max_length:
                raise RowError(f"prompt and response are {len(ids)} tokens, {folder.name} was trained on {folder.max_length}")
            texts.append(ids)
        return _Job(request, max(texts, key=len), future, texts)

    def _full(self, batch: list[_Job]) -> bool:
        tokens = BATCH_TOKENS[self._device.type != "cpu", True]
        return len(batch) == self._max_rows or (len(batch) + 1) * batch[0].size > tokens

    @torch.inference_mode()
    def _answer(self, batch: list[_Job]) -> list[Completion]:
        found = []  # by member: (rows, heads)
        for place, (models, pad) in enumerate(zip(self._model, self._pads, strict=True)):
            ids = [torch.tensor(job.texts[place], device=self._device) for job in batch]
            tokens = pad_sequence(ids, batch_first=True, padding_value=pad)
            mask = pad_sequence([torch.ones_like(own) for own in ids], batch_first=True)
            found += [model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.float() for model in models]
        scores = torch.stack(found, 1).tolist()
        return [Completion(json.dumps(own), prompt_tokens=len(job.ids)) for job, own in zip(batch, scores, strict=True)]


def load_reward_model(path: Path, heads: int, pad: int, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """A model whose scores are those of the last token that is no padding, as in training."""
    source, settings = str(path), dict[str, Any]()
    adapter = path / "adapter_config.json"
    try:
        if adapter.exists():
            source, settings = json.loads(adapter.read_bytes())["base_model_name_or_path"], {"num_labels": heads}
        with quiet():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **settings,
            )
            lacking = set(found["missing_keys"])
            if adapter.exists():
                model, brought = _adapted(model, path)
                lacking -= brought
    except Exception as error:
        raise cannot_load(str(path), error) from error
    if lacking:  # they would be drawn at random
        raise FatalError(f"{path}: no reward model: its weights lack {min(lacking)}")
    if model.config.num_labels != heads:
        raise FatalError(f"{path}: the model has {model.config.num_labels} heads, not {heads}")
    model.config.get_text_config().pad_token_id = pad
    model.eval()
    return model if dtype == torch.float32 else _with_exact_head(model)


def _adapted(model: Any, path: Path) -> tuple[Any, set[str]]:
    """The model with an adapter merged into it, and the names of the weights that the adapter brings whole."""
    from peft import PeftModel

    names = {name.removeprefix("base_model.model.") for name in load_file(path / "adapter_model.safetensors")}
    return PeftModel.from_pretrained(model, str(path)).merge_and_unload(), names


def _with_exact_head(model: Any) -> Any:
    """The last layer in float32: scores in bf16 have steps of 1/32 from 4 up, which is much for a difference of two."""
    if isinstance(head := getattr(model, "score", None), torch.nn.Linear):
        head.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
    return model
