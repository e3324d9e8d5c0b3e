"""How probable a model finds a given response: the answer to a request is the log-probability of its last message."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace

import torch

from rlaif.engines.batching import Job
from rlaif.engines.embedded import NAME, embedded_model
from rlaif.engines.packed import float32_head
from rlaif.engines.transformers import TransformersEngine
from rlaif.records import Completion, Request, RowError
from rlaif.rl.generate import padded_left

BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""The most tokens of a batch, by device: logits of 8,192 tokens over 150,000 words are 5 GB."""


@dataclass(frozen=True, slots=True)
class _Job(Job):
    """A request; `ids` are the tokens of the context with the response's, which are the last `count`."""

    count: int


class LikelihoodEngine(TransformersEngine):
    """The log-probability of a request's last message, as what the model says after the messages before it and `prefix`.

    The message's tokens are those of its text alone, so that they are the same in every context; log-probabilities are
    summed over them, without the end of the turn. A context and response of more tokens than the model holds is the row's
    failure, and so is a response without a token. `model` as for TransformersEngine, or `embedded`; dtype and device as there.

    Raises: UsageError for an unknown dtype or device, FatalError where the model cannot be loaded.
    """

    def __init__(self, model: str, dtype: str | None = None, device: str | None = None, trust_remote_code: bool = False):
        name, source = (NAME, str(embedded_model())) if model == "embedded" else (model, model)
        super().__init__(source, dtype, device, trust_remote_code=trust_remote_code)
        self.identity |= {"engine": "likelihood", "model": name}
        self._chat.model = name
        self._forest = None  # of padded batches it sums up many places at once

    def _job(self, request: Request, future: asyncio.Future[Completion]) -> _Job:  # type: ignore[override]
        *turns, said = request.messages
        answer = self._chat.tokenizer.encode(self._chat.guard(said["content"]), add_special_tokens=False)
        if not answer:
            raise RowError("the response is empty")
        context = self._chat.render(replace(request, messages=tuple(turns), max_tokens=len(answer)))
        return _Job(request, context + answer, future, len(answer))

    def _full(self, batch: list[_Job]) -> bool:  # type: ignore[override]
        tokens = BATCH_TOKENS.get(self._device.type, BATCH_TOKENS["cuda"])
        return len(batch) == self._max_rows or (len(batch) + 1) * batch[0].size > tokens

    @torch.inference_mode()
    def _answer(self, batch: list[_Job]) -> list[Completion]:  # type: ignore[override]
        tokens, mask = padded_left([job.ids for job in batch], self._pad, self._device)  # so that responses end together
        kept = max(job.count for job in batch) + 1
        with float32_head(self._model):
            logits = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=kept,
            ).logits
        return [_sum(job, own, ids) for job, own, ids in zip(batch, logits, tokens, strict=True)]


def _sum(job: _Job, logits: torch.Tensor, ids: torch.Tensor) -> Completion:
    """logits: (kept, words) of the last places; ids: (width) of all, the response's at its end."""
    found = logits[-job.count - 1 : -1].float().log_softmax(-1).gather(-1, ids[-job.count :, None])
    return Completion("", logprob=math.fsum(found[:, 0].tolist()), prompt_tokens=len(job.ids))
