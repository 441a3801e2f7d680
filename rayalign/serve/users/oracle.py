"""Users as an oracle: their verdict on a duel is in the run's book before the duel is in its ledger."""

from __future__ import annotations

from collections.abc import Sequence

from rayalign.serve.users.book import LABELS
from rayalign.serve.users.desk import Desk
from rayalign.types import Duel, Verdict

ID = "users:1"


class UsersOracle:
    """What users have chosen. Nobody waits: a duel is asked only when its user has answered."""

    id = ID

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel; a failure for one that no user has compared."""
        choices = self.desk.choices([duel.id for duel in duels]) if duels else []
        return [
            Verdict(duel_id=duel.id, probability=LABELS[choice])
            if choice in LABELS
            else Verdict(duel_id=duel.id, failure="no user has compared these two")
            for duel, choice in zip(duels, choices, strict=True)
        ]
