"""Kinds of oracle: what `oracle.kind` may name. To add one, write its file and its line in `ORACLES`.

    settings   defaults   what a run with this kind needs other than usual; the user's own settings come after
    before     complete   its config, once the run directory is known
               check      what can be seen to be wrong before anything is started
    start      http       where its page or API listens, if it has one
               deployment what runs under Serve
               notice     what to tell whoever started the run
    replica    make       the oracle

The loop and the service know no kind by name; they ask these.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, did_you_mean
from rayalign.serve.config import OracleConfig

WEEK_S = 7 * 24 * 3600.0
PATIENT = {
    "oracle.request_timeout_s": WEEK_S,
    "learner.batch_timeout_s": WEEK_S,
    "loop.gate_timeout_s": WEEK_S,
}
"""Defaults of the kinds that wait for people: nobody gives up on them within a week."""
COLLECTORS = "rayalign-collectors"
"""Ray namespace of the collectors of online runs, each under the name of its oracle's Serve application."""


class Address(NamedTuple):
    """Where an oracle listens for HTTP."""

    host: str
    port: int
    settings: str
    """Dotted name of the section whose `host` and `port` these are, for messages."""

    @property
    def url(self) -> str:
        """For people."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/"


def _as_it_is(config: OracleConfig, run_dir: Path) -> OracleConfig:
    return config


def _unchecked(config: OracleConfig, world: World | None) -> None:
    pass


def _nowhere(config: OracleConfig) -> Address | None:
    return None


def _silent(config: OracleConfig) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class OracleKind:
    """What the loop and the service have to know of a kind of oracle. Its functions are importable or picklable."""

    make: Callable[[OracleConfig, World | None], Oracle]
    """The oracle; called once in each replica, so it may load what is heavy. Errors of ours are told as they are."""
    check: Callable[[OracleConfig, World | None], None] = _unchecked
    """Raises `ConfigError` for what can be seen to be wrong without loading or asking anything."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a run by dotted name that this kind wants other than usual, where the user says nothing."""
    complete: Callable[[OracleConfig, Path], OracleConfig] = _as_it_is
    """The config with what depends on the run directory; paths in it become absolute, as the replicas need them."""
    deployment: str = "rayalign.serve.deployment:OracleDeployment"
    """`module:Class` of what runs under Serve: `OracleDeployment`, or a subclass that serves HTTP, too."""
    served: str = ""
    """The same where other programs ask it over HTTP: a subclass of `rayalign.serve.http.deployment:ServedOracle`.
    Empty: that one; but a kind with a page of its own can't be served then."""
    http: Callable[[OracleConfig], Address | None] = _nowhere
    """Where it listens; None: it is reached through Serve's handle alone, and no port is opened."""
    who: str = "the oracle"
    """Whom a run waits for, in words."""
    needs_files: bool = False
    """Whether it keeps books of its own in the run directory, which then can't be in a bucket."""
    online: bool = False
    """Prompts come from who judges, too: the run's collector is an `OnlineCollector` (`rayalign.loop.online`), which
    answers them and is reached as `COLLECTORS` says; and it takes another oracle to judge held-out answers."""
    notice: Callable[[OracleConfig], str] = _silent
    """A line for whoever started the run; never a secret."""


ORACLES: dict[str, OracleKind | str] = {
    "world": "rayalign.serve.oracles:WORLD",
    "data": "rayalign.serve.recorded:DATA",
    "function": "rayalign.serve.oracles:FUNCTION",
    "reward_model": "rayalign.serve.reward_model:REWARD_MODEL",
    "pairwise": "rayalign.serve.pairwise:PAIRWISE",
    "judge": "rayalign.serve.judge:JUDGE",
    "http": "rayalign.serve.http.client:HTTP",
    "human": "rayalign.serve.labelling.kind:HUMAN",
    "users": "rayalign.serve.users.kind:USERS",
}
"""Name -> kind, or where to import it from (`module:NAME`), so that nobody loads what they don't use."""


def oracle_kind(name: str) -> OracleKind:
    """The kind of a registered name, or of an import path `module:NAME`. `ConfigError` if there is none."""
    found = ORACLES.get(name, name)
    if isinstance(found, str):
        if ":" not in found:
            raise ConfigError(f"oracle.kind={name!r} is unknown. {did_you_mean(name, ORACLES)}")
        found = import_attribute(found, "oracle.kind")
    if not isinstance(found, OracleKind):
        raise ConfigError(f"oracle.kind={name!r} is a {type(found).__name__}, not a rayalign.serve.kinds.OracleKind.")
    return found


def check_target(config: OracleConfig, world: World | None = None) -> None:
    """The `check` of kinds that need a target and nothing else."""
    if not config.target:
        raise ConfigError(f"oracle.kind={config.kind!r} needs oracle.target: an import path, model or directory.")


def import_attribute(path: str, setting: str) -> Any:
    """What `package.module:attribute` names. Raises `ConfigError` that names `setting`."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{setting}={path!r} must be an import path like 'package.module:attribute'.")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}={path!r} can't be imported: {error}.") from error
