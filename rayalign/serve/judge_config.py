"""Settings of the LLM judge: which endpoint is asked, what, how often, and for how much money."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rayalign.errors import ConfigError, did_you_mean
from rayalign.serve.judge_prompts import TEMPLATES, missing_places

LOCAL = "local"
"""What `base_url` says for a model in the oracle's own replicas."""
DIGITS_ALONE = {"structured_outputs": {"choice": ["0", "1"]}}
"""As `request`, how vLLM's server is told that the judge may say nothing else; a local model understands it, too."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A language model behind an OpenAI-compatible endpoint; its name there is `oracle.target`."""

    base_url: str = "https://api.openai.com/v1"
    """The endpoint, up to and without `/chat/completions`; or `local`: the model `oracle.target`, a Hugging Face id or
    directory, is loaded into each of the oracle's replicas (`oracle.gpus_per_replica`, `device`, `dtype`, ...)."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key, never the key itself; empty: the endpoint needs none, as
    with `local`."""
    template: str = "chat"
    """What is asked: `chat`, `summary`, or your own text with `{prompt}`, `{first}`, `{second}`, and perhaps `{answer}`
    where the rules for the answer go (without it your text has to give them) and `{reference}`, the data's response."""
    verdict: str = "logprobs"
    """`logprobs`: P(first wins) from the first token's log-probabilities of 0 and 1. `text`: A, B, C (a tie, one half)
    or X (an abstention) as the last line of what the judge writes."""
    order: str = "both"
    """`both`: each duel is asked twice, with the responses swapped, and the mean counts; `random`: asked once, in an
    order that the duel's id and `seed` decide."""
    seed: int = 0
    """Of the random orders and of what is asked again."""
    recheck: float = 0.0
    """Share of duels whose first question is asked once more, to measure self-agreement; the answer to it is paid and
    does not count. 0 asks none again."""
    temperature: float = 0.0
    """Of the judge's own sampling."""
    max_tokens: int = 0
    """Longest answer in tokens; 0: 1 for logprobs, 1,024 for text."""
    top_logprobs: int = 20
    """logprobs of an endpoint only: likeliest tokens that are looked at; an answer that is not among them has
    probability 0."""
    request: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, e.g. {"reasoning_effort": "low"}; null leaves out one that is sent otherwise."""
    concurrency: int = 16
    """Calls in flight at the same time, per replica."""
    calls_per_minute: float = 0.0
    """Calls begun per minute, per replica; 0 does not hold back."""
    timeout_s: float = 60.0
    """Longest silence of the endpoint within a call, in seconds; a whole call takes at most three times as long."""
    retries: int = 4
    """How often a question is asked again after a rate limit, a server error, a timeout or an unreadable verdict."""
    backoff_s: float = 0.5
    """Pause before the first repetition, in seconds; doubles with each. A longer Retry-After is respected."""
    longest_pause_s: float = 60.0
    """Longest pause, in seconds; an endpoint that asks for a longer one makes the verdict a failure."""
    price: float = 0.0
    """Of one call, in your currency, whether its verdict can be read or not; 0 is free."""
    max_spend: float = 0.0
    """The run stops before its calls cost more than this, in your currency; needs a price. Per run directory: another
    run has a cap of its own. 0: no cap."""

    def __post_init__(self) -> None:
        self._check_url()
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ConfigError(  # what stands there may be the key, so it is not repeated
                "oracle.judge.api_key_env must be the name of an environment variable, and what it is set to can't be "
                "one. If that was the key itself: export it in a variable, and name the variable here."
            )
        _one_of("verdict", self.verdict, ("logprobs", "text"))
        _one_of("order", self.order, ("both", "random"))
        if self.template not in TEMPLATES and (missing := missing_places(self.template)):
            raise ConfigError(
                f"oracle.judge.template={self.template[:60]!r} is neither {' nor '.join(TEMPLATES)}, nor a text of "
                f"yours: it lacks {', '.join(missing)}. {did_you_mean(self.template[:60], TEMPLATES)}"
            )
        if self.concurrency < 1:
            raise ConfigError(f"oracle.judge.concurrency={self.concurrency} must be at least 1.")
        if not 2 <= self.top_logprobs <= 20:
            raise ConfigError(f"oracle.judge.top_logprobs={self.top_logprobs} must be from 2 to 20.")
        if not 0 <= self.recheck <= 1:
            raise ConfigError(f"oracle.judge.recheck={self.recheck} is a share of the duels, from 0 to 1.")
        if not self.timeout_s > 0:
            raise ConfigError(f"oracle.judge.timeout_s={self.timeout_s} must be positive.")
        for name in (
            "temperature", "max_tokens", "calls_per_minute", "retries", "backoff_s", "longest_pause_s", "price",
            "max_spend", "seed",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"oracle.judge.{name}={getattr(self, name)} must be a number that is not negative.")
        if self.max_spend and not self.price:
            raise ConfigError(
                f"oracle.judge.max_spend={self.max_spend:g} can't be kept while oracle.judge.price=0; set the price of "
                "a call (an upper bound, if it depends on the length), or max_spend=0 for no cap."
            )
        if self.max_spend and self.max_spend < self.price:
            raise ConfigError(
                f"oracle.judge.max_spend={self.max_spend:g} does not pay a single call at oracle.judge.price="
                f"{self.price:g}; raise it, or set it to 0 for no cap."
            )

    @property
    def answer_tokens(self) -> int:
        """The longest answer that is asked for."""
        return self.max_tokens or (1 if self.verdict == "logprobs" else 1024)

    def _check_url(self) -> None:
        if self.base_url == LOCAL:
            if self.request not in ({}, DIGITS_ALONE):
                raise ConfigError(
                    "oracle.judge.request has further fields for an endpoint, and with oracle.judge.base_url=local "
                    f"there is none; all that it may be is {DIGITS_ALONE}. Leave it out."
                )
            return
        url = urlsplit(self.base_url)
        if "@" in url.netloc or url.query:  # may hold a secret, so it is not repeated
            raise ConfigError(
                "oracle.judge.base_url must not hold credentials or a query: it is written to the run directory. "
                "Export the key in an environment variable, and name that in oracle.judge.api_key_env."
            )
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(
                f"oracle.judge.base_url={self.base_url!r} must be like https://host/v1 or http://host:8000/v1, or "
                "`local` for a model in the oracle's own replicas."
            )


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"oracle.judge.{name}={value!r} is unknown. {did_you_mean(value, known)}")
