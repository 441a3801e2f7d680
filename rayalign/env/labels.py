"""From a probability to the bit that is paid for, and who says it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Protocol

from rayalign.errors import ConfigError, WaitError
from rayalign.types import Duel, Preference, Verdict

LABEL_MODES = ("bernoulli", "deterministic")
LATE_POLL_S = 1.0
"""Between two questions to a late oracle whether there are answers by now."""


class Oracle(Protocol):
    """Whoever is asked, whatever the transport. Batches in, batches out, in the same order."""

    @property
    def id(self) -> str:
        """Names kind and version of the oracle in the ledger; never a secret."""

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel. Raises `OracleError` only if nobody answered at all."""


class LateOracle(Oracle, Protocol):
    """An oracle that may take days: it is asked after what it was given, and never waited for.

    It has one replica, unless its attribute `shared` says that all of them ask in the same place.
    """

    def poll(self, duels: Sequence[Duel]) -> list[Verdict]:
        """Take in the duels that are new, and return the verdicts on `duels` that are there; never waits.

        In any order, at most one per duel. What was returned once is returned again when asked again.
        """


def judge_late(oracle: LateOracle, duels: Sequence[Duel], timeout_s: float) -> list[Verdict]:
    """`Oracle.judge` of a late oracle, for who has nothing else to do: ask after `duels` until all have a verdict.

    Raises `WaitError` after `timeout_s`; what is answered after that is there when asked again.
    """
    deadline = time.monotonic() + timeout_s
    verdicts: dict[str, Verdict] = {}
    waiting = {duel.id: duel for duel in duels}
    while waiting:
        for verdict in oracle.poll(list(waiting.values())):
            verdicts[verdict.duel_id] = verdict
            del waiting[verdict.duel_id]
        if waiting and time.monotonic() > deadline:
            raise WaitError(
                f"waited {timeout_s:g} s (oracle.request_timeout_s) for the oracle {oracle.id} to judge {len(waiting)} "
                f"of {len(duels)} duels, {next(iter(waiting))} among them. They stay with it, and answers are kept: "
                "ask again to wait on."
            )
        if waiting:
            time.sleep(LATE_POLL_S)
    return [verdicts[duel.id] for duel in duels]


class Labeler(Protocol):
    """What an environment asks for labels: an oracle directly, or one with a budget and a ledger before it."""

    def label(self, duels: Sequence[Duel]) -> list[Preference | None]:
        """A preference per duel, or None where the oracle gave no verdict (yet): nothing was charged for it."""


def draw_label(probability: float, duel_id: str, mode: str, seed: int) -> float:
    """The label of a duel whose first response wins with `probability`.

    `deterministic`: the likelier response wins, 0.5 is a tie (SEA's TL;DR runs). `bernoulli`: a coin flip
    that depends on `seed` and `duel_id` alone, so that asking again gives the same answer.

    >>> draw_label(0.9, "a", "deterministic", 0), draw_label(0.5, "a", "deterministic", 0)
    (1.0, 0.5)
    """
    if mode == "deterministic":
        return 0.5 if probability == 0.5 else float(probability > 0.5)
    if mode != "bernoulli":
        raise ConfigError(f"oracle.labels={mode!r} must be one of {', '.join(LABEL_MODES)}.")
    digest = hashlib.blake2b(f"{seed}:{duel_id}".encode(), digest_size=8).digest()
    return float(int.from_bytes(digest, "big") / 2**64 < probability)


class DirectLabeler:
    """Asks an oracle in the same process; no budget, no memory. What a bare `gymnasium.make` uses."""

    def __init__(self, oracle: Oracle, mode: str = "bernoulli", seed: int = 0) -> None:
        self.oracle, self.mode, self.seed = oracle, mode, seed

    def label(self, duels: Sequence[Duel]) -> list[Preference | None]:
        """One label per duel, drawn from the oracle's probability."""
        verdicts = self.oracle.judge(duels)
        return [
            None
            if verdict.probability is None
            else Preference(
                duel=duel,
                label=draw_label(verdict.probability, duel.id, self.mode, self.seed),
                probability=verdict.probability,
            )
            for duel, verdict in zip(duels, verdicts, strict=True)
        ]
