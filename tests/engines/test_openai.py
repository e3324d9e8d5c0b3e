"""The OpenAI engine against a real server: stop texts, the log-probability of whole answers, and servers without it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from rlaif.engines.openai import OpenAIEngine
from rlaif.records import Completion, FatalError, Request
from tests.server import Server, error

NOTE = "the server does not give the log-probabilities of all answers"


def user(content: str = "Say it.", **settings: Any) -> Request:
    return Request(({"role": "user", "content": content},), **{"max_tokens": 8, **settings})


def ask(engine: OpenAIEngine, *requests: Request) -> list[Completion]:
    """The answers to requests that are sent at the same time."""

    async def all_of_them() -> list[Completion]:
        try:
            return await asyncio.gather(*map(engine.complete, requests))
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(all_of_them(), 30))


def test_nothing_is_asked_for_that_the_request_does_not_want(server: Server) -> None:
    server.speak = lambda p: "one two three"
    (answer,) = ask(OpenAIEngine(base_url=server.url), user())
    assert set(server.bodies[0]) == {"model", "messages", "temperature", "top_p", "max_tokens"}
    assert (answer.text, answer.logprob) == ("one two three", None)


def test_the_log_probability_is_the_sum_over_the_tokens(server: Server) -> None:
    server.speak = lambda p: "one two three"
    engine = OpenAIEngine(base_url=server.url)
    (answer,) = ask(engine, user(logprob=True, temperature=0.7))
    assert server.bodies[0]["logprobs"] is True
    assert "top_logprobs" not in server.bodies[0]
    assert answer.logprob == pytest.approx(-(1 + 2 + 3) / 8)
    assert answer.logprobs is None
    assert engine.notes == []


def test_stop_texts_are_sent(server: Server) -> None:
    server.speak = lambda p: "one two\n\nthree"
    (answer,) = ask(OpenAIEngine(base_url=server.url), user(stop=("\n\n", "four"), logprob=True))
    assert server.bodies[0]["stop"] == ["\n\n", "four"]
    assert (answer.text, answer.finish) == ("one two", "stop")
    assert answer.logprob == pytest.approx(-(1 + 2) / 8)


def test_requests_with_choices_are_as_they_were(server: Server) -> None:
    requests = [
        user(choices=("1", "2"), max_tokens=1, logprob=wanted, stop=stop) for wanted, stop in ((False, ()), (True, ("1",)))
    ]
    first, second = ask(OpenAIEngine(base_url=server.url), *requests)
    assert server.bodies[0] == server.bodies[1]
    assert first == second
    assert first.logprobs is not None
    assert first.logprob is None


def test_a_server_that_refuses_log_probabilities_is_asked_again_without(server: Server) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        return error(400, "logprobs are not supported with this model") if body.get("logprobs") else None

    server.fault = fault
    server.speak = lambda p: "one two three"
    engine = OpenAIEngine(base_url=server.url)

    async def story() -> list[Completion]:
        together = await asyncio.gather(*(engine.complete(user(f"{n}", logprob=True)) for n in range(3)))
        later = await engine.complete(user("later", logprob=True, stop=("two",)))
        await engine.close()
        return [*together, later]

    *together, later = asyncio.run(asyncio.wait_for(story(), 30))
    assert [(answer.text, answer.logprob) for answer in together] == [("one two three", None)] * 3
    assert (later.text, later.logprob) == ("one ", None)
    assert engine.notes == [NOTE]
    assert len(server.bodies) == 7  # the last one is not asked in vain


def test_refusing_them_for_answers_does_not_keep_choices_from_asking(server: Server) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        return error(400, "logprobs need top_logprobs") if body.get("logprobs") and not body.get("top_logprobs") else None

    server.fault = fault
    engine = OpenAIEngine(base_url=server.url)
    spoken, chosen = ask(engine, user(logprob=True), user(choices=("1", "2"), max_tokens=1))
    assert spoken.logprob is None
    assert chosen.logprobs is not None
    assert engine.notes == [NOTE]


def test_a_server_that_gives_none_is_noted_once(server: Server) -> None:
    server.logprobs = 0
    server.speak = lambda p: "one two three"
    engine = OpenAIEngine(base_url=server.url)
    answers = ask(engine, user("a", logprob=True), user("b", logprob=True))
    assert [(answer.text, answer.logprob) for answer in answers] == [("one two three", None)] * 2
    assert engine.notes == [NOTE]
    assert len(server.bodies) == 2


@pytest.mark.parametrize("reported", [[-0.5, None], [-0.5, -9999.0], []], ids=["left out", "not told", "no token"])
def test_a_sum_that_lacks_a_token_is_none(server: Server, reported: list[float | None]) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        answer = server._completion(body)
        content = [{"token": "x", "logprob": value, "bytes": None, "top_logprobs": []} for value in reported]
        answer["choices"][0]["logprobs"] = {"content": content}
        return web.json_response(answer)

    server.fault = fault
    engine = OpenAIEngine(base_url=server.url)
    (answer,) = ask(engine, user(logprob=True))
    assert answer.logprob is None
    assert engine.notes == [NOTE]


def test_an_empty_answer_is_no_reason_for_a_note(server: Server) -> None:
    server.speak = lambda p: ""
    engine = OpenAIEngine(base_url=server.url)
    (answer,) = ask(engine, user(logprob=True))
    assert (answer.text, answer.logprob, engine.notes) == ("", None, [])


def test_a_server_that_refuses_so_many_stop_texts_stops_the_run(server: Server) -> None:
    stop = tuple("abcde")
    with pytest.raises(FatalError, match=r"refuses 5 stop texts \(OpenAI takes at most 4\): Invalid 'stop'"):
        ask(OpenAIEngine(base_url=server.url), user(stop=stop))
    assert ask(OpenAIEngine(base_url=server.url), user(stop=stop[:4]))


def test_another_refusal_is_not_taken_for_one_of_stop_texts(server: Server) -> None:
    async def fault(body: dict[str, Any]) -> web.StreamResponse | None:
        return error(400, "temperature must be 1")

    server.fault = fault
    with pytest.raises(FatalError, match="the server says 400: temperature"):
        ask(OpenAIEngine(base_url=server.url), user(stop=tuple("abcde"), logprob=True))


def test_the_key_of_a_request_that_wants_neither_is_what_it_was() -> None:
    """As kept in stores made before there were `stop` and `logprob`."""
    identity = {"engine": "openai", "model": "m", "base_url": "u", "prefill": False}
    request = user("x", choices=("1", "2"), temperature=0.5, seed=3, sample=1)
    assert request.key(identity) == "ff70239fdb5b23609d1fd4f7b654787232cc8b1f3fb7c2a2899d213f904b24a3"
    assert len({request.key(identity), user("x").key(identity), user("x", stop=("a",)).key(identity)}) == 3
    assert user("x", stop=("a",)).key(identity) != user("x", stop=("b",)).key(identity)
    assert user("x", logprob=True).key(identity) != user("x").key(identity)
