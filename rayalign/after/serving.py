"""What is served to other programs on Ray Serve, for as long as a block lasts.

serve_policy    what a run made, behind an OpenAI-compatible endpoint
serve_oracle    who says which of two responses is better, over HTTP
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayalign import config as settings
from rayalign import storage
from rayalign.after.aligned import Aligned, load_chooser
from rayalign.env import make_world, read_keywords
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError
from rayalign.loop.loop import cluster
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.replica import engine_name
from rayalign.serve import OracleConfig, start_oracle, stop_oracle
from rayalign.serve.applications import stop_application
from rayalign.serve.http.config import TOKEN_VARIABLE as ORACLE_TOKEN_VARIABLE
from rayalign.serve.http.service import ServiceConfig
from rayalign.serve.http_guard import read_token
from rayalign.serve.kinds import ORACLES, oracle_kind
from rayalign.serve.oracles import oracle_factory
from rayalign.serve.policy.config import TOKEN_VARIABLE, PolicyServerConfig

OF_A_RUN = ("data", "users")
"""Kinds of oracle that know a run's own data, or its policy, alone."""


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
        what: directory of a finished run (a folder, or a URI in a bucket), or a model.
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
        from rayalign.serve.policy.deployment import start_policy

        url = start_policy(config, aligned.rollout, aligned.policy, make_chooser, name)
        stack.callback(stop_application, name)
        yield PolicyServer(url=url, model=config.model, needs_token=bool(config.token_digest))


# ==== the oracle =====================================================================================================
@dataclass(frozen=True, kw_only=True)
class OracleServer:
    """An oracle that is being served."""

    url: str
    """Its address: `oracle.target` of a run with `oracle.kind=http`."""
    oracle: str
    """Kind and version, as the ledger and every reply name it."""
    needs_token: bool
    """Whether requests have to bring the token."""
    folder: Path
    """Where paid answers are kept."""
    notice: str = ""
    """What whoever runs it has to know, e.g. how people log in; never a secret."""


@dataclass(frozen=True, kw_only=True)
class _OracleSettings:
    """What `serve_oracle` lets be set by name."""

    oracle: OracleConfig = field(default_factory=OracleConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)


@contextmanager
def serve_oracle(
    oracle: str | Oracle | Callable[..., Any],
    *,
    target: str | None = None,
    env: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8710,
    folder: str | Path = "oracle-answers",
    token_file: str | Path | None = None,
    **changes: Any,
) -> Iterator[OracleServer]:
    """Serve an oracle to other programs while the block runs.

    Args:
        oracle: a kind of oracle (`"reward_model"`), a function by name (`"package.module:function"`), or a function or
            an oracle of yours.
        target: which one of its kind (`oracle.target`).
        env: environment whose hidden reward judges; for the kind `world`, which needs one.
        host: address to listen on; any but a loopback address needs a token, and TLS in front of it.
        port: TCP port to listen on.
        folder: where paid answers are kept, on a disk that all replicas share: whoever asks again, after a restart,
            too, does not pay again. One oracle's answers are never taken for another's.
        token_file: file with the token that callers need; default: the environment's RAYALIGN_ORACLE_TOKEN.
        **changes: settings `oracle.*`, `service.*` (limits) and `env.*`.

    Raises:
        ConfigError, DataError, ResourceError, OracleError: before anything is served.
    """
    given = settings.flatten(changes)
    env_kwargs = {name.removeprefix("env."): given.pop(name) for name in list(given) if name.startswith("env.")}
    if env_kwargs and env is None:
        raise ConfigError(f"env.{next(iter(env_kwargs))} is set, but no environment is named: give env, too.")
    world = None if env is None else make_world(env, **read_keywords(env, env_kwargs))
    suits = {} if world is None else {k: v for k, v in world.defaults().items() if k.startswith("oracle.")}
    named = _named(oracle, target)
    kind = oracle_kind(given.get("oracle.kind", named["oracle.kind"]))
    suits |= {name: value for name, value in kind.defaults.items() if name.startswith("oracle.")}
    config = settings.apply(
        _OracleSettings(
            service=ServiceConfig(host=host, port=port, token_digest=read_token(token_file, ORACLE_TOKEN_VARIABLE))
        ),
        {**suits, **named, **given},
    )
    _check_can_be_served(config.oracle, world)
    if (page := kind.http(config.oracle)) is not None:  # it is where the service is
        at = {f"{page.settings}.host": config.service.host, f"{page.settings}.port": config.service.port}
        config = settings.apply(config, at)
    storage.local_only(folder, "folder")
    place = Path(folder).absolute()
    asked = kind.complete(config.oracle, place)
    factory = oracle_factory(asked, world, None if isinstance(oracle, str) else oracle)
    name = f"served-oracle-{os.getpid()}-{time.time_ns()}"
    with ExitStack() as stack:
        own_cluster = stack.enter_context(cluster())
        client = start_oracle(asked, factory, name, place, config.service)
        stack.callback(stop_oracle, name, stop_serve=not own_cluster)
        yield OracleServer(
            url=config.service.address.url.rstrip("/"),
            oracle=client.id,
            needs_token=bool(config.service.token_digest),
            folder=place,
            notice=kind.notice(asked),
        )


def _named(oracle: Any, target: str | None) -> Mapping[str, Any]:
    """The settings that a name stands for."""
    if not isinstance(oracle, str):
        named = {"oracle.kind": "function"}
    elif ":" in oracle and target is None:
        named = {"oracle.kind": "function", "oracle.target": oracle}
    else:
        named = {"oracle.kind": oracle}
    return named if target is None else {**named, "oracle.target": target}


def _check_can_be_served(config: OracleConfig, world: World | None) -> None:
    if config.kind == "world" and world is None:
        raise ConfigError("the oracle 'world' is an environment's hidden reward: name the environment (env, --env).")
    kind = oracle_kind(config.kind)
    if config.kind in OF_A_RUN or (kind.http(config) is not None and not kind.served):
        others = ", ".join(name for name in ORACLES if name not in OF_A_RUN)
        raise ConfigError(
            f"oracle.kind={config.kind!r} belongs to a run, and can't be served to other programs. Serve one of "
            f"{others}."
        )
