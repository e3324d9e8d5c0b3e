"""Any server that speaks OpenAI's chat API: OpenAI itself, vLLM, SGLang, llama.cpp, LiteLLM, OpenRouter …"""

from __future__ import annotations

import email.utils
import math
import os
import re
import time
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from rlaif.engines import beginnings, whole_choices
from rlaif.records import (
    Completion,
    FatalError,
    NoLogprobsError,
    RefusedError,
    Request,
    RlaifError,
    RowError,
    TransientError,
    UsageError,
)

OPENAI = "https://api.openai.com/v1"
CONTINUING = ("vllm", "sglang")
"""Servers, as their model list names itself the owner, that can go on with an assistant's turn that was begun."""

TOO_LONG = re.compile(
    r"context.?length|context window|maximum (?:context|model) length|too many tokens|prompt is too long", re.I
)
STOPS = 4
"""The most stop texts that OpenAI takes."""

UNTOLD = -9999.0
"""What OpenAI reports in place of the log-probability of a token that is not among the most probable."""

TOP_LOGPROBS = (20, 5)
"""How many of the most probable tokens to ask for: OpenAI's limit, then that of servers that give fewer."""


class OpenAIEngine:
    """Sends requests to `base_url` with the key in the environment variable OPENAI_API_KEY.

    On making, asks the server for its models, which costs nothing and shows at once a wrong key or a server that is not
    there. `prefill` says whether the server can go on with an assistant's turn that the template began; unless given, it
    is what the model list tells. Where the server gives no log-probabilities, `complete` raises NoLogprobsError and
    a note says so.

    An answer's own log-probability is the sum of what the server reports for its tokens, None (and a note) where it
    refuses to or leaves one out. OpenAI reports it under the model itself, as vLLM does unless told otherwise; some servers
    report it after temperature and top_p. They differ, too, in whether they report the end-of-turn token and a stop text's.

    Raises: UsageError without key or model, FatalError where the server does not answer or refuses the key.
    """

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        prefill: bool | None = None,
        timeout: float = 120.0,
    ):
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise UsageError(f"--base-url must begin with http:// or https://, got {_public(self.base_url)}")
        if "@" in urlsplit(self.base_url).netloc:
            raise UsageError("--base-url: no user or password there: the key goes into the environment variable OPENAI_API_KEY")
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self._key and self.base_url == OPENAI:
            raise UsageError("no key: set the environment variable OPENAI_API_KEY (or --base-url for a server without one)")
        owners = self._models()
        self.model = model or self._only(owners)
        if prefill is None:
            prefill = owners.get(self.model, "") in CONTINUING
        self.identity: dict[str, Any] = {
            "engine": "openai",
            "model": self.model,
            "base_url": _public(self.base_url),
            "prefill": prefill,
        }
        self.notes: list[str] = []
        self._prefill = prefill
        self._top = 0  # index into TOP_LOGPROBS; past its end: the server gives none
        self._sums = True  # whether to ask for the log-probabilities of whole answers
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self.base_url,
            max_retries=0,  # the runner retries, for every engine alike
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(timeout=timeout),
        )

    def _models(self) -> dict[str, str]:
        """The server's models and their owners; nothing where it has no such list."""
        try:
            with openai.OpenAI(api_key=self._key or "none", base_url=self.base_url, max_retries=2, timeout=20) as client:
                return {m.id: m.owned_by or "" for m in client.models.list().data}
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise FatalError(f"the server refused the key: {self._words(error)}") from error
        except openai.APIStatusError:
            return {}
        except openai.APIConnectionError as error:
            raise FatalError(f"no server answers at {_public(self.base_url)}: {self._words(error)}") from error
        except (ValueError, TypeError, AttributeError):  # some other JSON, or none
            return {}

    def _only(self, owners: dict[str, str]) -> str:
        if len(owners) != 1:
            known = f"; the server has {', '.join(sorted(owners)[:10])}" if owners else ""
            raise UsageError(f"--engine openai needs --model{known}")
        return next(iter(owners))

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, request: Request) -> Completion:
        top = TOP_LOGPROBS[self._top] if self._top < len(TOP_LOGPROBS) else None
        if request.choices and top is None:
            raise NoLogprobsError("the server gives no log-probabilities")
        arguments = self._arguments(request, top)
        try:
            answer = await self._client.chat.completions.create(**arguments)
        except openai.BadRequestError as error:
            if "logprobs" in arguments and "logprobs" in str(error):
                return await self._with_fewer(request, top)
            raise self._too_many_stops(error, request) or self._failure(error) from error
        except openai.OpenAIError as error:
            raise self._failure(error) from error
        except ValueError as error:
            raise TransientError(f"the server's answer is not JSON: {error}") from error
        completion = self._read(answer, request)
        missing = {c: s for c, s in beginnings(request.choices).items() if c not in (completion.logprobs or {})}
        if not (missing and self._prefill):
            return completion
        return await whole_choices(request, missing, self.complete, completion)

    async def _with_fewer(self, request: Request, top: int | None) -> Completion:
        """The server refuses `top` log-probabilities: ask for fewer, of this request and all that follow."""
        if not request.choices:
            self._sums = False
            self._note_no_sums()
        elif top in TOP_LOGPROBS[self._top : self._top + 1]:  # else another call in flight found out before this one
            self._top += 1
            if self._top == len(TOP_LOGPROBS):
                self._note_sampled()
        return await self.complete(request)

    def _note_sampled(self) -> None:
        note = "the server gives no log-probabilities: soft labels are the shares of sampled verdicts"
        if note not in self.notes:
            self.notes.append(note)

    def _note_no_sums(self) -> None:
        note = "the server does not give the log-probabilities of all answers"
        if note not in self.notes:
            self.notes.append(note)

    def _arguments(self, request: Request, top: int | None) -> dict[str, Any]:
        messages: list[dict[str, str]] = [dict(m) for m in request.messages]  # type: ignore[arg-type]
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": request.temperature,
            "top_p": request.top_p,
            # OpenAI's newer models know only the second name, most other servers only the first.
            "max_completion_tokens" if self.base_url == OPENAI else "max_tokens": request.max_tokens,
        }
        if request.seed is not None:
            # One seed for all samples would give a server that honours it the same answer each time.
            arguments["seed"] = (request.seed * 1_000_003 + request.sample) % 2**31
        if request.choices:
            arguments |= {"logprobs": True, "top_logprobs": top}
        elif request.logprob and self._sums:
            arguments["logprobs"] = True
        if request.stop and not request.choices:
            arguments["stop"] = list(request.stop)
        if self._prefill and request.prefix:
            messages.append({"role": "assistant", "content": request.prefix})
            arguments["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
        return arguments

    def _read(self, answer: ChatCompletion, request: Request) -> Completion:
        if not isinstance(answer, ChatCompletion) or not answer.choices:
            raise TransientError("the server's answer holds no completion")
        choice, usage = answer.choices[0], answer.usage
        completion = Completion(
            text=choice.message.content or "",
            finish=choice.finish_reason,
            refusal=choice.message.refusal,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            cost=getattr(usage, "cost", None),
        )
        if completion.refusal or completion.finish == "content_filter":
            return completion
        if not request.choices:
            return self._with_sum(completion, choice) if request.logprob else completion
        first = choice.logprobs.content[0] if choice.logprobs and choice.logprobs.content else None
        if first is None or not first.top_logprobs:
            self._top = len(TOP_LOGPROBS)
            self._note_sampled()
            raise NoLogprobsError("the server gives no log-probabilities", completion)
        reported = {t.token: t.logprob for t in first.top_logprobs}
        return Completion(
            completion.text,
            choice_logprobs(reported, request.choices),
            min(reported.values()),
            completion.finish,
            None,
            completion.prompt_tokens,
            completion.completion_tokens,
            completion.cost,
        )

    def _with_sum(self, completion: Completion, choice: Choice) -> Completion:
        """The completion with its log-probability, where the server reports that of each token."""
        tokens = choice.logprobs.content if choice.logprobs else None
        values = [token.logprob for token in tokens or ()]
        if values and all(isinstance(value, int | float) and value > UNTOLD for value in values):
            return replace(completion, logprob=math.fsum(values))
        if completion.text:  # else there may have been no token to report
            self._note_no_sums()
        return completion

    def _too_many_stops(self, error: openai.BadRequestError, request: Request) -> FatalError | None:
        words = self._words(error)
        if len(request.stop) <= STOPS or "stop" not in words.lower():
            return None
        return FatalError(f"the server refuses {len(request.stop)} stop texts (OpenAI takes at most {STOPS}): {words}")

    def _failure(self, error: openai.OpenAIError) -> RlaifError:
        """What an SDK error means for the run."""
        words = self._words(error)
        if isinstance(error, openai.APITimeoutError):
            return TransientError("the server did not answer in time")
        if isinstance(error, openai.APIConnectionError):
            return TransientError(f"no connection to {_public(self.base_url)}: {words}")
        if isinstance(error, openai.APIStatusError):
            return _status_failure(error, words)
        return TransientError(f"the server's answer cannot be read: {words}")

    def _words(self, error: Exception) -> str:
        """The server's own words, on one line, never with the key."""
        body = getattr(error, "body", None)
        text = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(text or error).split())[:500]
        return text.replace(self._key, "[key]") if self._key else text


def _status_failure(error: openai.APIStatusError, words: str) -> RlaifError:
    status = error.status_code
    if status == 429 and error.code != "insufficient_quota":
        return TransientError(f"429: {words}", _retry_after(error))
    if status in (408, 409, 425) or status >= 500:
        return TransientError(f"{status}: {words}", _retry_after(error))
    if error.code == "context_length_exceeded" or status == 413 or (status == 400 and TOO_LONG.search(words)):
        return RowError(f"the prompt is too long for the model: {words}")
    if error.code in ("content_filter", "content_policy_violation"):
        return RefusedError(f"the server's content filter: {words}")
    return FatalError(f"the server says {status}: {words}")


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds from the header Retry-After (a number or a date); at most ten minutes."""
    value = error.response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        if date is None:
            return None
        seconds = email.utils.mktime_tz(date) - time.time()
    return min(max(seconds, 0.0), 600.0) if math.isfinite(seconds) else None


def choice_logprobs(reported: dict[str, float], choices: tuple[str, ...]) -> dict[str, float]:
    """Log-probability of each choice: of all reported tokens that are the choice but for white space around it.

    >>> choice_logprobs({"1": -1.0, " 2": -2.0, "The": -3.0}, ("1", "2"))
    {'1': -1.0, '2': -2.0}
    """
    found: dict[str, float] = {}
    for choice in choices:
        same = [logprob for token, logprob in reported.items() if token.strip() == choice.strip()]
        if same:
            top = max(same)
            found[choice] = top + math.log(sum(math.exp(x - top) for x in same))
    return found


def _public(url: str) -> str:
    """The URL without user, password or query, which may be secrets."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
