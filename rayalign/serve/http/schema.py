"""What is said over HTTP: pydantic models, which are also the published OpenAPI schema.

Texts, numbers and JSON alone: no object of Python's crosses the line, in either direction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, create_model, model_validator

from rayalign.serve.http.service import ServiceConfig
from rayalign.types import Candidate, Duel, Prompt, Verdict

Id = Annotated[str, Field(min_length=1, max_length=200)]
Data = dict[str, JsonValue]
MOST_TURNS = 1_000


class _Strict(BaseModel):
    """Misspelled fields are errors, not silence."""

    model_config = ConfigDict(extra="forbid")


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class DuelIn(_Strict):
    """Two responses to one prompt."""

    id: Id = Field(description="Yours. Asking again with the same id and the same texts is not paid again.")
    prompt: str = Field(description="What both respond to, as a person reads it.")
    first: str
    second: str
    messages: list[Message] | None = Field(None, description="The prompt as a conversation, if it is one.")
    reference: str | None = Field(None, description="A response to compare with, for oracles that look at one.")
    prompt_id: Id | None = Field(None, description="The prompt's own name; default: the duel's id.")
    data: Data | None = Field(None, description="What else is known of the prompt, for oracles that look at it.")


class Question(_Strict):
    """A request for verdicts."""

    duels: list[DuelIn]
    caller: str = Field(
        "", max_length=100, description="Who asks: duels of different callers are never taken for one another."
    )
    oracle: str | None = Field(
        None, description="The oracle that is meant, as /v1/oracle names it; another one refuses (409)."
    )

    @model_validator(mode="after")
    def _one_id_is_one_duel(self) -> Self:
        """Whoever looks verdicts up by id would get another duel's."""
        seen: dict[str, DuelIn] = {}
        for place, duel in enumerate(self.duels):
            if seen.setdefault(duel.id, duel) != duel:
                raise ValueError(f"duels.{place} has the id of another duel of this request, and says something else")
        return self

    def to_duels(self, oracle_id: str) -> list[Duel]:
        """The duels as an oracle reads them, each named by oracle, caller, id and content together."""
        return [_named(duel, oracle_id, self.caller) for duel in self.duels]


class VerdictOut(BaseModel):
    """What the oracle says of a duel: a probability or a failure, or nothing yet."""

    id: str
    probability: float | None = Field(description="That the first response is better; 0.5 is a tie.")
    failure: str | None = Field(description="Why there is no verdict. Nothing is kept of it: it may be asked again.")
    price: float = Field(description="In the currency of whoever runs the service.")
    pending: bool = Field(False, description="It takes its time, as people do: ask again, with the same id.")


class Reply(BaseModel):
    """Verdicts in the order of the duels."""

    oracle: str = Field(description="Kind and version of the oracle.")
    verdicts: list[VerdictOut]


class Description(BaseModel):
    """Which oracle this is, and how much may be asked of it at once."""

    oracle: str
    late: bool = Field(False, description="Verdicts may come after days; until then they are pending.")
    max_duels: int
    max_characters: int
    max_body_bytes: int


class Health(BaseModel):
    """It answers."""

    status: Literal["ok"] = "ok"


class ProblemDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = Field(None, description="The field that is wrong, e.g. `duels.0.first`.")
    code: str | None = None


class Problem(BaseModel):
    """The body of every reply that is not a success."""

    error: ProblemDetail


def limited_question(limits: ServiceConfig) -> type[Question]:
    """`Question` with the service's limits, so that the schema says them."""
    text: Any = Annotated[str, Field(max_length=limits.max_characters)]
    message: Any = create_model("Message", __base__=Message, content=(text, ...))
    fields: dict[str, Any] = dict(DuelIn.model_fields)
    limited: dict[str, Any] = {
        **{name: (text, fields[name]) for name in ("prompt", "first", "second")},
        "messages": (Annotated[list[message], Field(max_length=MOST_TURNS)] | None, fields["messages"]),
        "reference": (text | None, fields["reference"]),
        "data": (Annotated[Data, AfterValidator(_not_longer_than(limits.max_characters))] | None, fields["data"]),
    }
    duel: Any = create_model("Duel", __base__=DuelIn, **limited)
    duels = Annotated[list[duel], Field(min_length=1, max_length=limits.max_duels)]
    return create_model("Question", __base__=Question, duels=(duels, ...))


def to_reply(oracle_id: str, question: Question, duels: Sequence[Duel], verdicts: Sequence[Verdict]) -> Reply:
    """The verdicts, under the caller's own ids; what has none is pending."""
    found = {verdict.duel_id: verdict for verdict in verdicts}
    return Reply(
        oracle=oracle_id,
        verdicts=[_to_wire(asked.id, found.get(duel.id)) for asked, duel in zip(question.duels, duels, strict=True)],
    )


def _to_wire(name: str, verdict: Verdict | None) -> VerdictOut:
    found = verdict or Verdict(duel_id=name)
    probability, failure, price = found.probability, found.failure, found.price
    return VerdictOut(id=name, probability=probability, failure=failure, price=price, pending=verdict is None)


def _not_longer_than(most: int) -> Any:
    def check(data: Data) -> Data:
        if len(json.dumps(data)) > most:
            raise ValueError(f"As JSON it should have at most {most} characters")
        return data

    return check


def to_duel(duel: DuelIn) -> Duel:
    """The duel under its own id."""
    messages = None if duel.messages is None else [message.model_dump() for message in duel.messages]
    prompt = Prompt(
        id=duel.prompt_id or duel.id,
        text=duel.prompt,
        token_ids=(),
        reference=duel.reference,
        meta={**(duel.data or {}), **({} if messages is None else {"messages": messages})},
    )
    return Duel(id=duel.id, batch=0, prompt=prompt, first=_response(duel.first), second=_response(duel.second))


def _named(duel: DuelIn, oracle_id: str, caller: str) -> Duel:
    """The duel under a name by content: a program that counts its duels from 1 again means new ones."""
    messages = None if duel.messages is None else [message.model_dump() for message in duel.messages]
    named = (oracle_id, caller, duel.id, duel.prompt, messages, duel.reference, duel.first, duel.second)
    data = None if duel.data is None else json.dumps(duel.data, sort_keys=True)  # the order of its keys says nothing
    content = repr((*named, duel.prompt_id, data)).encode("utf-8", "surrogatepass")
    return replace(to_duel(duel), id=hashlib.blake2b(content, digest_size=16).hexdigest())


def _response(text: str) -> Candidate:
    return Candidate(text=text, token_ids=(), logprobs=(), policy_version=-1)
