"""How many calls may be in flight: a window that widens while calls are answered, and narrows when a server has enough."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

SHRINK = 0.8
"""What a sign of congestion leaves of the width. It is less gentle to halve it, as TCP does, and loses more of the rate."""


class Window:
    """Places for calls: `async with window as number:` waits for one, first come first served.

    Additive increase, multiplicative decrease (Chiu and Jain, Computer Networks and ISDN Systems 17, 1989): a window full of
    answers widens it by one call, up to `most`; a sign of congestion narrows it, once a round trip: what comes before a call
    that was sent after it is answered tells of the same congestion. `start`: its width at first, `most` unless given.
    """

    def __init__(self, most: int, start: int | None = None):
        self.most, self.width = most, float(min(start or most, most))
        self.flying = 0
        self._sent = self._narrowed = 0  # calls that were sent, and those before the window was last narrowed
        self._settled = True
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> int:
        if self._waiting or self.flying >= int(self.width):
            place = asyncio.get_running_loop().create_future()
            self._waiting.append(place)
            try:
                await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled():  # it had been given a place, and will not take it
                    self._leave()
                raise
        else:
            self.flying += 1
        self._sent += 1
        return self._sent

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def widen(self, number: int) -> None:
        """The call of this number was answered."""
        self.width = min(self.width + 1 / self.width, float(self.most))
        self._settled = self._settled or number > self._narrowed

    def narrow(self, number: int) -> None:
        """The call of this number met congestion."""
        if self._settled and number > self._narrowed:
            self.width = max(self.width * SHRINK, 1.0)
            self._narrowed, self._settled = self._sent, False

    def _leave(self) -> None:
        self.flying -= 1
        while self._waiting and self.flying < int(self.width):
            place = self._waiting.popleft()
            if not place.done():  # else whoever waited has given up
                self.flying += 1
                place.set_result(None)
