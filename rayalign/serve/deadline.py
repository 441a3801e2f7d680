"""Calls over the network that end, however lively the other side is.

    call -> event loop in a thread -> connection, TLS, headers, body -> what it brings
                 | its time is over: whatever it waits for is broken off
                 v
               TimeoutError

The timeouts of HTTP clients are the longest silence, so that a server that sends a byte now and then holds a call for
ever.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

LONGEST_IN_SILENCES = 3
"""A call takes at most so many times the longest silence that it allows."""

T = TypeVar("T")


class Deadlines:
    """Runs calls of an asynchronous client for threads that are not. Thread-safe.

    `close` closes the client's connections, when this object is no more.
    """

    def __init__(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="calls", daemon=True).start()
        weakref.finalize(self, _end, self._loop, close).atexit = False

    def within(self, seconds: float, call: Awaitable[T]) -> T:
        """What `call` brings. Raises `TimeoutError` when its time is over; its connection is closed then."""
        return asyncio.run_coroutine_threadsafe(_within(seconds, call), self._loop).result()


async def _within(seconds: float, call: Awaitable[T]) -> T:
    async with asyncio.timeout(seconds):
        return await call


def _end(loop: asyncio.AbstractEventLoop, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Close the connections, then stop the loop, whose thread ends with it."""
    closing = asyncio.run_coroutine_threadsafe(close(), loop)
    closing.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
