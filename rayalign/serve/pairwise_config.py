"""Settings of the pairwise reward model: what it is shown, and how its answer is read."""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.errors import ConfigError, did_you_mean

PLACES = ("{prompt}", "{first}", "{second}")
BREAK = "{sep}"
"""Where the first text of a pair ends and the second begins."""


@dataclass(frozen=True, kw_only=True)
class PairwiseConfig:
    """A classifier that reads a prompt and two responses together; it is `oracle.target`."""

    template: str = "{prompt}{sep}{first}{sep}{second}"
    """What the model reads; make it what the model was trained with. `{sep}` is its separator token; the first of them
    divides the text into the tokenizer's own kind of pair, and is written by the tokenizer."""
    order: str = "both"
    """`both`: the model reads each duel twice, with the responses swapped, and half the difference of the logits
    counts; `given`: once, as the duel has them."""
    first_label: int = 0
    """Of a model with two labels, the one that says that the first response is better."""

    def __post_init__(self) -> None:
        if missing := [place for place in PLACES if place not in self.template]:
            raise ConfigError(
                f"oracle.pairwise.template={self.template[:60]!r} lacks {', '.join(missing)}: the model would not see "
                "what it is to judge."
            )
        if self.order not in ("both", "given"):
            raise ConfigError(
                f"oracle.pairwise.order={self.order!r} is unknown. {did_you_mean(self.order, ('both', 'given'))}"
            )
        if self.first_label not in (0, 1):
            raise ConfigError(f"oracle.pairwise.first_label={self.first_label} must be 0 or 1.")
