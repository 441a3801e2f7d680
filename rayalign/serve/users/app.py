"""The endpoint as an ASGI application over a `Desk`: a chat as OpenAI's clients know it, and choices.

    GET  /health                    {"status": "ok"}, without a token
    GET  /v1/models                 the one model there is
    POST /v1/chat/completions       one answer; or two, and "comparison": {"id", "url", "expires"}
    POST /v1/comparisons/{id}       {"choice": first | second | tie | skip} -> {"id", "choice", "recorded": true}

A reply to a choice means that it is on disk. Who can't show two answers gets one: who says `n`, streams, brings
sampling settings of their own, or sends `X-Rayalign-Comparison: no`.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rayalign.serve.http_guard import CALLER, GuardConfig, HttpGuard
from rayalign.serve.policy.answerer import Answer
from rayalign.serve.policy.app import PolicyServer, tell_errors
from rayalign.serve.policy.config import PolicyServerConfig
from rayalign.serve.policy.events import stream
from rayalign.serve.policy.openai import ChatReply, ChatRequest, ModelEntry, ModelList
from rayalign.serve.users.book import Told
from rayalign.serve.users.config import UsersConfig
from rayalign.serve.users.desk import Desk
from rayalign.serve.users.questions import UserQuestion
from rayalign.system.code_version import code_version

OPT_OUT = "x-rayalign-comparison"
"""Header of a request: `no` asks for one answer."""
PATH = "/v1/comparisons/"
REFUSALS = {
    Told.UNKNOWN: (404, "There is no such comparison, or it is not yours."),
    Told.EXPIRED: (410, "This comparison is over; nothing was recorded."),
    Told.DIFFERENT: (409, "This comparison has another choice already, which stays."),
}


class ComparisonEntry(BaseModel):
    """What a reply with two answers has beside them."""

    id: str
    url: str
    """Where to post the choice."""
    expires: float
    """Until when, seconds since the epoch."""


class ComparedReply(ChatReply):
    """A reply with two answers to choose from: `first` is the choice of index 0."""

    comparison: ComparisonEntry


class ChoiceRequest(BaseModel):
    """POST /v1/comparisons/{id}."""

    model_config = ConfigDict(extra="forbid")

    choice: Literal["first", "second", "tie", "skip"]


class ChoiceReply(BaseModel):
    """It is on disk."""

    id: str
    choice: str
    recorded: Literal[True] = True


def build_app(config: UsersConfig, desk: Desk, callers: tuple[tuple[str, str], ...] = ()) -> HttpGuard:
    """The whole application, guard included; `callers` are the users' names with the digests of their tokens."""
    app = FastAPI(title="rayalign users", version=code_version(), docs_url=None, redoc_url=None, openapi_url=None)
    server = _UsersServer(config, desk)
    app.add_api_route("/health", server.health)
    app.add_api_route("/v1/models", server.models)
    app.add_api_route("/v1/models/{model:path}", server.one_model)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=ComparedReply | ChatReply)
    app.add_api_route(PATH + "{name}", server.choose, methods=["POST"], response_model=ChoiceReply)
    tell_errors(app)
    guard = GuardConfig(
        callers=callers,
        max_body_bytes=config.max_body_bytes,
        max_requests=config.max_requests,
        body_type="application/json",
    )
    return HttpGuard(app, guard)  # type: ignore[arg-type]  # the same protocol, spelled in other types


class _UsersServer:
    """One method per path. The service may be there before the run can say which policy it is."""

    def __init__(self, config: UsersConfig, desk: Desk) -> None:
        self.config, self.desk = config, desk
        self._policy: PolicyServer | None = None

    # -- paths ----------------------------------------------------------------------------------------------------
    async def health(self) -> dict[str, str]:
        await self.desk.describe()
        return {"status": "ok"}

    async def models(self) -> ModelList:
        return await (await self._server()).models()

    async def one_model(self, model: str) -> ModelEntry:
        return await (await self._server()).one_model(model)

    async def chat(self, request: ChatRequest, http: HttpRequest) -> ChatReply | Response:
        server = await self._server()
        prompt = server.chat_prompt(request)
        sampling = server.sampling(request, [prompt])
        own = server.rollout.sampling(n=1) == sampling and request.seed is None and not request.stops
        opted_out = "n" in request.model_fields_set or http.headers.get(OPT_OUT, "").lower() == "no"
        answer = await self.desk.ask(
            UserQuestion(
                prompt=prompt,
                sampling=sampling,
                owner=http.scope[CALLER],
                comparable=own and not opted_out and not request.stream,
                seed=request.seed,
                stops=tuple(request.stops),
            )
        )
        told = Answer(choices=answer.choices, sampled_tokens=answer.sampled_tokens)
        reply = server.chat_reply(request, prompt, told)
        if request.stream:
            return stream(reply, usage=request.wants_usage)
        if not answer.comparison:
            return reply
        entry = ComparisonEntry(id=answer.comparison, url=PATH + answer.comparison, expires=answer.expires)
        return ComparedReply(**dict(reply), comparison=entry)

    async def choose(self, name: str, request: ChoiceRequest, http: HttpRequest) -> ChoiceReply:
        told = await self.desk.choose(name, request.choice, http.scope[CALLER])
        if told is not Told.RECORDED:
            raise HTTPException(*REFUSALS[told])
        return ChoiceReply(id=name, choice=request.choice)

    # -- inside ---------------------------------------------------------------------------------------------------
    async def _server(self) -> PolicyServer:
        if self._policy is None:
            policy, rollout = await self.desk.describe()
            limits = PolicyServerConfig(
                model=self.config.model, max_choices=self.config.max_choices, max_messages=self.config.max_messages
            )
            unused: Any = None  # questions go to the desk, as users' answers are more than an `Answer`
            self._policy = await run_in_threadpool(PolicyServer, limits, rollout, policy, unused)
        return self._policy
