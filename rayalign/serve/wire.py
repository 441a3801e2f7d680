"""What travels between the loop and the oracle service: columns of texts and numbers, no token ids.

Objects by the thousand are slow to pickle; a few lists are not. Prompts travel once per call, however many duels
they are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayalign.types import Candidate, Duel, Prompt, Verdict


@dataclass(frozen=True, slots=True)
class PromptColumns:
    """What an oracle may read of prompts: everything but their token ids."""

    ids: list[str]
    texts: list[str]
    references: list[str | None]
    pairs: list[tuple[str, str] | None]
    metas: list[Mapping[str, Any]]

    @classmethod
    def pack(cls, prompts: Sequence[Prompt]) -> PromptColumns:
        """The columns of `prompts`, in their order."""
        return cls(
            ids=[p.id for p in prompts],
            texts=[p.text for p in prompts],
            references=[p.reference for p in prompts],
            pairs=[p.pair for p in prompts],
            metas=[p.meta for p in prompts],
        )

    def unpack(self) -> list[Prompt]:
        """The prompts."""
        rows = zip(self.ids, self.texts, self.references, self.pairs, self.metas, strict=True)
        return [Prompt(id=i, text=t, token_ids=(), reference=r, pair=p, meta=m) for i, t, r, p, m in rows]


@dataclass(frozen=True, slots=True)
class DuelColumns:
    """Duels on their way to the oracle; one entry per duel except in `prompts`."""

    ids: list[str]
    batches: list[int]
    prompts: PromptColumns
    prompt_of: list[int]
    """Index into `prompts`."""
    first: list[str]
    second: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def pack(cls, duels: Sequence[Duel]) -> DuelColumns:
        """The columns of `duels`, in their order."""
        index: dict[int, int] = {}
        prompts: list[Prompt] = []
        for duel in duels:
            if id(duel.prompt) not in index:
                index[id(duel.prompt)] = len(prompts)
                prompts.append(duel.prompt)
        return cls(
            ids=[duel.id for duel in duels],
            batches=[duel.batch for duel in duels],
            prompts=PromptColumns.pack(prompts),
            prompt_of=[index[id(duel.prompt)] for duel in duels],
            first=[duel.first.text for duel in duels],
            second=[duel.second.text for duel in duels],
        )

    def unpack(self) -> list[Duel]:
        """The duels, as far as an oracle may know them: who wrote a response, and when, is not told."""
        prompts = self.prompts.unpack()
        rows = zip(self.ids, self.batches, self.prompt_of, self.first, self.second, strict=True)
        return [
            Duel(id=id_, batch=batch, prompt=prompts[p], first=_response(first), second=_response(second))
            for id_, batch, p, first, second in rows
        ]


def _response(text: str) -> Candidate:
    return Candidate(text=text, token_ids=(), logprobs=(), policy_version=-1)


@dataclass(frozen=True, slots=True)
class VerdictColumns:
    """Verdicts on their way back, in the order of the duels."""

    ids: list[str]
    probabilities: list[float | None]
    failures: list[str | None]
    prices: list[float]

    @classmethod
    def pack(cls, verdicts: Sequence[Verdict]) -> VerdictColumns:
        """The columns of `verdicts`, in their order."""
        return cls(
            ids=[v.duel_id for v in verdicts],
            probabilities=[v.probability for v in verdicts],
            failures=[v.failure for v in verdicts],
            prices=[v.price for v in verdicts],
        )

    def unpack(self) -> list[Verdict]:
        """The verdicts."""
        rows = zip(self.ids, self.probabilities, self.failures, self.prices, strict=True)
        return [Verdict(duel_id=i, probability=p, failure=f, price=price) for i, p, f, price in rows]
