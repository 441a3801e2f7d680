"""Settings of the labelling page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayalign.errors import ConfigError, did_you_mean
from rayalign.serve.labelling.aggregate import AGGREGATES
from rayalign.serve.listening import check_address, check_limits


@dataclass(frozen=True, kw_only=True)
class HumanConfig:
    """Who labels on the page, where it is served, and when an answer counts. Only for `oracle.kind=human`."""

    annotators_per_duel: int = 1
    """Votes a duel needs before it has a label."""
    aggregate: str = "majority"
    """How votes become a label: `majority` (a draw is a tie), or `dawid_skene`, which weighs annotators by how reliable
    they have been so far (Dawid and Skene 1979; by crowd-kit)."""
    tokens_file: str = ""
    """A line `name token` per annotator, `#` begins a comment. Empty: one annotator, whose token is made and kept in
    the queue's folder; on a loopback host only."""
    guidelines_file: str = ""
    """Plain text that the page shows beside the duel; empty: which of the two is the better response?"""
    host: str = "127.0.0.1"
    """Address the page listens on. Any but a loopback address needs tokens_file, and TLS in front of it."""
    port: int = 8700
    """TCP port the page listens on."""
    lease_s: float = 900.0
    """Seconds after which a duel that somebody opened and did not answer is given to somebody else."""
    undo_s: float = 20.0
    """Seconds for which an annotator's last answer can be undone and does not count yet. 0: it counts at once."""
    max_requests: int = 256
    """Requests of the page that are worked on at the same time; more are told to come back (429)."""
    folder: str = ""
    """Where the queue is kept, on a disk that the oracle's replica sees; empty: `labelling` in the run directory."""

    def __post_init__(self) -> None:
        check_limits("oracle.human.", self, counts=("annotators_per_duel", "max_requests"), seconds=("lease_s",))
        if self.aggregate not in AGGREGATES:
            raise ConfigError(
                f"oracle.human.aggregate={self.aggregate!r} is unknown. {did_you_mean(self.aggregate, AGGREGATES)}"
            )
        if not self.undo_s >= 0:
            raise ConfigError(f"oracle.human.undo_s={self.undo_s} must not be negative; 0 has answers count at once.")
        unnamed = "oracle.human.tokens_file is not set. Name a file with a token per annotator"
        check_address("oracle.human.", self, lacks="" if self.tokens_file else unnamed)
        if not self.tokens_file and self.annotators_per_duel > 1:
            raise ConfigError(
                f"oracle.human.annotators_per_duel={self.annotators_per_duel} needs as many annotators, and "
                "oracle.human.tokens_file, which names them, is not set."
            )


def tokens_path(human: HumanConfig) -> Path:
    """The file that has the annotators' tokens."""
    return Path(human.tokens_file or Path(human.folder) / "tokens")
