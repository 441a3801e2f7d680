"""Settings of an oracle that asks a service over HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rayalign.errors import ConfigError

TOKEN_VARIABLE = "RAYALIGN_ORACLE_TOKEN"
"""Environment variable of the token that callers show and the service asks for."""


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """How a service that is an oracle is asked; its address is `oracle.target`. Only for `oracle.kind=http`."""

    token_env: str = TOKEN_VARIABLE
    """Name of the environment variable that holds the token, never the token itself; it is read where the oracle runs.
    Not set: none is shown."""
    token_file: str = ""
    """File that holds the token, in the place of the variable, where the oracle runs."""
    caller: str = ""
    """Who asks: duels of different callers are never taken for one another, whatever their ids. Empty: the run itself,
    by a name that is kept beside its answers, or in a bucket made of its place there."""
    timeout_s: float = 120.0
    """Longest silence of the service within a request, in seconds; a whole request takes at most three times as
    long."""
    patience_s: float = 300.0
    """How long a service that brings no answer is asked again, in seconds; 0 asks once. What it answers meanwhile is
    kept there."""

    def __post_init__(self) -> None:
        if self.token_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.token_env):
            raise ConfigError(  # what stands there may be the token, so it is not repeated
                "oracle.http.token_env must be the name of an environment variable, and what it is set to can't be "
                "one. If that was the token itself: export it in a variable, and name the variable here."
            )
        if len(self.caller) > 100:
            raise ConfigError(f"oracle.http.caller={self.caller[:20]!r}... has more than 100 characters.")
        if not self.timeout_s > 0:
            raise ConfigError(f"oracle.http.timeout_s={self.timeout_s} must be positive.")
        if not self.patience_s >= 0:
            raise ConfigError(f"oracle.http.patience_s={self.patience_s} must not be negative; 0 asks once.")
