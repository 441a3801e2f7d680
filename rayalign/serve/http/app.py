"""The oracle's endpoints as an ASGI application over one function that judges.

    POST /v1/verdicts   {"duels": [{"id", "prompt", "first", "second"}, ...], "caller"?} -> {"oracle", "verdicts"}
    GET  /v1/oracle     -> {"oracle", limits}
    GET  /health        -> {"status": "ok"}            no token
    GET  /openapi.json  -> the schema, limits included  no token

Every error is {"error": {"message", "type", "param"}}, and `param` is the field that is wrong: 400 not JSON, 401 no or
a wrong token, 403 another site's page, 408 too slow, 409 another oracle, 413 too much, 415 not application/json, 422
not what the schema says, 429 busy, 500 the oracle can't answer, 504 it did not in time. After 408, 429, 5xx and silence
asking again is right: what was answered is not paid again.
"""

# No `from __future__ import annotations`: FastAPI has to see the models that are made here, not their names.

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import Depends, FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as StarletteError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rayalign.errors import DataError, RayalignError, WaitError
from rayalign.serve.http.schema import Description, Health, Problem, Question, Reply, limited_question, to_reply
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.http_guard import HttpGuard, error_body
from rayalign.system.code_version import code_version
from rayalign.types import Duel, Verdict

log = logging.getLogger(__name__)

Judge = Callable[[Sequence[Duel]], Awaitable[Sequence[Verdict]]]
SHOWN = 3
"""Most mistakes of a request that are named."""


def build_app(judge: Judge, oracle_id: str, service: ServiceConfig, *, late: bool = False) -> HttpGuard:
    """The whole application, guard included.

    Args:
        judge: one verdict per duel; asked again with the same ids it buys nothing.
        oracle_id: what `judge` is, as replies name it.
        service: limits, and who is answered.
        late: `judge` waits for nobody, and gives the verdicts that are there.
    """
    app = FastAPI(title="rayalign oracle", version=code_version(), docs_url=None, redoc_url=None)  # they load from afar
    server = _Server(judge, oracle_id, service, late)
    # For the schema alone: the guard has looked at the token by then.
    token = [Depends(HTTPBearer(auto_error=False))] if service.token_digest else []
    question = limited_question(service)

    async def verdicts(asked: question) -> Reply:  # type: ignore[valid-type]
        """Say of each duel which response is better."""
        return await server.verdicts(asked)

    problems = _problems(400, 403, 408, 409, 413, 415, 422, 429, 500, 504, *([401] if token else []))
    app.add_api_route("/v1/verdicts", verdicts, methods=["POST"], dependencies=token, responses=problems)
    app.add_api_route("/v1/oracle", server.describe, dependencies=token, responses=_problems(*([401] if token else [])))
    app.add_api_route("/health", server.health)
    app.add_exception_handler(RequestValidationError, _not_valid)  # type: ignore[arg-type]
    app.add_exception_handler(StarletteError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(RayalignError, _failed)  # type: ignore[arg-type]
    return HttpGuard(app, service.guard())  # type: ignore[arg-type]  # the same protocol, spelled in other types


class _Server:
    """One method per path."""

    def __init__(self, judge: Judge, oracle_id: str, service: ServiceConfig, late: bool) -> None:
        self.judge, self.oracle_id, self.service, self.late = judge, oracle_id, service, late

    async def verdicts(self, question: Question) -> Reply:
        if question.oracle not in (None, self.oracle_id):
            raise HTTPException(409, f"This is another oracle than the one that is meant: it is {self.oracle_id}.")
        duels = question.to_duels(self.oracle_id)
        try:
            return to_reply(self.oracle_id, question, duels, await self.judge(duels))
        except RayalignError as error:
            raise _in_the_callers_words(error, question, duels) from error

    async def describe(self) -> Description:
        """Say which oracle this is, and how much it takes at once."""
        return Description(
            oracle=self.oracle_id,
            late=self.late,
            max_duels=self.service.max_duels,
            max_characters=self.service.max_characters,
            max_body_bytes=self.service.max_body_bytes,
        )

    async def health(self) -> Health:
        """Say that it answers."""
        return Health()


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Problem} for code in codes}


# -- errors -----------------------------------------------------------------------------------------------------------
def _in_the_callers_words(error: RayalignError, question: Question, duels: Sequence[Duel]) -> RayalignError:
    """The error with the caller's own ids, in the place of the names that duels have in here."""
    message = str(error)
    for own, duel in zip(question.duels, duels, strict=True):
        message = message.replace(duel.id, own.id)
    return type(error)(message)


def _error(status: int, message: str, param: str | None = None, headers: Any = None) -> Response:
    body = error_body(status, message)
    body["error"]["param"] = param
    return JSONResponse(body, status_code=status, headers=headers)


async def _not_valid(request: Request, error: RequestValidationError) -> Response:
    """What is wrong, and where; never the value, which may be long or private."""
    found: Sequence[dict[str, Any]] = error.errors()
    if found[0]["type"] == "json_invalid":
        return _error(400, f"The body is not JSON: {found[0]['ctx']['error']}.")
    where = [".".join(str(part) for part in problem["loc"] if part != "body") for problem in found]
    named = [
        f"{place or 'the body'}: {str(problem['msg']).removeprefix('Value error, ')}"
        for place, problem in zip(where[:SHOWN], found[:SHOWN], strict=True)
    ]
    more = f" (and {len(found) - SHOWN} more)" if len(found) > SHOWN else ""
    return _error(422, "; ".join(named) + more, param=where[0] or None)


async def _refused(request: Request, error: StarletteError) -> Response:
    """What `_Server` refuses, and what no route takes."""
    if error.status_code in (404, 405) and not isinstance(error, HTTPException):
        return _error(error.status_code, f"There is no {request.method} {request.url.path[:80]} here.")
    return _error(error.status_code, str(error.detail), headers=error.headers)


async def _failed(request: Request, error: RayalignError) -> Response:
    """A prompt that the oracle knows nothing of is the caller's mistake; what takes too long or is broken is ours."""
    if isinstance(error, DataError):
        return _error(422, str(error))
    log.warning("not judged: %s", error)
    return _error(504 if isinstance(error, WaitError) else 500, str(error))
