"""People whom other programs ask: the labelling page, and beside it the oracle's endpoints, at one address."""

from __future__ import annotations

from typing import Any

from ray import serve

from rayalign.serve.http.deployment import ServedOracle
from rayalign.serve.http_guard import App, Receive, Scope, Send
from rayalign.serve.labelling.app import build_app as build_page
from rayalign.serve.labelling.oracle import HumanOracle


class PageAndService:
    """Programs' paths go to `service`, which asks for its token; all others to `page`, where people log in."""

    def __init__(self, page: App, service: App) -> None:
        self.page, self.service = page, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand it on."""
        path = scope.get("path", "")
        of_programs = path.startswith("/v1/") or path in ("/health", "/openapi.json")
        app = self.service if of_programs or scope["type"] != "http" else self.page
        await app(scope, receive, send)


class _ServedPeople(ServedOracle):
    """The queue's only replica. What programs ask is lined up, and pending until people have voted."""

    def __serve_build_asgi_app__(self) -> PageAndService:
        assert isinstance(self.oracle, HumanOracle)
        limit = self.config.human.max_requests
        page: Any = build_page(self.oracle.queue, self.oracle.tokens, self.oracle.guidelines, max_requests=limit)
        return PageAndService(page, super().__serve_build_asgi_app__())


ServedPeople: Any = serve.ingress()(_ServedPeople)
