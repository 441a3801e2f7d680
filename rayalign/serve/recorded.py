"""The oracle that repeats: what preference data says of its own pairs."""

from __future__ import annotations

from collections.abc import Sequence

from rayalign.env.labels import Oracle
from rayalign.env.prompt_data import PREFERRED
from rayalign.env.world import World
from rayalign.errors import OracleError
from rayalign.serve.config import OracleConfig
from rayalign.serve.kinds import OracleKind
from rayalign.types import Duel, Verdict


class RecordedOracle:
    """Looks up who won a duel between the two responses that the data itself has for a prompt, at `price` a label.

    A label that is looked up costs budget as any other: what the data holds is what one could have bought.
    """

    id = "data"

    def __init__(self, price: float = 0.0) -> None:
        self.price = price

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel, 1 or 0. Raises `OracleError` for a duel that the data has no preference about."""
        return [Verdict(duel_id=duel.id, probability=self._first_wins(duel), price=self.price) for duel in duels]

    def _first_wins(self, duel: Duel) -> float:
        pair, preferred = duel.prompt.pair, duel.prompt.meta.get(PREFERRED)
        asked = (duel.first.text, duel.second.text)
        if pair is None or preferred is None or asked not in (tuple(pair), tuple(pair)[::-1]):
            raise OracleError(
                f"oracle.kind='data' only knows the pairs of the data, and duel {duel.id} (prompt {duel.prompt.id}) is "
                "none of them. Use an agent that asks about given pairs (ae_dpo, us_dpo) and, for evaluation, an "
                "oracle of its own (evaluation.oracle.kind), or another oracle."
            )
        return float(asked[0] == pair[preferred])


def _make(config: OracleConfig, world: World | None) -> Oracle:
    return RecordedOracle(price=config.price)


DATA = OracleKind(make=_make)
"""The kind `data`."""
