"""`serve_policy`: what a run made, behind an OpenAI-compatible endpoint on Ray Serve, for as long as a block lasts."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayalign.aligned import Aligned, load_chooser
from rayalign.loop import cluster
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.replica import engine_name
from rayalign.serve.http_guard import read_token
from rayalign.serve.policy.config import TOKEN_VARIABLE, PolicyServerConfig


@dataclass(frozen=True, kw_only=True)
class PolicyServer:
    """A policy that is being served."""

    url: str
    """`base_url` of OpenAI's client."""
    model: str
    """Name that requests have to name."""
    needs_token: bool
    """Whether requests have to bring the token."""


@contextmanager
def serve_policy(
    what: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str | None = None,
    best_of: int = 0,
    replicas: int = 1,
    token_file: str | Path | None = None,
    **changes: Any,
) -> Iterator[PolicyServer]:
    """Serve the final policy of a finished run, or another model, while the block runs.

    Args:
        what: directory of a finished run, or a model.
        host: address to listen on; any but a loopback address needs a token, and TLS in front of it.
        port: TCP port to listen on.
        model: name that requests have to name; default: the last name of `what`.
        best_of: samples among which the run's agent picks each answer; 0 or 1 takes the sample as it comes.
        replicas: engines that work at the same time.
        token_file: file with the token that callers need; default: the environment's RAYALIGN_SERVE_TOKEN.
        **changes: settings `rollout.*`: the engine, its resources, and what a request that says nothing gets.

    Raises:
        ConfigError, DataError, ResourceError: before anything is served.
    """
    aligned = Aligned.find(what, changes)
    aligned.check_best_of(best_of)
    config = PolicyServerConfig(
        model=model or aligned.name,
        host=host,
        port=port,
        token_digest=read_token(token_file, TOKEN_VARIABLE),
        best_of=best_of,
        num_replicas=replicas,
    )
    engine_name(aligned.rollout)  # an engine that is not installed is an error here, not in a replica
    PromptEncoder(aligned.policy, aligned.rollout.max_prompt_tokens, chat=aligned.rollout.chat)
    make_chooser = functools.partial(load_chooser, aligned.run) if best_of > 1 else None
    name = f"policy-{os.getpid()}-{time.time_ns()}"
    with ExitStack() as stack:
        stack.enter_context(cluster())
        from rayalign.serve.policy.deployment import start_policy, stop_policy

        url = start_policy(config, aligned.rollout, aligned.policy, make_chooser, name)
        stack.callback(stop_policy, name)
        yield PolicyServer(url=url, model=config.model, needs_token=bool(config.token_digest))
