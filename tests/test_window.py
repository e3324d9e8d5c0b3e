"""The window: additive increase, multiplicative decrease, and places that are neither lost nor given twice."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif.window import SHRINK, Window


def test_a_window_full_of_answers_widens_it_by_one_call_up_to_the_most() -> None:
    window = Window(12, 10)
    for number in range(10):
        window.widen(number)
    assert 10.9 < window.width < 11
    for number in range(100):
        window.widen(number)
    assert window.width == 12


def test_congestion_narrows_it_once_for_all_calls_that_were_sent_before() -> None:
    async def go() -> None:
        window = Window(10)
        numbers = [await window.__aenter__() for _ in range(10)]
        for number in numbers:
            window.narrow(number)
        assert window.width == 10 * SHRINK
        await window.__aexit__(None, None, None)
        await window.__aexit__(None, None, None)
        await window.__aexit__(None, None, None)
        later = await window.__aenter__()
        window.narrow(later)
        assert window.width == 10 * SHRINK  # no call that was sent since has been answered
        window.widen(numbers[3])
        window.narrow(later)
        width = window.width
        assert width > 10 * SHRINK
        window.widen(later)
        await window.__aexit__(None, None, None)
        window.narrow(await window.__aenter__())
        assert window.width == pytest.approx((width + 1 / width) * SHRINK)

    asyncio.run(go())


def test_it_never_closes() -> None:
    window = Window(3)
    for number in range(1, 100):
        window._sent, window._settled = number, True
        window.narrow(number)
    assert window.width == 1


@settings(max_examples=40, deadline=None)
@given(most=st.integers(1, 5), calls=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_calls_that_are_given_up_at_any_moment_leave_no_place_taken(most: int, calls: int, seed: int) -> None:
    draw = random.Random(seed)

    async def go() -> None:
        window, inside, most_inside, order = Window(most), 0, 0, []

        async def call(number: int) -> None:
            nonlocal inside, most_inside
            async with window:
                inside += 1
                order.append(number)
                most_inside = max(most_inside, inside)
                try:
                    for _ in range(draw.randrange(4)):
                        await asyncio.sleep(0)
                finally:
                    inside -= 1

        tasks = [asyncio.create_task(call(n)) for n in range(calls)]
        for task in draw.sample(tasks, calls // 2):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (inside, window.flying, len(window._waiting)) == (0, 0, 0)
        assert most_inside <= most
        assert order == sorted(order)  # first come, first served

    asyncio.run(go())


class Warped(asyncio.SelectorEventLoop):
    """Time goes on to the next event at once, so that nothing depends on how busy this machine is."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


@pytest.mark.parametrize("allowed", [30.0, 200.0, 1000.0])
@pytest.mark.parametrize("latency", [0.01, 0.05])
def test_it_finds_what_a_server_takes_a_second(allowed: float, latency: float) -> None:
    """A bucket that allows so many calls a second, a tenth of them at once, of 100 that would be in flight."""

    async def go() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        window, bucket, filled = Window(100), allowed / 10, loop.time()
        answered: list[float] = []

        async def work() -> None:
            nonlocal bucket, filled
            while len(answered) < 4 * allowed:
                async with window as number:
                    now = loop.time()
                    bucket, filled = min(bucket + (now - filled) * allowed, allowed / 10), now
                    if bucket >= 1:
                        bucket -= 1
                        await asyncio.sleep(latency)
                        window.widen(number)
                        answered.append(loop.time())
                        continue
                    window.narrow(number)
                    await asyncio.sleep(0.075)  # as the runner does
                await asyncio.sleep(0.375)

        await asyncio.gather(*(work() for _ in range(100)))
        late = answered[len(answered) // 2 :]
        return (len(late) - 1) / (late[-1] - late[0]), window.width

    with asyncio.Runner(loop_factory=Warped) as runner:
        rate, width = runner.run(go())
    assert 0.8 * allowed <= rate <= 1.2 * allowed
    assert width < 100
