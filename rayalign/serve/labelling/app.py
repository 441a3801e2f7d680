"""The labelling page and its endpoints, as an ASGI application over a `DuelQueue`.

    GET  /                page (static/)
    POST /api/login       {"token"}           -> {"annotator"}, and a cookie
    POST /api/logout      {}                  -> {}
    POST /api/next        {}                  -> {"task": {"duel", "prompt", "left", "right"} or null, ...}
    POST /api/answer      {"duel", "choice"}  -> {"saved": duel, ...}      choice: left, right, tie or skip
    POST /api/undo        {"duel"}            -> {"undone": duel, ...}
    GET  /api/progress                        -> {"progress", "undo": duel or null}, which the three above have, too
    GET  /api/guidelines                      -> {"guidelines"}

More requests than may be in hand at the same time are told to come back (429).

Texts travel as JSON texts, and the page shows them as text: nothing in them is ever read as markup. A reply to an
answer or an undo means that it is on disk.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayalign.errors import LabellingError, LedgerError
from rayalign.serve.attempts import Attempts, address_of
from rayalign.serve.http_guard import RequestLimit, digest, same_site
from rayalign.serve.labelling.queue import DuelQueue
from rayalign.serve.labelling.tokens import Tokens

STATIC = Path(__file__).parent / "static"
COOKIE = "rayalign_labelling"
MAX_BODY_BYTES = 4096
"""No request has more to say than a token, or an id and a choice."""
BODY_TIMEOUT_S = 30.0
"""Longest wait for it."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
DEFAULT_GUIDELINES = (
    "Which of the two responses answers the prompt better? Judge what is said, not how long it is. Choose a tie if you "
    "see no difference that matters, and skip what you can't judge: somebody else will be asked."
)


def build_app(
    queue: DuelQueue, tokens: Tokens, guidelines: str = DEFAULT_GUIDELINES, *, max_requests: int = 256
) -> Starlette:
    """The application; of its own it keeps nothing but who has shown wrong tokens lately."""
    page = _Page(queue, tokens, guidelines)
    routes = [
        Route("/", page.index),
        Mount("/static", StaticFiles(directory=STATIC)),
        Route("/api/login", page.login, methods=["POST"]),
        Route("/api/logout", page.logout, methods=["POST"]),
        Route("/api/next", page.next, methods=["POST"]),
        Route("/api/answer", page.answer, methods=["POST"]),
        Route("/api/undo", page.undo, methods=["POST"]),
        Route("/api/progress", page.progress),
        Route("/api/guidelines", page.show_guidelines),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(_SecurityHeaders),
            Middleware(RequestLimit, max_requests, lambda _, told: {"error": told}),  # type: ignore[arg-type]
        ],
        exception_handlers={HTTPException: _refused, LabellingError: _conflict, LedgerError: _not_saved},  # type: ignore[dict-item]
    )


class _Page:
    """One method per route. The queue waits for the disk, so it is called in a thread."""

    def __init__(self, queue: DuelQueue, tokens: Tokens, guidelines: str) -> None:
        self.queue, self.tokens, self.guidelines = queue, tokens, guidelines
        self.attempts = Attempts()

    async def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def login(self, request: Request) -> Response:
        body = await _body(request, "token")
        given, address = digest(body["token"]), address_of(request.scope)
        if pause := self.attempts.wait_s(address, given):
            told = f"Too many wrong tokens came from your address. Try again in {pause} seconds."
            raise HTTPException(429, told, headers={"retry-after": str(pause)})
        name = self.tokens.owner(body["token"])
        if name is None:
            self.attempts.wrong(address)
            raise HTTPException(401, "This token is not known.")
        self.attempts.right(address, given)
        reply = JSONResponse({"annotator": name})
        secure = request.url.scheme == "https"
        reply.set_cookie(COOKIE, self.tokens.session(name), httponly=True, samesite="strict", secure=secure)
        return reply

    async def logout(self, request: Request) -> Response:
        await _body(request)
        reply = JSONResponse({})
        reply.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return reply

    async def next(self, request: Request) -> Response:
        annotator = self._annotator(request)
        await _body(request)
        task = await run_in_threadpool(self.queue.take, annotator)
        return await self._reply(annotator, task=None if task is None else asdict(task))

    async def answer(self, request: Request) -> Response:
        annotator = self._annotator(request)
        body = await _body(request, "duel", "choice")
        await run_in_threadpool(self._answer, annotator, body["duel"], body["choice"])
        return await self._reply(annotator, saved=body["duel"])

    def _answer(self, annotator: str, duel: str, side: str) -> None:
        if side not in ("left", "right", "tie", "skip"):
            raise HTTPException(400, "choice must be one of left, right, tie and skip.")
        self.queue.answer(annotator, duel, self.queue.choice_of(annotator, duel, side))

    async def undo(self, request: Request) -> Response:
        annotator = self._annotator(request)
        body = await _body(request, "duel")
        await run_in_threadpool(self.queue.undo, annotator, body["duel"])
        return await self._reply(annotator, undone=body["duel"])

    async def progress(self, request: Request) -> Response:
        return await self._reply(self._annotator(request))

    async def show_guidelines(self, request: Request) -> Response:
        self._annotator(request)
        return JSONResponse({"guidelines": self.guidelines})

    async def _reply(self, annotator: str, **more: Any) -> Response:
        progress = await run_in_threadpool(self.queue.progress, annotator)
        undo = await run_in_threadpool(self.queue.undoable, annotator)
        return JSONResponse({**more, "annotator": annotator, "progress": asdict(progress), "undo": undo})

    def _annotator(self, request: Request) -> str:
        name = self.tokens.owner_of_session(request.cookies.get(COOKIE, ""))
        if name is None:
            raise HTTPException(401, "Log in with your token first.")
        return name


async def _body(request: Request, *fields: str) -> dict[str, str]:
    """The request's JSON object with exactly these `fields`, all of them texts."""
    origin = request.headers.get("origin")
    if origin is not None and not same_site(origin, request.headers.get("host", "")):
        raise HTTPException(403, "This request comes from another site.")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "The body must be application/json.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = json.loads(await _raw(request))
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive in {BODY_TIMEOUT_S:g} s.") from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not JSON.") from None
    if not isinstance(body, dict) or set(body) != set(fields) or not all(map(_is_text, body.values())):
        raise HTTPException(400, f"The body must be an object with the texts: {', '.join(fields) or 'none'}.")
    return body


async def _raw(request: Request) -> bytes:
    raw = b""
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BODY_BYTES:
            raise HTTPException(413, f"The body has more than {MAX_BODY_BYTES} bytes.")
    return raw


def _is_text(value: Any) -> bool:
    """Half a surrogate pair is none: no reply could repeat it."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _refused(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


def _conflict(request: Request, error: LabellingError) -> Response:
    return JSONResponse({"error": str(error)}, status_code=409)


def _not_saved(request: Request, error: LedgerError) -> Response:
    return JSONResponse({"error": "The server can't write to its disk; nothing was saved."}, status_code=503)


class _SecurityHeaders:
    """Adds `HEADERS` to every response, errors and static files included."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, with_headers)
