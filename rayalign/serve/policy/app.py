"""The endpoint as an ASGI application over an `Answerer`: OpenAI's paths, replies and errors.

    GET  /health                    {"status": "ok"}, without a token
    GET  /v1/models                 the one model there is
    POST /v1/chat/completions       messages, through the policy's chat template
    POST /v1/completions            texts or token ids as they are

`stream=true` gives the same replies as events.

A policy without a chat template is asked with a single user message, whose text is the prompt: as it was in training.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from rayalign.env.prompt_data import readable_messages
from rayalign.errors import DataError, RayalignError, WaitError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.encode import PromptEncoder, check_fits, context_length
from rayalign.rollout.engine import Sampling
from rayalign.serve.http_guard import HttpGuard, error_body
from rayalign.serve.policy.answerer import Answer, Answerer, Question
from rayalign.serve.policy.config import PolicyServerConfig
from rayalign.serve.policy.events import stream
from rayalign.serve.policy.openai import (
    AnswerMessage,
    ChatChoice,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    ModelEntry,
    ModelList,
    Request,
    TextChoice,
    Usage,
    before,
)
from rayalign.system.code_version import code_version
from rayalign.types import Candidate, Prompt


def build_app(config: PolicyServerConfig, rollout: RolloutConfig, policy: str, answerer: Answerer) -> HttpGuard:
    """The whole application, guard included.

    Args:
        config: names and limits.
        rollout: how the policy was sampled in training: what a request that says nothing gets.
        policy: directory of the policy, for its tokenizer.
        answerer: who answers.
    """
    app = FastAPI(title="rayalign policy", version=code_version(), docs_url=None, redoc_url=None)
    server = PolicyServer(config, rollout, policy, answerer)
    app.add_api_route("/health", server.health)
    app.add_api_route("/v1/models", server.models)
    app.add_api_route("/v1/models/{model:path}", server.one_model)
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=ChatReply)
    app.add_api_route("/v1/completions", server.complete, methods=["POST"], response_model=CompletionReply)
    tell_errors(app)
    return HttpGuard(app, config.guard())  # type: ignore[arg-type]  # the same protocol, spelled in other types


class PolicyServer:
    """One method per path, and the pieces of a chat for who serves them otherwise."""

    def __init__(self, config: PolicyServerConfig, rollout: RolloutConfig, policy: str, answerer: Answerer) -> None:
        self.config, self.rollout, self.answerer = config, rollout, answerer
        self.chat_encoder = PromptEncoder(policy, rollout.max_prompt_tokens, chat=rollout.chat)
        self.text_encoder = PromptEncoder(policy, rollout.max_prompt_tokens, chat="never")
        self.context = context_length(policy)
        self.started = int(time.time())

    # -- paths ----------------------------------------------------------------------------------------------------
    async def health(self) -> dict[str, str]:
        """Whether it lives."""
        self.answerer.check_health()
        return {"status": "ok"}

    async def models(self) -> ModelList:
        """The one model."""
        return ModelList(data=[self._entry()])

    async def one_model(self, model: str) -> ModelEntry:
        """The model of that name."""
        self._check_model(model)
        return self._entry()

    async def chat(self, request: ChatRequest) -> ChatReply | Response:
        """Answers to a conversation."""
        prompt = self.chat_prompt(request)
        (answer,) = await self._answer(request, [prompt])
        reply = self.chat_reply(request, prompt, answer)
        return stream(reply, usage=request.wants_usage) if request.stream else reply

    async def complete(self, request: CompletionRequest) -> CompletionReply | Response:
        """Continuations of texts or token ids."""
        self._check_model(request.model)
        if not 1 <= len(request.prompts) <= self.config.max_prompts:
            raise HTTPException(
                400, f"prompt has {len(request.prompts)} entries; it must have 1 to {self.config.max_prompts}."
            )
        prompts = [self._text_prompt(given) for given in request.prompts]
        answers = await self._answer(request, prompts)
        choices = [_shortened(candidate, request.stops) for answer in answers for candidate in answer.choices]
        reply = CompletionReply(
            id=f"cmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=request.model,
            choices=[
                TextChoice(index=i, text=text, finish_reason="stop" if stopped else "length")
                for i, (text, stopped) in enumerate(choices)
            ],
            usage=_usage(prompts, answers),
            system_fingerprint=_fingerprint(answers),
        )
        return stream(reply, usage=request.wants_usage) if request.stream else reply

    # -- pieces of a chat -------------------------------------------------------------------------------------------
    def chat_prompt(self, request: ChatRequest) -> Prompt:
        """What the policy is asked, encoded; `HTTPException` and `DataError` for what can't be."""
        self._check_model(request.model)
        if len(request.messages) > self.config.max_messages:
            raise HTTPException(400, f"messages has more than {self.config.max_messages} entries.")
        return self._chat_prompt([message.plain() for message in request.messages])

    def sampling(self, request: Request, prompts: Sequence[Prompt]) -> Sampling:
        """How to answer `prompts`: as in training, where the request says nothing. Refuses what is too much."""
        if request.n > self.config.max_choices:
            raise HTTPException(400, f"n={request.n} is more than this server's {self.config.max_choices}.")
        longest = request.longest or self.rollout.max_tokens
        if longest > self.rollout.max_tokens:
            raise HTTPException(
                400,
                f"max_tokens={longest} is more than this server's {self.rollout.max_tokens}; it may be started with "
                "--set rollout.max_tokens=....",
            )
        for prompt in prompts:
            check_fits(prompt, longest, self.context)
        given = {"temperature": request.temperature, "top_p": request.top_p, "max_tokens": longest}
        return self.rollout.sampling(n=request.n, **{k: v for k, v in given.items() if v is not None})

    def chat_reply(self, request: ChatRequest, prompt: Prompt, answer: Answer) -> ChatReply:
        """The answer in OpenAI's words."""
        choices = [_shortened(candidate, request.stops) for candidate in answer.choices]
        return ChatReply(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=request.model,
            choices=[
                ChatChoice(index=i, message=AnswerMessage(content=text), finish_reason="stop" if stopped else "length")
                for i, (text, stopped) in enumerate(choices)
            ],
            usage=_usage([prompt], [answer]),
            system_fingerprint=_fingerprint([answer]),
        )

    # -- inside -----------------------------------------------------------------------------------------------------
    def _entry(self) -> ModelEntry:
        return ModelEntry(id=self.config.model, created=self.started)

    def _check_model(self, model: str) -> None:
        if model != self.config.model:
            raise HTTPException(404, f"The model {model[:80]!r} does not exist; this server has {self.config.model!r}.")

    def _chat_prompt(self, messages: list[dict[str, str]]) -> Prompt:
        meta = {}
        if self.chat_encoder.has_template and self.rollout.chat != "never":
            meta = {"messages": messages}
        elif [message["role"] for message in messages] != ["user"]:
            raise HTTPException(
                400, "This policy has no chat template: send exactly one message, with the role user and the prompt."
            )
        prompt = Prompt(id="request", text=readable_messages(messages), token_ids=(), meta=meta)
        try:
            return self.chat_encoder.encode(prompt)
        except TemplateError as error:
            raise HTTPException(400, f"The policy's chat template refuses these messages: {error}") from None

    def _text_prompt(self, given: str | list[int]) -> Prompt:
        if isinstance(given, str):
            return self.text_encoder.encode(Prompt(id="request", text=given, token_ids=()))
        tokenizer = self.text_encoder.tokenizer
        if not given or not all(0 <= token < len(tokenizer) for token in given):
            raise HTTPException(400, f"prompt has token ids outside 0 to {len(tokenizer) - 1}, or none at all.")
        if len(given) > self.rollout.max_prompt_tokens:
            raise HTTPException(400, f"prompt has {len(given)} tokens, more than {self.rollout.max_prompt_tokens}.")
        return Prompt(id="request", text=tokenizer.decode(given), token_ids=tuple(given))

    async def _answer(self, request: Request, prompts: Sequence[Prompt]) -> list[Answer]:
        sampling = self.sampling(request, prompts)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        questions = [
            Question(prompt=prompt, sampling=sampling, seed=seed + position) for position, prompt in enumerate(prompts)
        ]
        return list(await asyncio.gather(*map(self.answerer.answer, questions)))


def _shortened(candidate: Candidate, stops: Sequence[str]) -> tuple[str, bool]:
    """The answer's text up to the first of `stops`, and whether it came to its end."""
    text = before(candidate.text, stops)
    return text, candidate.finished or text != candidate.text


def _usage(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Usage:
    asked, said = sum(len(p.token_ids) for p in prompts), sum(a.sampled_tokens for a in answers)
    return Usage(prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said)


def _fingerprint(answers: Sequence[Answer]) -> str:
    return f"rayalign-{code_version()}-v{answers[0].choices[0].policy_version}"


# -- errors -----------------------------------------------------------------------------------------------------------
def tell_errors(app: FastAPI) -> None:
    """Have `app` say what is wrong as OpenAI's clients read it."""
    app.add_exception_handler(RequestValidationError, _not_valid)  # type: ignore[arg-type]
    app.add_exception_handler(StarletteError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(RayalignError, _failed)  # type: ignore[arg-type]


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    body = error_body(status, message)
    body["error"] |= {"param": param, "code": code}
    return JSONResponse(body, status_code=status)


async def _not_valid(request: HttpRequest, error: RequestValidationError) -> Response:
    """The first thing that is wrong, and where; never the value, which may be long or private."""
    first: dict[str, Any] = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"Unrecognized request argument: {place}."
    elif first["type"] != "value_error":
        message = f"{place or 'the body'}: {message}."
    return _error(400, message, param=place or None)


async def _refused(request: HttpRequest, error: StarletteError) -> Response:
    """What `PolicyServer` refuses, and what no route takes."""
    if error.status_code in (404, 405) and not isinstance(error, HTTPException):
        return _error(error.status_code, f"There is no {request.method} {request.url.path[:80]} here.")
    return _error(error.status_code, str(error.detail), code="model_not_found" if error.status_code == 404 else None)


async def _failed(request: HttpRequest, error: RayalignError) -> Response:
    """A prompt that can't be used is the caller's mistake; what takes too long or is broken is ours."""
    if isinstance(error, DataError):
        return _error(400, str(error))
    return _error(503 if isinstance(error, WaitError) else 500, str(error))
