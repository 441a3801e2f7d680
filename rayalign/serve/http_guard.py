"""What stands before every HTTP application that others may reach: who may ask, how much, and how many at once.

    request -> too many at once? 429 -> wrong site? 403 -> no token? 401 -> too many wrong ones? 429
            -> wrong type of body? 415 -> body too large or too slow? 413, 408 -> app

Pure ASGI, no framework. A body is read whole before the application sees the request: what is served here takes small
JSON objects, and the application never waits for a slow sender. Only a digest of the token is kept, so that nothing
that is pickled, logged or shown has the token in it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rayalign.errors import ConfigError
from rayalign.serve.attempts import Attempts, address_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SHORTEST_TOKEN, LONGEST_TOKEN = 16, 512
"""Characters; `python -c "import secrets; print(secrets.token_urlsafe())"` makes 43."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
CALLER = "rayalign.caller"
"""Key of a scope: the name of who asks; empty where nobody has a name."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Whom the guard lets in."""

    token_digest: str = ""
    """SHA-256 of the bearer token, hex (`digest`); empty and no `callers`: none is asked for, and then only loopback
    names are answered."""
    callers: tuple[tuple[str, str], ...] = ()
    """Names and digests of tokens, where each caller has one: the application finds the name at `scope[CALLER]`."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request."""
    max_requests: int = 256
    """Requests that are worked on at the same time; more are told to come back."""
    body_timeout_s: float = 30.0
    """Longest wait for a request's body."""
    body_type: str = ""
    """Media type that bodies of POST requests must say they have; empty: any."""
    open_paths: tuple[str, ...] = ("/health",)
    """Paths that are answered without a token; they must tell nothing."""


class RequestLimit:
    """Middleware that hands on so many requests at the same time; more are told to come back."""

    def __init__(self, app: App, max_requests: int, error: Callable[[int, str], dict[str, Any]] | None = None) -> None:
        """`error` makes the body of the refusal, out of its status and its words; None: as OpenAI's clients read it."""
        self.app, self.max_requests, self.error = app, max_requests, error
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, if there is a place for it. What is no request takes none."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._running >= self.max_requests:
            told = "This server has too many requests to work on; try again."
            await refuse(send, 429, told, {"retry-after": "1"}, self.error)
            return
        self._running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running -= 1


class HttpGuard:
    """Middleware around an ASGI application."""

    def __init__(self, app: App, config: GuardConfig) -> None:
        self.app, self.config = app, config
        self.attempts = Attempts()
        self._limited = RequestLimit(self._guarded, config.max_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an HTTP request, or hand it on. What is not HTTP (start-up and shut-down) is handed on; no sockets."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self._limited(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._who(scope) or self._type(scope)
        body = b""
        if refusal is None:
            refusal, body = await self._body(scope, receive)
        if refusal is not None:
            await refuse(send, *refusal)
            return
        await self.app(scope, _once(body, receive), send)

    def _who(self, scope: Scope) -> tuple[int, str, dict[str, str]] | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if origin is not None and not same_site(origin, host):
            return 403, "This request comes from a page of another site.", {}
        scope[CALLER] = ""
        known = self.config.callers or (("", self.config.token_digest),)
        if not known[0][1]:
            # A page that a browser shows may have its name point here; such a name is never a loopback name.
            if _hostname(host) not in LOOPBACK_NAMES:
                return 403, "Without a token this server answers at its loopback address only.", {}
            return None
        if scope["path"] in self.config.open_paths:
            return None
        kind, _, token = headers.get(b"authorization", "").partition(" ")
        given, address = digest(token.strip()), address_of(scope)
        if token and (pause := self.attempts.wait_s(address, given)):
            return 429, "Too many wrong tokens came from your address; wait.", {"retry-after": str(pause)}
        # Every digest is compared, whatever the outcome: the time taken says nothing about them.
        found = [name for name, expected in known if hmac.compare_digest(given, expected)]
        if kind.lower() != "bearer" or not found:
            if token:
                self.attempts.wrong(address)
            return 401, "This server needs its token: Authorization: Bearer ...", {"www-authenticate": "Bearer"}
        self.attempts.right(address, given)
        scope[CALLER] = found[0]
        return None

    def _type(self, scope: Scope) -> tuple[int, str, dict[str, str]] | None:
        """A page of another site can send forms and plain text without asking first, but not, say, JSON."""
        if not self.config.body_type or scope["method"] != "POST":
            return None
        declared = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
        if declared.partition(b";")[0].strip().lower() == self.config.body_type.encode():
            return None
        return 415, f"The body must be {self.config.body_type}, and the Content-Type header has to say so.", {}

    async def _body(self, scope: Scope, receive: Receive) -> tuple[tuple[int, str, dict[str, str]] | None, bytes]:
        limit = self.config.max_body_bytes
        too_large = 413, f"The body has more than {limit} bytes.", {"connection": "close"}
        declared = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"0")
        if not declared.isdigit() or int(declared) > limit:
            return too_large, b""
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return (400, "The request ended before its body did.", {}), b""
                    body += message.get("body", b"")
                    if len(body) > limit:
                        return too_large, b""
                    if not message.get("more_body", False):
                        return None, bytes(body)
        except TimeoutError:
            return (408, f"The body did not arrive in {self.config.body_timeout_s:g} s.", {"connection": "close"}), b""


def _once(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body is at hand."""
    there = True

    async def next_message() -> Message:
        nonlocal there
        if there:
            there = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return next_message


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def refuse(
    send: Send,
    status: int,
    message: str,
    headers: MutableMapping[str, str] | None = None,
    error: Callable[[int, str], dict[str, Any]] | None = None,
) -> None:
    """Answer with an error; `error` makes its body, if it is not to be `error_body`."""
    body = json.dumps((error or error_body)(status, message)).encode()
    every = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    raw = [(name.encode(), value.encode()) for name, value in every.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


# -- tokens -----------------------------------------------------------------------------------------------------------
def digest(token: str) -> str:
    """What is kept of a token: its SHA-256, hex. Tokens are long and random, so that nobody finds them from it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read_token(file: str | Path | None, variable: str) -> str:
    """The digest of the token that `find_token` finds; empty if there is none. Raises as it does."""
    token = find_token(file, variable)
    return digest(token) if token else ""


def find_token(file: str | Path | None, variable: str) -> str:
    """The token in `file`, or in the environment variable `variable`; empty if neither is there. For who shows it.

    Never an option of a command: those are shown to everybody on the machine. Raises `ConfigError`, without the token,
    for a file that can't be read and for a token that can be guessed.
    """
    if file is not None:
        try:
            token, where = Path(file).read_text(encoding="utf-8").strip(), f"token file {str(file)!r}"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"token file {str(file)!r} can't be read: {type(error).__name__}.") from None
    else:
        token, where = os.environ.get(variable, "").strip(), f"environment variable {variable}"
        if not token:
            return ""
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise ConfigError(
            f"{where}: a token is one word of {SHORTEST_TOKEN} to {LONGEST_TOKEN} ASCII characters. Make one: "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token


def same_site(origin: str, host: str) -> bool:
    """Whether the page of that `Origin` is of the `Host` that is asked; a text that is no address is of no site."""
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _hostname(host: str) -> str | None:
    """The name in a `Host`, without the port; None where there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
