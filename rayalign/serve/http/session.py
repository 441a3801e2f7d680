"""A `requests` session whose requests end, however lively the other side is.

    request -> timer -> connection -> TLS -> headers -> body -> response
                 | its time is over: shuts the connection down, and whatever waits for it is over
                 v
               requests.Timeout

The `timeout` of requests is the longest silence, so that a server that sends a byte now and then holds a request for
ever.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class EndingSession(requests.Session):
    """Makes one request at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._lines = _Lines()
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter(self._lines))

    def request_within(self, seconds: float, method: str, url: str, **options: Any) -> requests.Response:
        """The whole response. Raises `requests.Timeout` when its time is over, and as `request` does."""
        self._lines.over.clear()
        timer = threading.Timer(seconds, self._lines.cut)
        timer.daemon = True
        timer.start()
        try:
            response = self.request(method, url, **options)
        except requests.RequestException:
            if not self._lines.over.is_set():
                raise
        finally:
            timer.cancel()
            timer.join()  # it must not cut the next request off
            self._lines.close_ended()
        # A body of unknown length ends where its connection does, so what was cut off may look whole.
        if self._lines.over.is_set():
            raise requests.Timeout(f"not over after {seconds:g} s")
        return response


class _Lines:
    """The connections of a session, each by a second descriptor: TLS takes the first one away from its socket."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._ended: list[socket.socket] = []
        self._mutex = threading.Lock()

    def add(self, line: socket.socket) -> None:
        """Cut this one off with the others; at once, if it comes too late."""
        with self._mutex:
            self._open.add(line)
        if self.over.is_set():
            _shut(line)

    def end(self, line: socket.socket) -> None:
        """Its connection was closed, which says nothing of the response: http.client does so before it reads a body
        of unknown length. So the line stays open until the request is over.
        """
        self._ended.append(line)

    def close_ended(self) -> None:
        """The request is over."""
        while self._ended:
            self._ended.pop().close()

    def cut(self) -> None:
        """Shut all down. Those that are idle are made anew when they are needed."""
        self.over.set()
        with self._mutex:
            lines = list(self._open)
        for line in lines:
            _shut(line)


def _shut(line: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        line.shutdown(socket.SHUT_RDWR)


class _Adapter(HTTPAdapter):
    """Has `lines` know of each connection, proxies' included."""

    def __init__(self, lines: _Lines) -> None:
        self._pools = {"http": _known_to(lines, HTTPConnectionPool), "https": _known_to(lines, HTTPSConnectionPool)}
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        """Called by requests."""
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Called by requests. SOCKS has connections of its own kind, whose requests end by silence alone."""
        manager = super().proxy_manager_for(proxy, **options)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = self._pools
        return manager


def _known_to(lines: _Lines, pool: Any) -> Any:
    """`pool`, whose connections `lines` knows."""

    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        line: socket.socket | None = None

        def _new_conn(self) -> socket.socket:
            made: socket.socket = super()._new_conn()
            self.line = made.dup()
            lines.add(self.line)
            return made

        def close(self) -> None:
            super().close()
            if self.line is not None:
                lines.end(self.line)
                self.line = None

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})
