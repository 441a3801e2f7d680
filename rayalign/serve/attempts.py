"""How often wrong tokens may be tried: a budget per address, which fills up again by itself."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from rayalign.serve.listening import is_loopback

BURST = 10
"""Wrong tokens that an address may show in a row."""
EVERY_S = 6.0
"""After so many seconds it may show one more."""
REMEMBERED = 10_000
"""Most addresses, and most right tokens, that are remembered; what was used longest ago is forgotten first."""


class Attempts:
    """Counts wrong tokens by address. While an address has to wait it is told nothing of any token that it shows.

    Except of a token that it showed rightly before: so neither a stranger behind the same proxy nor a neighbour with a
    wrong setting shuts out who is in. Tokens come as digests. For one event loop.
    """

    def __init__(
        self, burst: int = BURST, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.burst, self.every_s, self._clock = burst, every_s, clock
        self._even_at: OrderedDict[str, float] = OrderedDict()  # address -> when all its wrong tokens are forgiven
        self._right: OrderedDict[tuple[str, str], None] = OrderedDict()

    def wait_s(self, address: str, digest: str) -> int:
        """Whole seconds until `address` may show the token with this digest; 0: now."""
        if (address, digest) in self._right:
            return 0
        owed = self._even_at.get(address, 0.0) - self._clock()
        return max(0, math.ceil(owed - (self.burst - 1) * self.every_s))

    def wrong(self, address: str) -> None:
        """`address` showed a token that nobody has."""
        even_at = max(self._clock(), self._even_at.get(address, 0.0)) + self.every_s
        _remember(self._even_at, address, even_at)

    def right(self, address: str, digest: str) -> None:
        """`address` showed a token that somebody has."""
        _remember(self._right, (address, digest), None)


def _remember(known: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    known[key] = value
    known.move_to_end(key)
    while len(known) > REMEMBERED:
        known.popitem(last=False)


def address_of(scope: Mapping[str, Any]) -> str:
    """Who sent an ASGI request: the other end of the connection, or whom a proxy on this machine names.

    Only the last entry of X-Forwarded-For is read: the proxy wrote that one, and anybody may have written the others.
    """
    host = str((scope.get("client") or ("unknown",))[0])
    if not is_loopback(host):
        return host
    named = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"x-forwarded-for"]
    return (",".join(named).rpartition(",")[2].strip() or host)[:64]
