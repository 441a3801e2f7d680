"""From duels to padded micro-batches: who computes what, in which forward.

Every worker plans for all workers, from the same batch, so that nobody has to ask: all ranks run the same number
of forwards (ZeRO-3 waits for ever otherwise), some of them on a dummy where a rank has no duel left.

Shapes: B duels, R = 2 B rows (the first responses, then the second ones), T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayalign.errors import DataError
from rayalign.types import Duel, Preference


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward."""

    indices: tuple[int, ...]
    """Positions of its duels in the batch; empty: a dummy, to be computed and multiplied by zero."""
    input_ids_RT: Tensor
    attention_mask_RT: Tensor
    response_mask_RT: Tensor

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask_RT.sum()) if self.indices else 0


def pair_length(duel: Duel) -> int:
    """Tokens of the longer of the two sequences, prompt included. `DataError` for what can't be trained on."""
    for name, response in (("first", duel.first), ("second", duel.second)):
        if not response.token_ids:
            raise DataError(
                f"duel {duel.id}: its {name} response has no token_ids. A response carries at least its "
                "end-of-sequence token; given texts are encoded once, by whoever owns the loop."
            )
    if not duel.prompt.token_ids:
        raise DataError(
            f"duel {duel.id}: prompt {duel.prompt.id!r} has no token_ids; encode prompts before duels are made."
        )
    return len(duel.prompt.token_ids) + max(len(duel.first.token_ids), len(duel.second.token_ids))


def plan(lengths: Sequence[int], workers: int, max_tokens: int) -> list[list[tuple[int, ...]]]:
    """Indices of each worker's micro-batches, as many for each worker.

    Duels are dealt by length, longest first, back and forth; a micro-batch takes duels until two rows per duel,
    padded to the longest, exceed `max_tokens` (one duel is always allowed).

    >>> plan([3, 9, 4], workers=2, max_tokens=16)
    [[(1,)], [(2, 0)]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(workers)]
    for position, index in enumerate(longest_first):
        turn, seat = divmod(position, workers)
        shares[seat if turn % 2 == 0 else workers - 1 - seat].append(index)
    plans = [_fill(share, lengths, max_tokens) for share in shares]
    most = max(map(len, plans))
    return [micro_batches + [()] * (most - len(micro_batches)) for micro_batches in plans]


def _fill(longest_first: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[tuple[int, ...]]:
    """Cut one worker's duels, longest first, into micro-batches."""
    micro_batches: list[list[int]] = []
    for index in longest_first:
        current = micro_batches[-1] if micro_batches else []
        if current and 2 * (len(current) + 1) * lengths[current[0]] <= max_tokens:
            current.append(index)
        else:
            micro_batches.append([index])
    return [tuple(micro_batch) for micro_batch in micro_batches]


def collate(preferences: Sequence[Preference], indices: tuple[int, ...]) -> MicroBatch:
    """Prompt and response ids as they were sampled, padded on the right with id 0 (which the mask hides)."""
    if not indices:
        ones_RT = torch.ones(2, 2, dtype=torch.long)
        return MicroBatch((), torch.zeros_like(ones_RT), ones_RT, torch.tensor([[False, True]] * 2))
    duels = [preferences[i].duel for i in indices]
    rows = [(d.prompt.token_ids, d.first.token_ids) for d in duels]
    rows += [(d.prompt.token_ids, d.second.token_ids) for d in duels]
    return MicroBatch(indices, *pad_rows(rows))


def pad_rows(rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and response mask, `R x T` each, of (prompt, response) rows; padding on the right."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids_RT = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask_RT = torch.zeros_like(input_ids_RT)
    response_mask_RT = torch.zeros_like(input_ids_RT, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids_RT[row, :end] = torch.tensor(prompt + response)
        attention_mask_RT[row, :end] = 1
        response_mask_RT[row, len(prompt) : end] = True
    return input_ids_RT, attention_mask_RT, response_mask_RT


def micro_batches(
    preferences: Sequence[Preference], wanted: Sequence[int], rank: int, workers: int, max_tokens: int
) -> list[MicroBatch]:
    """Worker `rank`'s micro-batches of the duels at the positions `wanted`."""
    lengths = [pair_length(preferences[i].duel) for i in wanted]
    mine = plan(lengths, workers, max_tokens)[rank]
    return [collate(preferences, tuple(wanted[i] for i in indices)) for indices in mine]
