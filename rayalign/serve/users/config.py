"""Settings of the endpoint that users of a run's policy talk to."""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.serve.listening import check_address, check_limits, check_model_name


@dataclass(frozen=True, kw_only=True)
class UsersConfig:
    """Where users chat with the policy, who they are, and how long they may choose. Only for `oracle.kind=users`."""

    model: str = "policy"
    """Name that requests have to name."""
    host: str = "127.0.0.1"
    """Address the endpoint listens on. Any but a loopback address needs tokens_file, and TLS in front of it."""
    port: int = 8701
    """TCP port the endpoint listens on."""
    tokens_file: str = ""
    """A line `name token` per user, `#` begins a comment; a comparison belongs to who got it. Empty: nobody needs a
    token; on a loopback host only."""
    choose_within_s: float = 900.0
    """Seconds that a user has to choose between two answers; after them the comparison is void, and costs nothing."""
    answer_within_s: float = 120.0
    """Longest that a request waits for its answer, a restart of the collector included; then it is told so (503)."""
    max_batch: int = 64
    """Most questions that are answered together."""
    max_choices: int = 16
    """Most answers to one question that asks for several (`n`)."""
    max_messages: int = 256
    """Most messages in one conversation."""
    max_body_bytes: int = 1 << 20
    """Longest body of a request."""
    max_requests: int = 256
    """Requests that are worked on at the same time; more are told to come back (429)."""

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_choices", "max_messages", "max_body_bytes", "max_requests")
        check_limits("oracle.users.", self, counts=counts, seconds=("choose_within_s", "answer_within_s"))
        check_model_name("oracle.users.", self.model)
        unnamed = "oracle.users.tokens_file is not set. Name a file with a token per user"
        check_address("oracle.users.", self, lacks="" if self.tokens_file else unnamed)
