"""The ledger as a training set for other people's trainers: one row per label, winner and loser told apart.

`prompt`, `chosen`, `rejected` are what Hugging Face `datasets` users and TRL's `DPOTrainer` expect: TRL's
"standard" format (strings), or its "conversational" one (lists of role and content). Ties have no winner and
are left out; the ledger keeps them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayalign.ledger.rows import from_json
from rayalign.types import LabelSource

LabelledRows = tuple[pa.RecordBatch, np.ndarray, np.ndarray, np.ndarray]
"""Stored rows, their labels, probabilities (NaN where there is none) and whether they are synthetic."""

Between = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], Sequence[str]], list[str]]
"""From the tokens of prompts and of responses, and the responses' texts, to what stands between the two in a text."""

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_ROWS_PER_GROUP = 8192


def table_schema(conversational: bool = False) -> pa.Schema:
    """The columns, in order."""
    text = _MESSAGES if conversational else pa.string()
    return pa.schema(
        [
            ("prompt", text),
            ("chosen", text),
            ("rejected", text),
            ("duel_id", pa.string()),
            ("prompt_id", pa.string()),
            ("batch", pa.int32()),
            ("label", pa.float64()),  # 1: the first shown won
            ("probability", pa.float64()),  # that the first shown wins, as the oracle said
            ("source", pa.string()),  # oracle or synthetic
            ("winner_is_first", pa.bool_()),
            ("policy_version", pa.int32()),  # of the newer of the two
            ("chosen_source", pa.string()),  # policy, reference or data
            ("rejected_source", pa.string()),
        ]
    )


def preference_batches(
    rows: Iterable[LabelledRows], conversational: bool = False, between: Between | None = None
) -> Iterator[pa.RecordBatch]:
    """One record batch of `table_schema` per message of the ledger; see `write_preferences`."""
    schema = table_schema(conversational)
    for stored, labels, probabilities, synthetic in rows:
        kept = np.flatnonzero(labels != 0.5)
        if not len(kept):
            continue
        stored, labels = stored.take(pa.array(kept)), labels[kept]
        first_won = pa.array(labels > 0.5)

        def of(
            part: str, stored: pa.RecordBatch = stored, first_won: pa.Array = first_won
        ) -> tuple[pa.Array, pa.Array]:
            first, second = stored.column(f"first_{part}"), stored.column(f"second_{part}")
            return pc.if_else(first_won, first, second), pc.if_else(first_won, second, first)

        prompt = stored.column("prompt_text")
        chosen, rejected = of("text")
        chosen_source, rejected_source = of("source")
        versions = stored.column("first_policy_version"), stored.column("second_policy_version")
        if between is not None and not conversational:
            prompt_ids, ids = stored.column("prompt_token_ids").to_pylist(), of("token_ids")
            chosen = _joined(between, prompt_ids, ids[0], chosen)
            rejected = _joined(between, prompt_ids, ids[1], rejected)
        if conversational:
            prompt = _as_prompts(prompt.to_pylist(), stored.column("prompt_meta").to_pylist())
            chosen, rejected = _as_answers(chosen), _as_answers(rejected)
        source = np.where(synthetic[kept], LabelSource.SYNTHETIC.value, LabelSource.ORACLE.value)
        columns = [
            prompt,
            chosen,
            rejected,
            stored.column("duel_id"),
            stored.column("prompt_id"),
            stored.column("batch"),
            pa.array(labels),
            pa.array(probabilities[kept], from_pandas=True),  # NaN becomes null
            pa.array(source.tolist(), pa.string()),
            first_won,
            pc.max_element_wise(*versions),
            chosen_source,
            rejected_source,
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def write_preferences(
    rows: Iterable[LabelledRows], folder: Path, conversational: bool = False, between: Between | None = None
) -> Path:
    """`folder/preferences.parquet`, replaced whole or not at all; read it with `datasets.load_dataset(folder)`.

    `between` puts a text before each response of the standard format, whose readers join it to the prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial, schema = folder / ".preferences.partial", table_schema(conversational)
    with pq.ParquetWriter(partial, schema) as writer:
        waiting: list[pa.RecordBatch] = []
        for batch in preference_batches(rows, conversational, between):
            waiting.append(batch)
            if sum(b.num_rows for b in waiting) >= _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_batches(waiting, schema))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema))
    os.replace(partial, folder / "preferences.parquet")
    return folder


def _joined(between: Between, prompt_ids: list[list[int]], ids: pa.Array, texts: pa.Array) -> pa.Array:
    joints = between(prompt_ids, ids.to_pylist(), texts.to_pylist())
    return pc.binary_join_element_wise(pa.array(joints, pa.string()), texts, "")


def _as_prompts(texts: list[str], metas: list[str | None]) -> pa.Array:
    messages = [
        from_json(meta).get("messages") or [{"role": "user", "content": text}]
        for text, meta in zip(texts, metas, strict=True)
    ]
    return pa.array([[{"role": m["role"], "content": m["content"]} for m in one] for one in messages], _MESSAGES)


def _as_answers(texts: pa.Array) -> pa.Array:
    return pa.array([[{"role": "assistant", "content": text}] for text in texts.to_pylist()], _MESSAGES)
