"""Settings of an oracle that other programs ask over HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.serve.http.config import TOKEN_VARIABLE
from rayalign.serve.http_guard import GuardConfig
from rayalign.serve.kinds import Address
from rayalign.serve.listening import check_address, check_limits


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Where an oracle listens for other programs, whom it answers, and how much at once."""

    host: str = "127.0.0.1"
    """Address it listens on. Any but a loopback address needs a token, and TLS in front of it."""
    port: int = 8710
    """TCP port it listens on."""
    token_digest: str = ""
    """SHA-256 of the token that callers send as `Authorization: Bearer`; empty: none, on a loopback address only."""
    max_duels: int = 1_000
    """Most duels in a request."""
    max_characters: int = 100_000
    """Longest prompt, turn of a conversation, response or other text."""
    max_body_bytes: int = 8 << 20
    """Longest body of a request."""
    max_requests: int = 128
    """Requests that a replica works on at the same time; more are told to come again (429)."""

    def __post_init__(self) -> None:
        check_limits("service.", self, counts=("max_duels", "max_characters", "max_body_bytes", "max_requests"))
        open_to_all = f"there is no token. Set {TOKEN_VARIABLE}, or name a --token-file"
        check_address("service.", self, lacks="" if self.token_digest else open_to_all)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address(self.host, self.port, "service")

    def guard(self) -> GuardConfig:
        """Who gets in. The schema tells what every caller knows, the limits, so it is open."""
        return GuardConfig(
            token_digest=self.token_digest,
            max_body_bytes=self.max_body_bytes,
            max_requests=self.max_requests,
            body_type="application/json",
            open_paths=("/health", "/openapi.json"),
        )
