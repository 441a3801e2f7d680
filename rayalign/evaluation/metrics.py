"""What is measured of held-out answers beside their win rate; `evaluation.metrics` names them. No labels are bought.

    null_rate    how often the policy answers with nothing, and whether it should have (AE-Borda: Mehta et al. 2023)

To add one, write its function and its line in `METRICS`, or name yours by import path (`package.module:NAME`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayalign.errors import ConfigError, did_you_mean
from rayalign.types import Candidate, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A held-out prompt and what the policy said."""

    prompt: Prompt
    answer: Candidate
    """At `evaluation.temperature`; it may be empty."""
    spoken: Candidate
    """The answer, or, where that is empty and the metric asks for it, what the policy says when it has to say
    something: the first token is not end-of-sequence."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A function from all answers to numbers by name; NaN where there is nothing to average."""

    measure: Callable[[Sequence[Answered]], Mapping[str, float]]
    spoken: bool = False
    """Whether it reads `Answered.spoken`; then empty answers are generated once more."""


def is_null(answer: Candidate) -> bool:
    """Whether an answer says nothing: an abstention."""
    return not answer.text.strip()


def null_rates(answers: Sequence[Answered]) -> dict[str, float]:
    """Shares of prompts that the policy does not answer (Mehta et al. 2023, section 6.2 and figure 6).

    null_rate            of all prompts
    null_rate_if_wrong   of those whose spoken answer is wrong: abstaining was right, higher is better
    null_rate_if_right   of those whose spoken answer is right: abstaining was a mistake, lower is better
    right                share of prompts whose spoken answer is right

    Right is `says` here, a comparison with `Prompt.reference`; the paper asks GPT-3.5 instead. Without references only
    `null_rate` is known.
    """
    null = np.array([is_null(answered.answer) for answered in answers], dtype=float)
    rates = {"null_rate": _mean(null)}
    if not answers or any(answered.prompt.reference is None for answered in answers):
        return rates
    right = np.array([says(a.spoken.text, a.prompt.reference or "") for a in answers], dtype=bool)
    return rates | {
        "null_rate_if_wrong": _mean(null[~right]),
        "null_rate_if_right": _mean(null[right]),
        "right": _mean(right.astype(float)),
    }


def says(answer: str, reference: str) -> bool:
    """Whether the words of `reference` stand in `answer`, one after the other, articles and marks aside.

    >>> says("What is the Taj Mahal?", "Taj Mahal"), says("Copernic", "Copernicus"), says("", "Copernicus")
    (True, False, False)
    """
    wanted, said = _words(reference), _words(answer)
    return bool(wanted) and any(said[i : i + len(wanted)] == wanted for i in range(len(said) - len(wanted) + 1))


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


METRICS: dict[str, Metric] = {"null_rate": Metric(measure=null_rates, spoken=True)}
"""Name -> metric."""


def find_metric(name: str) -> Metric:
    """The metric of a registered name or of an import path. `ConfigError` if there is none."""
    if name in METRICS:
        return METRICS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"evaluation.metrics: {name!r} is unknown. {did_you_mean(name, METRICS)}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"evaluation.metrics: {name!r} can't be imported: {error}.") from error
    if not isinstance(found, Metric):
        raise ConfigError(
            f"evaluation.metrics: {name!r} is a {type(found).__name__}, not a rayalign.evaluation.metrics.Metric."
        )
    return found
