"""Any model that transformers can load, in this process: batched, on a GPU or without one."""

from __future__ import annotations

import asyncio
import copy
import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import linear
from transformers.cache_utils import DynamicLayer

from rlaif.engines import whole_choices
from rlaif.engines.batching import BATCH_TOKENS, Batching, Job, device_of, dtype_of
from rlaif.engines.chat import Chat, cannot_load, identified, load_tokenizer, own_seed
from rlaif.records import Completion, FatalError, Request, UsageError

hf: Any = transformers  # its own annotations are partial
SHARED = 16
"""Tokens that all prompts must begin with for it to be worth computing them once."""


@dataclass(frozen=True, slots=True)
class _Job(Job):
    """A request with its prompt's tokens."""

    @property
    def kind(self) -> tuple[bool, int, float, float, tuple[str, ...], bool]:
        r = self.request
        stop, logprob = ((), False) if r.choices else (r.stop, r.logprob)
        return bool(r.choices), r.max_tokens, r.temperature, r.top_p, stop, logprob

    @property
    def size(self) -> int:
        return len(self.ids) + self.request.max_tokens


class TransformersEngine(Batching[_Job]):
    """Runs `model`, a folder or a name on the hub, with transformers.

    Requests that wait at the same time are sorted by length and run in batches of at most `max_batch_tokens` tokens,
    padding and room for the answer included, in a thread of their own. A request with choices costs one forward pass,
    less what all prompts begin with, which is computed once; its log-probabilities are over the whole vocabulary. One
    without choices is generated. Each sample is drawn from a source of randomness of its own, so that with a seed it does
    not depend on the requests beside it, except where rounding tips a close draw (rare in fp32, not in bf16). To ask for
    an answer's log-probability is such a rounding in bf16, as the model's last layer is then computed in float32.

    dtype: `bf16` or `fp32`; bf16 unless given, but fp32 on a CPU that has no instructions for it. device: as torch names
    it; a GPU where there is one. trust_remote_code: run the code that comes with a model.

    Raises: UsageError for an unknown dtype or device, FatalError where the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        dtype: str | None = None,
        device: str | None = None,
        max_batch_tokens: int | None = None,
        trust_remote_code: bool = False,
    ):
        place = device_of(device)
        dtype = dtype or ("bf16" if place.type != "cpu" or _cpu_has_bf16() else "fp32")
        kind = dtype_of(dtype)
        if max_batch_tokens is not None and max_batch_tokens < 1:
            raise UsageError(f"max_batch_tokens must be at least 1, not {max_batch_tokens}")
        self.identity: dict[str, Any] = {"engine": "transformers", "dtype": dtype, **self.identified(model)}
        self._max_tokens = max_batch_tokens
        super().__init__(place, _load(model, kind, place, trust_remote_code))
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._chat = Chat(load_tokenizer(model, trust_remote_code), model, limit)
        self.notes = self._chat.notes
        self._ends = ends_of(self._model, self._chat.tokenizer)
        # The model's own defaults (a repetition penalty, top-k …) would change what a request asks for.
        self._model.generation_config = hf.GenerationConfig()
        self._shares = True
        self._shared: tuple[list[int], Any] = ([], None)

    def identified(self, model: str) -> dict[str, Any]:
        """What tells this model from others, in `identity`."""
        return identified(model)

    async def complete(self, request: Request) -> Completion:
        if split := self._chat.split_choices(request.choices):
            simple = replace(request, choices=tuple(c for c in request.choices if c not in split))
            return await whole_choices(request, split, self.complete, await self.complete(simple))
        return await super().complete(request)

    # ------------------------------------------------------------ batches

    def _job(self, request: Request, future: asyncio.Future[Completion]) -> _Job:
        ids = self._chat.render(request)
        self._chat.choice_ids(request.choices)  # a wrong choice fails here, not its whole batch
        return _Job(request, ids, future)

    def _batches(self, jobs: list[_Job]) -> Iterator[list[_Job]]:
        self._share([job.ids for job in jobs if job.request.choices])
        return super()._batches(jobs)

    def _full(self, batch: list[_Job]) -> bool:
        scores = bool(batch[0].request.choices)
        width = max(job.size for job in batch) - (len(self._shared[0]) if scores else 0)
        tokens = self._max_tokens or BATCH_TOKENS[self._device.type != "cpu", scores]
        return len(batch) == self._max_rows or (len(batch) + 1) * width > tokens

    def _share(self, prompts: list[list[int]]) -> None:
        """Settle on what all these prompts begin with, to be computed once: what it was before, if still nearly the most."""
        if not prompts or not self._shares:
            return
        least, greatest = min(prompts), max(prompts)  # what these two begin with, all between them do
        end = next((n for n, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b), len(least))
        common = least[: min(end, min(map(len, prompts)) - 1)]  # to each at least one token is left
        kept = self._shared[0]
        if kept != common[: len(kept)] or (len(prompts) > 1 and len(kept) < 0.75 * len(common)):
            self._shared = (common if len(prompts) > 1 and len(common) >= SHARED else [], None)

    # ------------------------------------------------------------ in the thread

    @torch.inference_mode()
    def _answer(self, batch: list[_Job]) -> list[Completion]:
        return self._score(batch) if batch[0].request.choices else self._generate(batch)

    def _score(self, batch: list[_Job]) -> list[Completion]:
        """One token each, and how probable each choice was."""
        logits = self._last_logits([job.ids for job in batch])
        logprobs = logits.log_softmax(-1)
        tokens = self._draw(batch)(None, logits).argmax(-1).tolist()
        answers = []
        for job, row, token in zip(batch, logprobs, tokens, strict=True):
            spellings = self._chat.choice_ids(job.request.choices)
            found = {choice: row[ids].logsumexp(0).item() for choice, ids in spellings.items()}
            answers.append(Completion(self._chat.decode([token]), found, None, "length", None, len(job.ids), 1))
        return answers

    def _last_logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits of the token after each prompt, float32."""
        cache, start = self._beginning(len(prompts))
        tokens, mask = self._padded([ids[start:] for ids in prompts])
        places = (mask.cumsum(1) - 1).clamp(min=0) + start
        mask = torch.cat([mask.new_ones(len(prompts), start), mask], 1)
        with float32_head(self._model):
            out = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1,
            )
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    def _beginning(self, rows: int) -> tuple[Any, int]:
        """The cache of the tokens that all prompts begin with, for so many rows, and their number; (None, 0) if none.

        Only where every layer attends to all that came before: padding follows, which a sliding window would count.
        """
        tokens, cache = self._shared
        if not tokens:
            return None, 0
        if cache is None:
            ids = torch.tensor([tokens], device=self._device)
            cache = self._model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            self._shares = type(cache) is hf.DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
            self._shared = (tokens, cache) if self._shares else ([], None)
            return self._beginning(rows)
        cache = copy.deepcopy(cache)  # the model appends to it
        cache.batch_repeat_interleave(rows)
        return cache, len(tokens)

    def _generate(self, batch: list[_Job]) -> list[Completion]:
        request = batch[0].request
        tokens, mask = self._padded([job.ids for job in batch])
        draw, stops = self._draw(batch), _Stops(self._chat, request.stop, tokens.shape[1])
        settings = hf.GenerationConfig(
            max_new_tokens=request.max_tokens, do_sample=False, eos_token_id=self._ends or None, pad_token_id=self._pad
        )
        with float32_head(self._model) if request.logprob else nullcontext():
            out = self._model.generate(
                tokens,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=[draw],
                stopping_criteria=[stops, lambda ids, _: torch.full((len(ids),), self._closed, device=ids.device)],
            )
        answers = out[:, tokens.shape[1] :].tolist()
        taken = [ids[: stops.lengths.get(row)] for row, ids in enumerate(answers)]
        logprobs = torch.stack(draw.logprobs, 1).tolist() if draw.logprobs else [None] * len(batch)
        return [self._read(*each) for each in zip(batch, taken, logprobs, strict=True)]

    def _read(self, job: _Job, ids: list[int], logprobs: list[float] | None) -> Completion:
        """What was generated, up to the first end (padding follows it); `logprobs` are its tokens' log-probabilities."""
        end = next((n for n, token in enumerate(ids) if token in self._ends), None)
        ids = ids if end is None else ids[: end + 1]
        text = self._chat.decode(ids)
        cut = before_stop(text, job.request.stop)
        return Completion(
            text if cut is None else cut,
            finish="length" if end is None and cut is None else "stop",
            prompt_tokens=len(job.ids),
            completion_tokens=len(ids),
            logprob=None if logprobs is None else math.fsum(logprobs[: len(ids)]),
        )

    def _draw(self, batch: list[_Job]) -> _Draw:
        r = batch[0].request
        generators = [_generator(job, self._device) for job in batch] if r.temperature else []
        return _Draw(r.temperature, r.top_p, generators, r.logprob and not r.choices)

    @property
    def _pad(self) -> int:
        pad = self._chat.tokenizer.pad_token_id
        return min(self._ends, default=0) if pad is None else pad  # any token does, as the mask hides it

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and attention mask, padded on the left, so that each row's last token is the last."""
        width = max(map(len, prompts))
        tokens = torch.tensor([[self._pad] * (width - len(ids)) + ids for ids in prompts], device=self._device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=self._device)
        return tokens, mask


class _Draw:
    """Makes of the logits scores whose argmax is a draw: logits / T + Gumbel noise, each row's noise from its own source.

    At temperature 0 the logits stay as they are. With `keep`, `logprobs` has for each step the log-probability of each
    row's token under the logits as they were; a row that has ended goes on adding to it.
    """

    def __init__(self, temperature: float, top_p: float, generators: list[torch.Generator], keep: bool = False):
        self._temperature, self._generators, self._keep = temperature, generators, keep
        self._top_p = hf.TopPLogitsWarper(top_p) if top_p < 1 else None
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, ids: Any, logits: torch.Tensor) -> torch.Tensor:
        scores = self._scores(ids, logits)
        if self._keep:
            token = scores.argmax(-1, keepdim=True)  # as whoever asked will choose it
            self.logprobs.append(logits.float().log_softmax(-1).gather(-1, token)[:, 0])
        return scores

    def _scores(self, ids: Any, logits: torch.Tensor) -> torch.Tensor:
        if not self._generators:
            return logits
        scores = logits / self._temperature
        if self._top_p:
            scores = self._top_p(ids, scores)
        waits = torch.stack(
            [torch.empty_like(row).exponential_(generator=g) for row, g in zip(scores, self._generators, strict=True)]
        )
        return scores - waits.clamp_(min=1e-30).log_()


class _Stops:
    """Ends each row of a generation at the token that completes a stop text; `lengths` are the tokens of rows that it ended.

    ids: the chat's tokens, the answers' from `start` on.
    """

    def __init__(self, chat: Chat, stop: tuple[str, ...], start: int):
        self._chat, self._stop, self._start = chat, stop, start
        # A token is a byte at least; the first of a piece of text may be decoded otherwise than within the whole.
        self._tail = max((len(text.encode("utf-8", "replace")) for text in stop), default=0) + 8
        self.lengths: dict[int, int] = {}

    def __call__(self, ids: torch.Tensor, _: Any) -> torch.Tensor:
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if not self._stop:
            return ended
        # To decode whole answers at each token would take time with the square of their lengths.
        tails = ids[:, max(self._start, ids.shape[1] - self._tail) :].tolist()
        for row, tail in enumerate(tails):
            if row not in self.lengths and self._found(tail) and self._found(ids[row, self._start :].tolist()):
                self.lengths[row] = ids.shape[1] - self._start
        ended[list(self.lengths)] = True
        return ended

    def _found(self, ids: list[int]) -> bool:
        return before_stop(self._chat.decode(ids), self._stop) is not None


def before_stop(text: str, stop: tuple[str, ...]) -> str | None:
    """The text before the stop text that is complete first, of those complete at once the longest; None without any.

    >>> before_stop("one\\n\\ntwo", ("two", "\\n\\n"))
    'one'
    """
    found = [(place + len(s), place) for s in stop if (place := text.find(s)) >= 0]
    return text[: min(found)[1]] if found else None


def _generator(job: _Job, device: torch.device) -> torch.Generator:
    seed = own_seed(job.request, job.ids)
    return torch.Generator(device).manual_seed(secrets.randbits(60) if seed is None else seed)


@contextmanager
def float32_head(model: Any) -> Iterator[None]:
    """Compute the last layer in float32: logits in bf16 have steps of 1/8 from 16 up, which is much for a log-ratio."""
    head = model.get_output_embeddings()
    device = head.weight.device.type
    if type(head) is not torch.nn.Linear or (head.weight.dtype == torch.float32 and not torch.is_autocast_enabled(device)):
        yield
        return

    def exact(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, enabled=False):
            # In parts, for a float32 copy of all weights may not fit.
            logits = torch.cat([linear(states.float(), part.float()) for part in head.weight.chunk(8)], -1)
            return logits if head.bias is None else logits + head.bias.float()

    head.forward = exact  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward  # the class's own shows again


# ---------------------------------------------------------------- loading


def _cpu_has_bf16() -> bool:
    """Whether bf16 runs on this CPU as such: several times as fast as fp32 then, and slower where it is emulated."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _load(model: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise FatalError(f"no model folder '{model}'")
    try:
        with quiet():
            loaded = hf.AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
            )
        return loaded.to(device).eval()
    except Exception as error:
        raise cannot_load(model, error) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    logging = hf.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model may name several, such as the end of a turn and that of a text."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    return sorted(found - {None})
