"""Settings of the endpoint that serves a policy."""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.errors import ConfigError
from rayalign.serve.http_guard import GuardConfig
from rayalign.serve.listening import check_address, check_limits, check_model_name

TOKEN_VARIABLE = "RAYALIGN_SERVE_TOKEN"
"""Environment variable of the token that callers need."""


@dataclass(frozen=True, kw_only=True)
class PolicyServerConfig:
    """Where the endpoint listens, whom it answers, and how much one request may ask for."""

    model: str = "policy"
    """Name that requests have to name."""
    host: str = "127.0.0.1"
    """Address it listens on. Any but a loopback address needs a token, and TLS in front of it."""
    port: int = 8000
    """TCP port it listens on."""
    token_digest: str = ""
    """SHA-256 of the token that callers send as `Authorization: Bearer`; empty: none, on a loopback address only."""
    best_of: int = 0
    """Samples among which the agent's own model picks each answer; 0 or 1 takes the sample as it comes."""
    num_replicas: int = 1
    """Replicas, each with an engine of its own."""
    max_choices: int = 16
    """Most answers to one prompt (`n`)."""
    max_prompts: int = 64
    """Most prompts in one request of the completions endpoint."""
    max_messages: int = 256
    """Most messages in one conversation."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request."""
    max_requests: int = 256
    """Requests per replica, running and waiting; more are told to come back (429)."""
    max_batch: int = 256
    """Most responses that a replica samples in one go."""
    request_timeout_s: float = 300.0
    """Longest that a request waits for its answer; after it the caller is told so (503)."""
    start_timeout_s: float = 600.0
    """Longest wait for the replicas to load the policy."""

    def __post_init__(self) -> None:
        counts = ("max_choices", "max_prompts", "max_messages", "max_body_bytes", "max_requests", "max_batch")
        seconds = ("request_timeout_s", "start_timeout_s")
        check_limits("serve ", self, counts=("num_replicas", *counts), seconds=seconds)
        if self.best_of < 0:
            raise ConfigError(f"serve best_of={self.best_of} must not be negative; 0 is off.")
        check_model_name("serve ", self.model)
        open_to_all = f"there is no token. Set {TOKEN_VARIABLE}, or name a --token-file"
        check_address("serve ", self, lacks="" if self.token_digest else open_to_all)

    @property
    def samples_per_choice(self) -> int:
        """Responses that are sampled for one answer."""
        return max(1, self.best_of)

    def guard(self) -> GuardConfig:
        """Who gets in."""
        return GuardConfig(
            token_digest=self.token_digest, max_body_bytes=self.max_body_bytes, max_requests=self.max_requests
        )
