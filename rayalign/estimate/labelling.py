"""How long labelling takes, as far as it can be known without asking anybody who is paid.

the world's truth, a reward model, a pairwise one, a local judge     timed by a calibration: they cost nothing
a judge behind an endpoint that holds back its calls                 at least so long: `judge.calls_per_minute`
other endpoints, services, people, functions of yours                not counted; the row says how to reason
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.estimate.oracle_memory import is_local_judge
from rayalign.estimate.purchases import Purchases, calls_per_label
from rayalign.runs.config import RunConfig
from rayalign.serve.config import OracleConfig, has_model
from rayalign.serve.kinds import oracle_kind


@dataclass(frozen=True, kw_only=True)
class LabelTime:
    """How long one oracle takes for all that it is asked."""

    section: str
    """`oracle`, or `evaluation.oracle`."""
    training: float | None
    """Seconds for the labels of the budget; None: not known."""
    evaluation: float | None
    """Seconds for those of the evaluation."""
    how: str
    """How it is known, or how to reason where it is not."""
    at_least: bool = False
    """Whether it takes longer than that."""


def free_oracles(config: RunConfig, custom: Any = None) -> dict[str, OracleConfig]:
    """By section: whoever may be asked in a calibration, since it costs nothing, and its config in this process.

    `custom` is an oracle that was given by hand: nobody knows what asking it costs.
    """
    sections = {} if custom is not None else {"oracle": config.oracle}
    if config.evaluation.oracle is not None:
        sections["evaluation.oracle"] = config.evaluation.oracle
    return {section: _here(asked) for section, asked in sections.items() if _is_free(asked)}


def make_free_oracles(config: RunConfig, world: World, custom: Any = None) -> dict[str, Oracle]:
    """Those of `free_oracles`, loaded."""
    return {
        section: oracle_kind(asked.kind).make(asked, world) for section, asked in free_oracles(config, custom).items()
    }


def label_times(
    config: RunConfig, bought: Purchases, measured: Mapping[str, float] | None, custom: Any = None
) -> tuple[LabelTime, ...]:
    """Of every oracle whose time is known, or has to be thought about.

    Args:
        measured: seconds of a label in one replica by section, of those that a calibration timed; None without one.
    """
    judge = config.evaluation.oracle
    shares = {"oracle": (config.oracle, bought.labels, 0 if judge else bought.evaluation_labels)}
    if judge is not None:
        shares["evaluation.oracle"] = (judge, 0, bought.evaluation_labels)
    found = []
    for section, (asked, labels, evaluation) in shares.items():
        given = custom if section == "oracle" else None
        seconds, how, at_least = _seconds(section, asked, given, (measured or {}).get(section))
        if seconds is None and not how:
            continue
        found.append(
            LabelTime(
                section=section,
                training=None if seconds is None else labels * seconds,
                evaluation=None if seconds is None else evaluation * seconds,
                how=how,
                at_least=at_least,
            )
        )
    return tuple(found)


def _seconds(section: str, asked: OracleConfig, custom: Any, measured: float | None) -> tuple[float | None, str, bool]:
    """Of one label by all replicas, how that is known, and whether it is the least."""
    replicas = asked.num_replicas
    if measured is not None:
        return measured / replicas, f"measured here, by {replicas} at a time", False
    if custom is not None or asked.kind == "function":
        return None, "a function of yours is not called for an estimate: labels x seconds of a call / replicas", False
    loaded = has_model(asked.kind, asked.judge.base_url)
    if asked.kind in ("world", "data") or loaded:
        paid = loaded and not _is_free(asked)
        return None, f"has a price, so it is not asked: labels x seconds / {replicas} replicas" if paid else "", False
    if asked.kind == "judge":
        at_once, calls = asked.judge.concurrency * asked.most_replicas, calls_per_label(asked)
        think = f"calls x seconds of a call / {at_once} at a time ({section}.judge.concurrency x replicas)"
        if asked.judge.calls_per_minute:
            limit = asked.judge.calls_per_minute * asked.most_replicas
            return calls * 60 / limit, f"{limit:g} calls a minute ({section}.judge.calls_per_minute); or {think}", True
        return None, f"a judge is not asked for an estimate: {think}", False
    if asked.kind in ("human", "users"):
        return None, "people: labels x seconds of a label / people at work at the same time", False
    return None, f"is not asked for an estimate: labels x seconds of a label / {replicas} at a time", False


def _is_free(asked: OracleConfig) -> bool:
    if asked.kind == "world":
        return True
    loaded = has_model(asked.kind, asked.judge.base_url)
    return loaded and not asked.price and not (is_local_judge(asked) and asked.judge.price)


def _here(asked: OracleConfig) -> OracleConfig:
    """On the device that a replica would have: this process may see GPUs that replicas don't reserve."""
    return replace(asked, device="cpu") if asked.device == "auto" and not asked.gpus_per_replica else asked
