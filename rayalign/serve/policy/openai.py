"""What a request may say: the part of OpenAI's schema that is served, as pydantic models.

A field that OpenAI knows and we don't serve is accepted with the value that asks for nothing (`frequency_penalty: 0`),
because clients send such values by themselves, and is an error with any other. A field that concerns nobody but OpenAI
(`user`, `store`, ...) is ignored. Anything else is an error, as it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Fields that change no answer."""
NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "verbosity": (),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Fields that are not served, and the values, beside null, that ask for nothing."""


class StreamOptions(BaseModel):
    """What a stream has beside the answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    """A last event with the number of tokens."""
    include_obfuscation: bool = False
    """Concerns OpenAI alone."""


class Request(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=256)
    """Must be the server's."""
    n: int = Field(1, ge=1)
    """Answers to each prompt."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy. Null: what the policy was trained with."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus mass. Null: what the policy was trained with."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest answer. Null: what the policy was trained with."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed, prompt and settings give the same answer, but for rounding."""
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    """An answer ends before the first of these texts."""
    stream: bool | None = None
    """The answer as events, each choice in one piece (see `events`)."""
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _served(cls, data: Any) -> Any:
        """Drop what asks for nothing; refuse, by name, what is not served."""
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in NOTHING_ASKED:
                if value is not None and value not in NOTHING_ASKED[name]:
                    raise ValueError(f"{name} is not served. Leave it out.")
            elif name not in IGNORED:
                kept[name] = value  # pydantic refuses it
        return kept

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> list[str]:
        """The texts to stop at."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def longest(self) -> int | None:
        """The limit on the answer's tokens, under either of its names."""
        return self.max_tokens


class TextPart(BaseModel):
    """A part of a message; others than texts are not served."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


SILENT = ("refusal", "annotations", "audio", "tool_calls", "function_call", "name")
"""Fields of a message that may be there and empty."""


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    """Not shown to the policy."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_client_has_it(cls, message: Any) -> Any:
        """A reply that is sent back has fields that say nothing: no refusal, no tool was called."""
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value or name not in SILENT}

    def plain(self) -> dict[str, str]:
        """Role and content as chat templates take them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """The newer name of max_tokens."""

    @property
    def longest(self) -> int | None:
        """The limit on the answer's tokens, under either of its names."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    """Texts, which no chat template is put around, or token ids."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def before(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`.

    >>> before("one, two. three", [".", ","]), before("one", ["x", ""])
    ('one', 'one')
    """
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


# -- replies ----------------------------------------------------------------------------------------------------------
class Usage(BaseModel):
    """Tokens; those of samples that best-of-n did not pick are counted, too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """What the policy says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatReply(BaseModel):
    """Reply of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    """Version of rayalign and of the weights."""


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class CompletionReply(BaseModel):
    """Reply of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str


class ModelEntry(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rayalign"


class ModelList(BaseModel):
    """Reply of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
