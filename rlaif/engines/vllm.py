"""vLLM in this process: its own scheduler decides what runs together, so requests are handed over as they come."""

from __future__ import annotations

import asyncio
import inspect
import os
from contextlib import aclosing
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from typing import Any

import torch
from transformers import AutoConfig

from rlaif.engines import whole_choices
from rlaif.engines.chat import Chat, cannot_load, first_words, identified, load_tokenizer, own_seed
from rlaif.records import Completion, FatalError, Request, RlaifError, TransientError, UsageError

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
TOP_LOGPROBS = 20
"""How many of the most probable tokens to ask for where a version of vLLM cannot be asked for certain ones."""

CLOSING = 20.0
"""Seconds that vLLM's process has to end before it is killed."""


class VllmEngine:
    """Runs `model`, a folder or a name on the hub or `embedded`, with vLLM; the prefixes that prompts share are cached.

    Log-probabilities are over the whole vocabulary, from the logits before temperature and top_p (vLLM's own setting
    unless told otherwise, `logprobs_mode` raw_logprobs). With a seed, a sample does not depend on the requests beside it,
    except where rounding tips a close draw.

    dtype: `bf16` (unless given) or `fp32`. max_model_len: tokens of prompt and answer together; the model's own unless
    given. gpu_memory_utilization: share of the GPU's memory to take. trust_remote_code: run the code that comes with a
    model. A build of vLLM for the CPU takes $VLLM_CPU_KVCACHE_SPACE GiB for its cache, 2 unless set.

    Raises: UsageError for an unknown dtype, FatalError where vLLM is missing or cannot start.
    """

    def __init__(
        self,
        model: str,
        dtype: str | None = None,
        max_model_len: int | None = None,
        gpu_memory_utilization: float | None = None,
        trust_remote_code: bool = False,
    ):
        dtype = dtype or "bf16"
        if dtype not in DTYPES:
            raise UsageError(f"unknown dtype '{dtype}': choose one of {', '.join(DTYPES)}")
        if find_spec("vllm") is None:
            raise FatalError("vLLM is not installed: pip install 'rlaif[vllm]'")
        name, source = model, model
        if model == "embedded":
            from rlaif.engines import embedded

            name, source = embedded.NAME, str(embedded.embedded_model())
        self.identity: dict[str, Any] = {"engine": "vllm", "dtype": dtype, **identified(name)}
        tokenizer = load_tokenizer(source, trust_remote_code)
        settings = {"max_model_len": max_model_len, "gpu_memory_utilization": gpu_memory_utilization}
        try:
            self._llm = _start(
                model=source,
                dtype=DTYPES[dtype],
                trust_remote_code=trust_remote_code,
                **{key: value for key, value in settings.items() if value is not None},
            )
        except Exception as error:
            raise cannot_load(name, error) from error
        self._chat = Chat(tokenizer, name, self._llm.model_config.max_model_len)
        self.notes = self._chat.notes
        self._numbers = count()
        self._flying: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def complete(self, request: Request) -> Completion:
        if self._closed:
            raise FatalError("the engine is closed")
        if split := self._chat.split_choices(request.choices):
            simple = replace(request, choices=tuple(c for c in request.choices if c not in split))
            return await whole_choices(request, split, self.complete, await self.complete(simple))
        ids = self._chat.render(request)
        spellings = self._chat.choice_ids(request.choices)
        flying = asyncio.create_task(self._answer(request, ids, spellings))
        self._flying.add(flying)
        flying.add_done_callback(self._flying.discard)
        try:
            answer = await flying
        except asyncio.CancelledError:
            if self._closed:
                raise FatalError("the engine was closed before this request was answered") from None
            raise
        except Exception as error:
            raise self._failure(error) from error
        said = answer.outputs[0]
        found, floor = None, None
        if request.choices:
            found, floor = _choices(said.logprobs[0], spellings)
        return Completion(
            said.text,
            found,
            floor,
            said.finish_reason,
            prompt_tokens=len(ids),
            completion_tokens=len(said.token_ids),
            # vLLM adds up the log-probability of each token it generated, those of a stop text and the last one included.
            logprob=said.cumulative_logprob if request.logprob and not request.choices else None,
        )

    async def close(self) -> None:
        """Give up what is in flight and end vLLM's process."""
        self._closed = True
        for task in self._flying:
            task.cancel()
        await asyncio.gather(*self._flying, return_exceptions=True)
        if self._llm:
            self._llm.shutdown(timeout=CLOSING)
        self._llm = None  # else it tries again when Python itself shuts down, and complains

    async def _answer(self, request: Request, ids: list[int], spellings: dict[str, list[int]]) -> Any:
        """The finished answer; vLLM drops a request whose task is cancelled."""
        parameters = _parameters(request, ids, spellings)
        async with aclosing(self._llm.generate({"prompt_token_ids": ids}, parameters, str(next(self._numbers)))) as answers:
            return [answer async for answer in answers][-1]  # FINAL_ONLY: there is but one

    def _failure(self, error: Exception) -> RlaifError:
        from vllm.exceptions import VLLMClientError

        if self._llm.errored:
            return FatalError(f"vLLM stopped: {first_words(error)}")
        if isinstance(error, VLLMClientError | ValueError):
            return FatalError(f"vLLM refuses the request: {first_words(error)}")
        return TransientError(f"vLLM failed: {first_words(error)}")


def _start(model: str, trust_remote_code: bool, **settings: Any) -> Any:
    """vLLM's engine, in a process of its own: half a minute."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of each weight that it converts
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is None:
        # The last layer in float32: logits in bf16 have steps of 1/8 from 16 up, which is much for a log-ratio.
        settings["hf_overrides"] = {"head_dtype": "float32"}
    if current_platform.is_cpu():
        # A prompt that is computed in parts makes vLLM rewind its request's source of randomness, which torch cannot on a CPU.
        settings |= {"enable_chunked_prefill": False}
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            trust_remote_code=trust_remote_code,
            enable_prefix_caching=True,
            enforce_eager=current_platform.is_cpu(),
            max_logprobs=TOP_LOGPROBS,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **settings,
        )
    )


def _parameters(request: Request, ids: list[int], spellings: dict[str, list[int]]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted: dict[str, Any] = {}
    if spellings and "logprob_token_ids" in inspect.signature(SamplingParams).parameters:
        wanted = {"logprob_token_ids": [i for found in spellings.values() for i in found]}
    elif spellings:
        wanted = {"logprobs": TOP_LOGPROBS}
    else:
        wanted = _for_whole_answers(request)
    return SamplingParams(
        max_tokens=1 if spellings else request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=own_seed(request, ids),
        output_kind=RequestOutputKind.FINAL_ONLY,
        **wanted,
    )


def _for_whole_answers(request: Request) -> dict[str, Any]:
    """The arguments for what only requests without choices may ask for."""
    wanted: dict[str, Any] = {}
    if request.stop:
        # Of stop texts that one token completes, vLLM takes the first of the list: the longest, as the other engines do.
        wanted |= {"stop": sorted(request.stop, key=len, reverse=True), "include_stop_str_in_output": False}
    if request.logprob:
        wanted |= {"logprobs": 0}  # of no other tokens than those generated
    return wanted


def _choices(reported: dict[int, Any], spellings: dict[str, list[int]]) -> tuple[dict[str, float], float | None]:
    """Log-probability of each choice that was reported; and the least one reported, where a choice is missing."""
    logprobs = {token: entry.logprob for token, entry in reported.items()}
    found = {}
    for choice, ids in spellings.items():
        known = [logprobs[i] for i in ids if i in logprobs]
        if known:
            found[choice] = torch.tensor(known, dtype=torch.float64).logsumexp(0).item()
    complete = all(i in logprobs for ids in spellings.values() for i in ids)
    return found, None if complete else min(logprobs.values())
