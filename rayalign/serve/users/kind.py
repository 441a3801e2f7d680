"""Users as a kind of oracle: what a run with them needs, and where they find it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError
from rayalign.serve.config import OracleConfig
from rayalign.serve.kinds import PATIENT, Address, OracleKind
from rayalign.serve.labelling.tokens import Tokens

if TYPE_CHECKING:
    from rayalign.serve.users.desk import Desk


def make(config: OracleConfig, world: World | None) -> Oracle:
    """Who looks up what users have chosen."""
    from rayalign.serve.users.oracle import UsersOracle

    tokens_of(config)  # what is wrong with them is told before the run begins
    return UsersOracle(desk_of(config))


def desk_of(config: OracleConfig) -> Desk:
    """The way from this replica to its run's collector."""
    from ray import serve

    from rayalign.serve.users.desk import Desk

    app = serve.get_replica_context().app_name
    return Desk(app, max_batch=config.users.max_batch, timeout_s=config.users.answer_within_s)


def tokens_of(config: OracleConfig) -> Tokens | None:
    """The users' tokens; None: nobody needs one."""
    file = config.users.tokens_file
    return Tokens.read(file, setting="oracle.users.tokens_file", person="user") if file else None


def check(config: OracleConfig, world: World | None) -> None:
    """Refuse what would turn ties into coin flips, and a second endpoint."""
    if config.labels == "bernoulli":
        raise ConfigError(
            "oracle.kind='users' with oracle.labels='bernoulli' would flip a coin for every tie that users see; set "
            "oracle.labels=deterministic."
        )
    if config.most_replicas > 1:
        raise ConfigError(
            f"oracle.kind='users' has one endpoint, hence one replica; oracle.num_replicas={config.num_replicas} and "
            f"oracle.max_replicas={config.max_replicas} ask for more."
        )


def complete(config: OracleConfig, run_dir: Path) -> OracleConfig:
    """The file of tokens, named as the replica finds it."""
    if not config.users.tokens_file:
        return config
    return replace(config, users=replace(config.users, tokens_file=str(Path(config.users.tokens_file).absolute())))


def http(config: OracleConfig) -> Address:
    """The endpoint's address."""
    return Address(config.users.host, config.users.port, "oracle.users")


def notice(config: OracleConfig) -> str:
    """Where clients find the policy."""
    return f"Users' endpoint: {http(config).url}v1 - model {config.users.model!r}, for any OpenAI client"


USERS = OracleKind(
    needs_files=True,
    make=make,
    check=check,
    complete=complete,
    http=http,
    who="users",
    notice=notice,
    deployment="rayalign.serve.users.deployment:UsersDeployment",
    online=True,
    defaults={
        "oracle.labels": "deterministic",  # a tie stays a tie
        "loop.max_staleness": 1,  # users compare answers of one version while the next is being learnt
        **PATIENT,
    },
)
"""Users as an oracle: they are answered at once, and some answers are comparisons, which label if they choose."""
