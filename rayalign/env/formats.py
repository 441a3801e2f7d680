r"""Well-known datasets whose rows are not yet prompts: pure functions from a row, as it is published, to prompts.

    a row of the data -> Format.read -> no, one or several records -> prompt_data.to_prompt

    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
        -> {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " No", "reference": " Hello"}

A record has the columns that `Columns` names by default (prompt, reference, responses, chosen, rejected), and
`preferred`: the index of the better of its `responses`. Data whose columns only have other names needs no format:
trl-lib/tldr is read with `env.reference_column=completion`, HuggingFaceH4/ultrafeedback_binarized as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayalign.errors import ConfigError, did_you_mean

Row = Mapping[str, Any]

ASSISTANT = "\n\nAssistant:"
SHP_LEAST_RATIO = 2.0
"""Of the scores of two comments on Reddit: pairs that are closer are left out, as in the code of Mehta et al. 2023."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How rows of one dataset are read."""

    data: str
    """Where rows of this form are published."""
    schema: pa.Schema
    """The columns that `read` looks at, and their types."""
    read: Callable[[Row], Iterator[Row]]
    """The records that a row stands for. Raises `ValueError` that says what is wrong with it."""
    optional: frozenset[str] = frozenset()
    """Columns of the schema that may be missing."""


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {value!r:.80}; it must be a text.")
    return value


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float):
        raise ValueError(f"field {name!r} is {value!r:.80}; it must be a number.")
    return value


def _hh(row: Row) -> Iterator[Row]:
    """Two dialogues that differ in the assistant's last turn."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        raise ValueError("field 'chosen' has no turn of the assistant ('\\n\\nAssistant:').")
    prompt = chosen[:end]
    if rejected.startswith(prompt):  # a few dialogues differ earlier: they are no pair of responses to one prompt
        yield {"prompt": prompt, "chosen": chosen[end:], "rejected": rejected[end:], "reference": chosen[end:]}


def _shp(row: Row) -> Iterator[Row]:
    """A post of Reddit and two comments on it; label 1: the first is preferred."""
    low, high = sorted((_number(row, "score_A"), _number(row, "score_B")))
    if low > 0 and high / low < SHP_LEAST_RATIO:
        return
    responses = [" " + _text(row, "human_ref_A"), " " + _text(row, "human_ref_B")]
    preferred = 0 if row.get("labels") == 1 else 1
    yield {
        "prompt": f"\n\nHuman: {_text(row, 'history')}{ASSISTANT}",
        "responses": responses,
        "preferred": preferred,
        "reference": responses[preferred],
    }


def _jeopardy(row: Row) -> Iterator[Row]:
    """A clue. With a wrong answer beside the right one, also a pair of responses: a right answer is better than none
    (the empty text), and none is better than a wrong one; which of the three pairs, the clue's hash decides.
    """
    clue, answer = _text(row, "question"), _text(row, "answer")
    worth = f", for {row['value']}" if row.get("value") else ""
    record: dict[str, Any] = {"prompt": f"{_text(row, 'category')}{worth}: {clue}", "reference": answer}
    if (wrong := row.get("wrong_answer")) is not None:
        pairs = [(answer, ""), (answer, str(wrong)), ("", str(wrong))]
        digest = hashlib.blake2b(record["prompt"].encode("utf-8", "replace"), digest_size=8).digest()
        record["chosen"], record["rejected"] = pairs[int.from_bytes(digest, "big") % 3]
    yield record


def _haikus(row: Row) -> Iterator[Row]:
    """Keywords and a haiku that has them."""
    request = f'Write a haiku containing the words "{_text(row, "keywords")}".'
    yield {"prompt": f"Instruct: {request}\n\nOutput: ", "reference": _text(row, "text")}


def _webgpt(row: Row) -> Iterator[Row]:
    """A question and two answers, with scores from -1 to 1 that sum to 0; equal answers are no pair."""
    question = row.get("question")
    if not isinstance(question, Mapping):
        raise ValueError(f"field 'question' is {question!r:.80}; it must be an object with a text 'full_text'.")
    record: dict[str, Any] = {"prompt": _text(question, "full_text")}
    first, second = row.get("score_0"), row.get("score_1")
    if first is not None and second is not None and first != second:
        responses = [_text(row, "answer_0"), _text(row, "answer_1")]
        preferred = int(second > first)
        record |= {"responses": responses, "preferred": preferred, "reference": responses[preferred]}
    yield record


_STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()

FORMATS: dict[str, Format] = {
    "haikus": Format(
        data="data/haiku_train.csv of the code of Mehta et al. 2023",
        schema=pa.schema([("keywords", _STRING), ("text", _STRING)]),
        read=_haikus,
    ),
    "hh": Format(
        data="Anthropic/hh-rlhf",
        schema=pa.schema([("chosen", _STRING), ("rejected", _STRING)]),
        read=_hh,
    ),
    "jeopardy": Format(
        data="the 217,000 clues of Jeopardy!; with a column wrong_answer, the data of Mehta et al. 2023",
        schema=pa.schema([(name, _STRING) for name in ("category", "value", "question", "answer", "wrong_answer")]),
        optional=frozenset({"value", "wrong_answer"}),
        read=_jeopardy,
    ),
    "shp": Format(
        data="stanfordnlp/SHP",
        schema=pa.schema(
            [
                *((name, _STRING) for name in ("history", "human_ref_A", "human_ref_B")),
                *((name, _INT) for name in ("labels", "score_A", "score_B")),
            ]
        ),
        read=_shp,
    ),
    "webgpt": Format(
        data="openai/webgpt_comparisons",
        schema=pa.schema(
            [
                ("question", pa.struct([("full_text", _STRING)])),
                *((name, _STRING) for name in ("answer_0", "answer_1")),
                *((name, _FLOAT) for name in ("score_0", "score_1")),
            ]
        ),
        read=_webgpt,
    ),
}
"""Name -> format. To add one, write its function and its line."""


def find_format(name: str) -> Format | None:
    """The format of that name; None for the empty name. `ConfigError` if there is none."""
    if name and name not in FORMATS:
        raise ConfigError(f"env.format={name!r} is unknown. {did_you_mean(name, FORMATS)}")
    return FORMATS.get(name)
