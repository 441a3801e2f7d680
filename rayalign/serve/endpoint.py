"""One call to an OpenAI-compatible chat endpoint: what it says, or what went wrong and whether it may be billed.

    message -> POST /chat/completions -> Reply
                                      -> Trouble: again (rate limit, server error, timeout, garbage)
                                                  refused (this message is not accepted; others may be)
                                                  fatal (wrong key, unknown model, no quota: no message ever will)

`timeout_s` is the longest silence, and an endpoint that sends a byte now and then is never silent. So each call has an
end of its own, too (`rayalign.serve.deadline`).

The key is read from the environment when the process starts, and taken out of every text that leaves this file.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Awaitable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ValidationError

from rayalign.errors import ConfigError, OracleError
from rayalign.serve.deadline import LONGEST_IN_SILENCES, Deadlines
from rayalign.serve.judge_config import JudgeConfig

FATAL = (401, 402, 403, 404)
"""Wrong key, no money, not allowed, unknown model: the same for every message."""
REFUSED = (400, 413, 415, 422)
"""Too long, against a policy, malformed: about this message."""
SHORT = 300
"""Most characters of an endpoint's own words that are repeated."""

T = TypeVar("T")


class Trouble(Exception):
    """Why a call brought no reply."""

    def __init__(self, why: str, kind: str, *, billed: bool = False, pause_s: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.kind, self.billed, self.pause_s = why, kind, billed, pause_s


class Reply(NamedTuple):
    """What a judge said."""

    text: str
    finish_reason: str
    refusal: bool
    """The model, or a filter before it, declined to answer."""
    first_token: tuple[str, Mapping[str, float]] | None
    """The token that was sampled first, and log-probabilities of the likeliest ones, itself included."""


# -- what is read of a response; everything else is ignored ---------------------------------------------------------
class _Likely(BaseModel):
    token: str
    logprob: float = Field(le=0.01, allow_inf_nan=False)


class _Token(_Likely):
    top_logprobs: list[_Likely] = []


class _Logprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


class Endpoint:
    """The endpoint of `config`, asked for `model`. Thread-safe; makes no repetitions of its own."""

    def __init__(self, config: JudgeConfig, model: str) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "oracle.kind='judge' needs the openai client library: pip install 'rayalign[judge]'."
            ) from error
        self.config, self.model = config, model
        self.host = urlsplit(config.base_url).netloc.lower()
        """With its port, if the address names one: on one machine two ports are two servers."""
        self._key = _key(config.api_key_env)
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=self._key or "none", timeout=config.timeout_s, max_retries=0
        )
        self._deadlines = Deadlines(self._client.close)

    def check(self) -> None:
        """Raise `OracleError` if nothing answers at the address, or the key is wrong; asks for the list of models."""
        import openai

        try:
            self._in_time(_models(self._client.with_options(max_retries=2)))
        except openai.AuthenticationError as error:
            raise OracleError(self._fatal(error.status_code, self._said(error))) from None
        except openai.APIConnectionError as error:
            raise OracleError(
                f"nothing answers at oracle.judge.base_url={self.config.base_url} ({self._said(error)}). Nothing was "
                "bought; start the endpoint, or correct the address."
            ) from None
        except TimeoutError:
            raise OracleError(
                f"oracle.judge.base_url={self.config.base_url} did not list its models within {self._limit_s:g} s, "
                "though it sends something now and then. Nothing was bought; look at it, or correct the address."
            ) from None
        except openai.OpenAIError:
            pass  # not every endpoint lists its models

    def ask(self, message: str) -> Reply:
        """The reply to `message`. Raises `Trouble`."""
        import openai

        fields = self._fields() | {"messages": [{"role": "user", "content": message}]}
        try:
            create = self._client.chat.completions.with_raw_response.create
            call = create(model=self.model, messages=fields["messages"], extra_body=fields)
            body = self._in_time(call).content
        except openai.APIStatusError as error:
            raise self._status_trouble(error) from None
        except openai.APIConnectionError as error:  # timeouts are among them
            never_sent = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout")
            raise Trouble(self._said(error), "again", billed=not never_sent) from None
        except TimeoutError:
            raise Trouble(f"the call timed out: not over after {self._limit_s:g} s", "again", billed=True) from None
        except openai.OpenAIError as error:
            raise Trouble(self._said(error), "again", billed=True) from None
        try:
            choice = _Completion.model_validate_json(body).choices[0]
        except ValidationError:
            said = self.clean(body.decode(errors="replace"))
            raise Trouble(f"not a chat completion: {said!r}", "again", billed=True) from None
        return _reply(choice)

    def clean(self, text: str) -> str:
        """`text` on one line, not too long, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= SHORT else text[:SHORT] + "..."

    # -- inside -------------------------------------------------------------------------------------------------
    @property
    def _limit_s(self) -> float:
        return LONGEST_IN_SILENCES * self.config.timeout_s

    def _in_time(self, call: Awaitable[T]) -> T:
        """What `call` brings, in any thread. Raises `TimeoutError` when its time is over; its connection is closed."""
        return self._deadlines.within(self._limit_s, call)

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "model": self.model,
            "temperature": self.config.temperature,
            "max_tokens": self.config.answer_tokens,
        }
        if self.config.verdict == "logprobs":
            fields |= {"logprobs": True, "top_logprobs": self.config.top_logprobs}
        fields |= self.config.request
        return {name: value for name, value in fields.items() if value is not None}

    def _status_trouble(self, error: Any) -> Trouble:
        status, said = error.status_code, self._said(error)
        if status in FATAL or error.code == "insufficient_quota":
            return Trouble(self._fatal(status, said), "fatal")
        if status in REFUSED:
            return Trouble(f"HTTP {status}: {said}", "refused")
        return Trouble(f"HTTP {status}: {said}", "again", pause_s=retry_after(error.response.headers))

    def _fatal(self, status: int, said: str) -> str:
        way_out = {
            401: f"the key in ${self.config.api_key_env} is not accepted"
            if self.config.api_key_env
            else "it wants a key, and oracle.judge.api_key_env names no variable",
            404: f"it knows no model oracle.target={self.model!r}, or oracle.judge.base_url is not its address",
        }.get(status, "its account does not allow this call")
        return (
            f"the judge at {self.config.base_url} answers HTTP {status}: {way_out}. It was not charged; correct it, "
            f"then `rayalign resume`. The endpoint said: {said}"
        )

    def _said(self, error: Any) -> str:
        body = error.body
        inner = body.get("message") if isinstance(body, dict) else None
        cause = error.__cause__
        return self.clean(str(inner or (f"{error.message} {type(cause).__name__}" if cause else error.message)))


async def _models(client: Any) -> None:
    await client.models.with_raw_response.list()


def _reply(choice: _Choice) -> Reply:
    tokens = choice.logprobs.content if choice.logprobs else None
    first = None
    if tokens:
        likely = {token.token: token.logprob for token in tokens[0].top_logprobs}
        first = tokens[0].token, likely | {tokens[0].token: tokens[0].logprob}
    return Reply(
        text=choice.message.content or "",
        finish_reason=choice.finish_reason or "",
        refusal=bool(choice.message.refusal) or choice.finish_reason == "content_filter",
        first_token=first,
    )


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, as a number or a date; 0 if it does not, or says nonsense."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _key(variable: str) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"oracle.judge.api_key_env={variable!r}: that environment variable is not set where the oracle runs. "
            "Export it before Ray is started (on every node), or leave api_key_env empty if the endpoint needs no key."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the environment variable {variable!r} (oracle.judge.api_key_env) does not hold a key.")
    return key
