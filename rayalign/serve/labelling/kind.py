"""People as a kind of oracle: what a run that asks them needs, and where their page is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError
from rayalign.serve.config import OracleConfig
from rayalign.serve.kinds import PATIENT, Address, OracleKind
from rayalign.serve.labelling.aggregate import check_aggregate
from rayalign.serve.labelling.config import tokens_path


def make(config: OracleConfig, world: World | None) -> Oracle:
    """The queue, and the people who may answer."""
    from rayalign.serve.labelling.oracle import HumanOracle

    return HumanOracle(config)


def check(config: OracleConfig, world: World | None) -> None:
    """Refuse what would turn ties into coin flips, split the queue, or leave it nowhere to be."""
    if config.labels == "bernoulli":
        raise ConfigError(
            "oracle.kind='human' with oracle.labels='bernoulli' would flip a coin for every tie that people see; set "
            "oracle.labels=deterministic."
        )
    check_aggregate(config.human.aggregate, config.human.annotators_per_duel)
    if config.most_replicas > 1:
        raise ConfigError(
            f"oracle.kind='human' has one queue, hence one replica; oracle.num_replicas={config.num_replicas} and "
            f"oracle.max_replicas={config.max_replicas} ask for more."
        )
    if not config.human.folder:
        raise ConfigError("oracle.kind='human' needs oracle.human.folder, where the queue is kept.")


def complete(config: OracleConfig, run_dir: Path) -> OracleConfig:
    """The queue in the run directory by default, and all files named as the replica finds them."""
    human = replace(config.human, folder=config.human.folder or str(run_dir / "labelling"))
    names = ("folder", "tokens_file", "guidelines_file")
    paths: dict[str, Any] = {name: str(Path(value).absolute()) for name in names if (value := getattr(human, name))}
    return replace(config, human=replace(human, **paths))


def http(config: OracleConfig) -> Address:
    """The page's address."""
    return Address(config.human.host, config.human.port, "oracle.human")


def notice(config: OracleConfig) -> str:
    """How to log in; names the file of the tokens, never a token."""
    return f"Labelling page: {http(config).url} - log in with a token from {tokens_path(config.human)}"


HUMAN = OracleKind(
    needs_files=True,
    make=make,
    check=check,
    complete=complete,
    http=http,
    who="people",
    notice=notice,
    deployment="rayalign.serve.labelling.deployment:LabellingDeployment",
    served="rayalign.serve.labelling.served:ServedPeople",
    defaults={
        "oracle.labels": "deterministic",  # a tie stays a tie
        "loop.max_staleness": 1,  # people have a batch to judge while the one before it is learnt from
        "evaluation.every": 0,  # their time is for the budget; the final policy is evaluated all the same
        "evaluation.at_start": False,
        "evaluation.num_prompts": 20,
        **PATIENT,
    },
)
