"""What the settings of everything that listens have in common, and how mistakes in them are told."""

from __future__ import annotations

import ipaddress
from typing import Any

from rayalign.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`; a name other than `localhost` is not trusted.

    >>> [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(section: str, config: Any, lacks: str = "") -> None:
    """Refuse a port that is none, and a host that others can reach where nobody has to show a token.

    Args:
        section: what stands before the names of settings: `oracle.users.`.
        config: has `host` and `port`.
        lacks: why nobody has to show a token, and what to do about it, as sentences; empty: everybody has to.
    """
    if not 0 < config.port < 2**16:
        raise ConfigError(f"{section}port={config.port} must be in 1..65535.")
    if lacks and not is_loopback(config.host):
        raise ConfigError(
            f"{section}host={config.host!r} can be reached from other machines, and {lacks}, or listen on 127.0.0.1."
        )


def check_limits(section: str, config: Any, *, counts: tuple[str, ...] = (), seconds: tuple[str, ...] = ()) -> None:
    """Refuse `counts` below 1 and `seconds` that are not positive."""
    for name in counts:
        if getattr(config, name) < 1:
            raise ConfigError(f"{section}{name}={getattr(config, name)} must be at least 1.")
    for name in seconds:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{section}{name}={getattr(config, name)} must be positive.")


def check_model_name(section: str, model: str) -> None:
    """Refuse what no request could name."""
    if not model or len(model) > 256:
        raise ConfigError(f"{section}model={model!r} must be a name of 1 to 256 characters.")
