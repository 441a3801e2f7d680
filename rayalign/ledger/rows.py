"""Duels as rows of the ledger and back: the schema, and nothing that knows about files.

One schema for all events, flat, so that any Arrow tool reads it; columns that do not apply to an event are null.

    event       row                                          comes in a message with
    batch       header: index, counts, versions (in `meta`)  the requested and synthetic rows of that batch
    requested   a duel, complete, about to be asked          the header
    synthetic   a duel, complete, labelled by the agent      the header
    answered    id, label, probability, oracle, price        the other outcomes of one call
    failed      id, reason, oracle                           the other outcomes of one call
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from rayalign.errors import LedgerError
from rayalign.types import Candidate, Duel, Prompt


class Event(StrEnum):
    """What a row says."""

    BATCH = "batch"
    REQUESTED = "requested"
    SYNTHETIC = "synthetic"
    ANSWERED = "answered"
    FAILED = "failed"


def _candidate_fields(role: str) -> list[pa.Field]:
    return [
        pa.field(f"{role}_text", pa.string()),
        pa.field(f"{role}_token_ids", pa.list_(pa.int32())),
        pa.field(f"{role}_logprobs", pa.list_(pa.float64())),
        pa.field(f"{role}_policy_version", pa.int32()),
        pa.field(f"{role}_finished", pa.bool_()),
        pa.field(f"{role}_source", pa.string()),
    ]


# No dictionary-encoded columns: their dictionaries would have to be in the stream before each message.
CONTENT = [
    pa.field("prompt_id", pa.string()),
    pa.field("prompt_text", pa.string()),
    pa.field("prompt_token_ids", pa.list_(pa.int32())),
    pa.field("prompt_reference", pa.string()),
    pa.field("prompt_pair", pa.list_(pa.string())),
    pa.field("prompt_meta", pa.string()),
    *_candidate_fields("first"),
    *_candidate_fields("second"),
    pa.field("meta", pa.string()),
]
"""What a duel is, beside its id and batch."""
SCHEMA = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("time", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("event", pa.string(), nullable=False),
        pa.field("batch", pa.int32()),
        pa.field("duel_id", pa.string()),
        pa.field("label", pa.float64()),
        pa.field("probability", pa.float64()),
        pa.field("oracle", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("reason", pa.string()),
        *CONTENT,
    ],
    metadata={"rayalign.ledger.ledger": "1"},
)


def record_batch(columns: Mapping[str, Any], num_rows: int, seq: int, time_us: int) -> pa.RecordBatch:
    """Events of the given columns; see `rows_of`."""
    given = {"seq": np.arange(seq, seq + num_rows), "time": np.full(num_rows, time_us), **columns}
    return rows_of(SCHEMA, given, num_rows)


def rows_of(schema: pa.Schema, columns: Mapping[str, Any], num_rows: int) -> pa.RecordBatch:
    """Rows of the given columns, the others null. Raises `LedgerError` for a value that has no place in its column."""
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        try:
            if values is None:
                arrays.append(pa.nulls(num_rows, field.type))
            else:
                arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
        except (pa.ArrowException, UnicodeError, TypeError, OverflowError) as error:
            raise LedgerError(
                f"ledger column {field.name} can't hold what it was given: {error}. Nothing was recorded."
            ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def content_columns(duels: Sequence[Duel | None]) -> dict[str, Any]:
    """The columns that describe duels completely; None (a header row) becomes nulls and empty lists."""
    prompts = [duel and duel.prompt for duel in duels]
    columns = {
        "duel_id": [duel and duel.id for duel in duels],
        "prompt_id": [prompt and prompt.id for prompt in prompts],
        "prompt_text": [prompt and prompt.text for prompt in prompts],
        "prompt_token_ids": _lists((prompt.token_ids if prompt else () for prompt in prompts), np.int32),
        "prompt_reference": [prompt and prompt.reference for prompt in prompts],
        "prompt_pair": [prompt and prompt.pair for prompt in prompts],
        "prompt_meta": [prompt and to_json(prompt.meta, f"prompt {prompt.id}") for prompt in prompts],
        "meta": [duel and to_json(duel.meta, f"duel {duel.id}") for duel in duels],
    }
    for role in ("first", "second"):
        candidates: list[Candidate | None] = [getattr(duel, role) if duel else None for duel in duels]
        columns |= {
            f"{role}_text": [c and c.text for c in candidates],
            f"{role}_token_ids": _lists((c.token_ids if c else () for c in candidates), np.int32),
            f"{role}_logprobs": _lists((c.logprobs if c else () for c in candidates), np.float64),
            f"{role}_policy_version": [c and c.policy_version for c in candidates],
            f"{role}_finished": [c and c.finished for c in candidates],
            f"{role}_source": [c and c.source for c in candidates],
        }
    return columns


def _lists(rows: Iterable[Sequence[float]], dtype: type[np.generic]) -> pa.ListArray:
    """A list column by way of numpy: 20 times faster than letting Arrow look at every Python number."""
    rows = list(rows)
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
    try:
        values = np.fromiter(chain.from_iterable(rows), dtype, int(offsets[-1]))
    except (TypeError, ValueError, OverflowError) as error:
        raise LedgerError(f"token ids and log-probabilities must be numbers: {error}. Nothing was recorded.") from error
    return pa.ListArray.from_arrays(offsets, values)


def duels_of(rows: pa.RecordBatch) -> list[Duel]:
    """The duels that `rows` describe: columns `batch`, `duel_id` and `CONTENT`."""
    columns = {
        name: rows.column(name).to_pylist()
        for name in (
            "batch",
            "duel_id",
            "meta",
            *(field.name for field in CONTENT if field.name != "meta"),
        )
    }
    firsts, seconds = _candidates(columns, "first"), _candidates(columns, "second")
    prompts = [
        Prompt(
            id=name,
            text=text,
            token_ids=tuple(ids),
            reference=reference,
            pair=pair and tuple(pair),
            meta=from_json(meta),
        )
        for name, text, ids, reference, pair, meta in zip(
            *(columns[f"prompt_{part}"] for part in ("id", "text", "token_ids", "reference", "pair", "meta")),
            strict=True,
        )
    ]
    return [
        Duel(id=name, batch=batch, prompt=prompt, first=first, second=second, meta=from_json(meta))
        for name, batch, prompt, first, second, meta in zip(
            columns["duel_id"], columns["batch"], prompts, firsts, seconds, columns["meta"], strict=True
        )
    ]


def _candidates(columns: Mapping[str, list[Any]], role: str) -> list[Candidate]:
    parts = ("text", "token_ids", "logprobs", "policy_version", "finished", "source")
    return [
        Candidate(
            text=text,
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            policy_version=version,
            finished=finished,
            source=source,
        )
        for text, ids, logprobs, version, finished, source in zip(*(columns[f"{role}_{p}"] for p in parts), strict=True)
    ]


def to_json(meta: Mapping[str, Any], whose: str) -> str | None:
    """`meta` as JSON (tuples become lists, numpy numbers plain ones); null if empty. `LedgerError` if it can't be."""
    if not meta:
        return None
    try:
        return _ENCODE(dict(meta))
    except (TypeError, ValueError) as error:
        raise LedgerError(
            f"meta of {whose} can't be written as JSON: {error}. Keep numbers, strings, lists and dicts in it."
        ) from error


def from_json(meta: str | None) -> dict[str, Any]:
    """What `to_json` wrote."""
    return json.loads(meta) if meta else {}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


_ENCODE = json.JSONEncoder(default=_plain, ensure_ascii=False).encode  # json.dumps would build one for every row
