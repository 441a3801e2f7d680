"""A pairwise reward model as an oracle: a classifier that reads the prompt and both responses together.

    duel -> template, in one or both orders -> cut to the model's length -> logit that the first response is better
         -> half the difference of the two orders -> P(first wins) = sigmoid(scale * margin)

As PairRM (Jiang et al. 2023, LLM-Blender), with any Hugging Face sequence classifier in its place: one
label (its logit says that the first is better) or two (the difference of theirs does).

Truncation rule: first the prompt loses its beginning, down to a quarter of the room; then the responses lose their
ends, the longer one first, so that neither is judged by less than the other unless it is shorter. A duel is cut the
same in both orders.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError, OracleError
from rayalign.serve.classifier import Classifier, Row, Truncations
from rayalign.serve.config import OracleConfig
from rayalign.serve.judge_prompts import conversation
from rayalign.serve.kinds import OracleKind, check_target
from rayalign.serve.oracles import sigmoid
from rayalign.serve.pairwise_config import BREAK
from rayalign.serve.score_cache import ScoreCache, content_key
from rayalign.types import Duel, Prompt, Verdict

PROMPT_KEEPS = 4
"""A prompt is not cut below one part in so many of the room, for the sake of the responses."""
ATTEMPTS = 8
"""At cutting: texts that are put together may have a few tokens more than each alone."""


class Reading(NamedTuple):
    """What the model reads at once."""

    prompt: str
    first: str
    second: str

    def swapped(self) -> Reading:
        """With the responses in the other order."""
        return Reading(self.prompt, self.second, self.first)


class PairwiseOracle:
    """`P(first wins) = sigmoid(scale * margin(x, first, second))` with a model's margin; both orders make it fair."""

    def __init__(self, config: OracleConfig) -> None:
        self.config = config
        self.classifier = Classifier(config, labels=(1, 2), what="a pairwise reward model")
        self.encoder = PairEncoder(self.classifier, config.pairwise.template)
        self._cache = ScoreCache(config.cache_size)

    @property
    def id(self) -> str:
        """`pairwise:`, the model's name and version, and a checksum of what it is shown and how it is read."""
        asked = hashlib.blake2b(repr(sorted(asdict(self.config.pairwise).items())).encode(), digest_size=4).hexdigest()
        return f"pairwise:{self.classifier.name}@{self.classifier.version}#{asked}"

    def keep_in(self, folder: str | Path) -> None:
        """Share scores with all replicas that use `folder`, and with those that come after them."""
        self._cache.keep_in(folder, f"{self.id}, {self.classifier.reads}")

    @property
    def truncated(self) -> int:
        """Readings so far that did not hold all of their texts."""
        return self.encoder.truncations.count

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel. Raises `OracleError` that names the duel whose logit is not finite."""
        asked = [Reading(conversation(duel.prompt), duel.first.text, duel.second.text) for duel in duels]
        return [self._verdict(duel, margin) for duel, margin in zip(duels, self.margins(asked), strict=True)]

    def rank(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """A score per response, the sum of its margins over all others; the best has the highest.

        MaxLogits of LLM-Blender (Jiang et al. 2023). Raises `DataError` where a comparison does not fit into the model.
        """
        text = conversation(prompt)
        pairs = list(combinations(range(len(responses)), 2))
        margins = self.margins([Reading(text, responses[i], responses[j]) for i, j in pairs])
        scores = [0.0] * len(responses)
        for (i, j), margin in zip(pairs, margins, strict=True):
            if margin is None:
                raise DataError(f"responses {i} and {j} can't be compared: {self._no_room()}")
            scores[i] += margin
            scores[j] -= margin
        return scores

    def margins(self, readings: Sequence[Reading]) -> list[float | None]:
        """Per reading the logit of its first response over its second; None where the model has no room for both.

        With `order=both`, swapping the responses changes the sign and nothing else.
        """
        if self.config.pairwise.order == "given":
            return self._logits(readings)
        both = self._logits([*readings, *(reading.swapped() for reading in readings)])
        return [
            None if shown is None or swapped is None else (shown - swapped) / 2
            for shown, swapped in zip(both[: len(readings)], both[len(readings) :], strict=True)
        ]

    # -- inside ---------------------------------------------------------------------------------------------------
    def _logits(self, readings: Sequence[Reading]) -> list[float | None]:
        keys = [content_key(*reading) for reading in readings]
        known = self._cache.through(dict(zip(keys, readings, strict=True)), self._new_logits)
        return [known[key] for key in keys]

    def _new_logits(self, readings: Sequence[Reading]) -> list[float | None]:
        rows = self.encoder.encode(readings)
        logits = iter(self.classifier.logits([row for row in rows if row is not None]))
        return [None if row is None else self._first_is_better(next(logits)) for row in rows]

    def _first_is_better(self, logits: Sequence[float]) -> float:
        if len(logits) == 1:
            return logits[0]
        yes = self.config.pairwise.first_label
        return logits[yes] - logits[1 - yes]

    def _verdict(self, duel: Duel, margin: float | None) -> Verdict:
        if margin is None:
            return Verdict(duel_id=duel.id, failure=self._no_room())
        if not math.isfinite(margin):
            raise OracleError(
                f"oracle {self.id} judged duel {duel.id} (prompt {duel.prompt.id}) with a logit of {margin}, which is "
                "no number. With oracle.dtype=bfloat16, try float32."
            )
        return Verdict(duel_id=duel.id, probability=sigmoid(self.config.scale * margin), price=self.config.price)

    def _no_room(self) -> str:
        return f"the {self.classifier.max_tokens} tokens of the pairwise model have no room for two responses"


class PairEncoder:
    """Turns readings into token rows of at most `max_tokens`. Raises `ConfigError` if the tokenizer can't do it."""

    def __init__(self, classifier: Classifier, template: str) -> None:
        self.tokenizer, self.max_tokens = classifier.tokenizer, classifier.max_tokens
        self.truncations = Truncations("readings of a prompt and two responses were cut", self.max_tokens)
        self._names = ("input_ids", "token_type_ids") if classifier.token_types else ("input_ids",)
        self._parts = template.split(BREAK, 1)
        more = self._parts[1:] and BREAK in self._parts[1]
        if more and not self.tokenizer.sep_token:
            raise ConfigError(
                f"oracle.pairwise.template={template!r} needs a separator token, which the tokenizer of the model does "
                "not have. Write in its place what the model was trained with."
            )
        if not self.tokenizer.is_fast:
            raise ConfigError("oracle.kind='pairwise' needs a fast tokenizer (tokenizer.json), to cut texts exactly.")
        self._fixed = len(self._row(Reading("", "", ""))["input_ids"])

    def encode(self, readings: Sequence[Reading]) -> list[Row | None]:
        """Model inputs per reading, not padded; None where there is no room."""
        if not readings:
            return []
        rows = self._rows(readings)
        return [
            row if len(row["input_ids"]) <= self.max_tokens else self._cut(reading)
            for reading, row in zip(readings, rows, strict=True)
        ]

    def _rows(self, readings: Sequence[Reading]) -> list[Row]:
        filled = [[self._fill(part, reading) for part in self._parts] for reading in readings]
        columns = [list(texts) for texts in zip(*filled, strict=True)]
        encoded = self.tokenizer(*columns, return_token_type_ids=True)
        return [{name: encoded[name][i] for name in self._names} for i in range(len(readings))]

    def _row(self, reading: Reading) -> Row:
        return self._rows([reading])[0]

    def _fill(self, part: str, reading: Reading) -> str:
        """Everything is put in its place at once, so that a response that says "{second}" stays what it is."""
        texts: dict[str, Any] = reading._asdict() | {"sep": self.tokenizer.sep_token}
        return re.sub(r"\{(prompt|first|second|sep)\}", lambda place: texts[place[1]], part)

    def _cut(self, reading: Reading) -> Row | None:
        ends = [self._token_ends(text) for text in reading]
        room = self.max_tokens - self._fixed
        for _ in range(ATTEMPTS):
            prompt, first, second = shares(len(ends[0]), len(ends[1]), len(ends[2]), room)
            if not (first and second):
                return None
            row = self._row(
                Reading(
                    _last(reading.prompt, ends[0], prompt),
                    _beginning(reading.first, ends[1], first),
                    _beginning(reading.second, ends[2], second),
                )
            )
            excess = len(row["input_ids"]) - self.max_tokens
            if excess <= 0:
                self.truncations.add()
                return row
            room -= excess
        return None

    def _token_ends(self, text: str) -> list[int]:
        """Where in `text` each of its tokens ends."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [end for _, end in encoded["offset_mapping"]]


def shares(prompt: int, first: int, second: int, room: int) -> tuple[int, int, int]:
    """How many tokens of each text fit into `room`: the prompt gives way first, then the longer response.

    >>> shares(100, 10, 10, 60)
    (40, 10, 10)
    >>> shares(100, 100, 100, 60), shares(100, 100, 15, 60)
    ((15, 22, 22), (15, 30, 15))
    >>> shares(5, 100, 100, 60)
    (5, 27, 27)
    """
    kept = min(prompt, max(room, 0) // PROMPT_KEEPS)
    for_both = max(room, 0) - kept
    if first + second <= for_both:
        return min(prompt, room - first - second), first, second
    half = for_both // 2
    return kept, min(first, max(half, for_both - second)), min(second, max(half, for_both - first))


def _beginning(text: str, ends: Sequence[int], tokens: int) -> str:
    return text[: ends[tokens - 1]] if tokens < len(ends) else text


def _last(text: str, ends: Sequence[int], tokens: int) -> str:
    """The last `tokens` of `text`."""
    return text[ends[len(ends) - tokens - 1] :].lstrip() if tokens < len(ends) else text


def _make(config: OracleConfig, world: World | None) -> Oracle:
    return PairwiseOracle(config)


PAIRWISE = OracleKind(make=_make, check=check_target)
