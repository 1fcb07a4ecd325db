"""Connections that nobody can hold for nothing: before a whole request is here there is no token to ask for."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from cloob.serve.settings import ServeConfig


class Connection(H11Protocol):
    """A connection that is closed where the head of a request does not come in time.

    Where there are too many, the one that has waited longest for its client is closed for the new one, those that are
    in the middle of a request's body last. uvicorn itself closes what is idle between two requests.

    Attributes:
        limits: Of the server.
    """

    limits: ClassVar[ServeConfig] = ServeConfig()

    _late: asyncio.TimerHandle | None = None
    _since = 0.0  # when the client was last heard of with something to do, seconds of the loop's clock

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > self.limits.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """Takes what the client sent."""
        asks = self._asks
        super().data_received(data)
        if not self._asks:
            self._expect_head()
        elif not asks:
            self._since = self.loop.time()
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the waiting."""
        self._forget_head()
        super().connection_lost(exc)

    @property
    def _asks(self) -> bool:
        """Whether a request is under way: its head is here, its answer not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _waits(self) -> bool:
        """Whether it is the client's turn."""
        return not self.transport.is_closing() and (not self._asks or self.cycle.more_body)

    def _expect_head(self) -> None:
        if self._late is None:
            self._since = self.loop.time()
            self._late = self.loop.call_later(self.limits.max_wait_seconds, self._head_is_late)

    def _forget_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _head_is_late(self) -> None:
        self._late = None
        if not self._asks:
            self.transport.abort()

    def _make_room(self) -> None:
        held = [each for each in self.connections if isinstance(each, Connection) and not each.transport.is_closing()]
        if len(held) > self.limits.max_connections:
            waiting = [each for each in held if each._waits and each is not self]
            longest = min(waiting, key=lambda each: (each._asks, each._since), default=self)
            longest.transport.abort()


def connections(config: ServeConfig) -> type[Connection]:
    """The connections of a server with these limits, as :class:`uvicorn.Config` takes them for ``http``."""
    return type("Connection", (Connection,), {"limits": config})
