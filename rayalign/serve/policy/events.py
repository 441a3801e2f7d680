"""An answer as a stream of server-sent events, for clients that ask for nothing else.

The engines give whole answers, so a stream is what such a client expects to read and no faster: each choice comes in
one piece, after the last of its tokens. What is wrong with a request is told before the stream begins, as a plain
reply.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import StreamingResponse

from rayalign.serve.policy.openai import ChatReply, CompletionReply


def stream(reply: ChatReply | CompletionReply, *, usage: bool) -> StreamingResponse:
    """`reply` as events; `usage` adds one with the number of tokens, as `stream_options.include_usage` asks for."""
    chunks = _chat_chunks(reply) if isinstance(reply, ChatReply) else _text_chunks(reply)
    return StreamingResponse(_events(reply, chunks, usage), media_type="text/event-stream")


def _events(reply: ChatReply | CompletionReply, chunks: Iterator[list[dict[str, Any]]], usage: bool) -> Iterator[str]:
    kind = "chat.completion.chunk" if isinstance(reply, ChatReply) else reply.object
    head = reply.model_dump(include={"id", "created", "model", "system_fingerprint"}) | {"object": kind}
    absent = {"usage": None} if usage else {}  # with include_usage each event has the field
    for choices in chunks:
        yield _event(head | {"choices": choices} | absent)
    if usage:
        yield _event(head | {"choices": [], "usage": reply.usage.model_dump()})
    yield "data: [DONE]\n\n"


def _chat_chunks(reply: ChatReply) -> Iterator[list[dict[str, Any]]]:
    """Who speaks, what is said, and why it ends, of each choice."""
    for choice in reply.choices:
        said = {"role": choice.message.role, "content": choice.message.content}
        yield [{"index": choice.index, "delta": said, "finish_reason": None, "logprobs": None}]
        yield [{"index": choice.index, "delta": {}, "finish_reason": choice.finish_reason, "logprobs": None}]


def _text_chunks(reply: CompletionReply) -> Iterator[list[dict[str, Any]]]:
    for choice in reply.choices:
        yield [choice.model_dump()]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
