"""Who may label or ask: a secret token per person. No token is ever part of a message, a log or a `repr`."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from rayalign.errors import ConfigError
from rayalign.serve.http_guard import digest

SHORTEST = 16
"""Characters; `python -c "import secrets; print(secrets.token_urlsafe())"` makes 43."""
LONGEST = 256


class Tokens:
    """People and their tokens. Raises `ConfigError` that names whose token is too short, long or not alone.

    `setting` names the file that they come from, and `person` what they are, for messages.
    """

    def __init__(
        self, by_name: Mapping[str, str], *, setting: str = "oracle.human.tokens_file", person: str = "annotator"
    ) -> None:
        if not by_name:
            raise ConfigError(f"there are no {person}s: {setting} has no `name token` line.")
        for name, token in by_name.items():
            if not re.fullmatch(r"[\w.@-]{1,64}", name):
                raise ConfigError(f"{person} {name!r}: a name has 1 to 64 letters, digits and . _ - @ in it.")
            if not SHORTEST <= len(token) <= LONGEST:
                raise ConfigError(f"the token of {person} {name!r} must have {SHORTEST} to {LONGEST} characters.")
        if len(set(by_name.values())) < len(by_name):
            raise ConfigError(f"two {person}s have the same token, so that nobody could tell who answers.")
        self._by_name = dict(by_name)

    @property
    def names(self) -> list[str]:
        """The annotators."""
        return list(self._by_name)

    @classmethod
    def read(cls, path: str | Path, *, setting: str = "oracle.human.tokens_file", person: str = "annotator") -> Tokens:
        """From a file with a line `name token` per person."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{setting}={str(path)!r} can't be read: {type(error).__name__}.") from error
        by_name: dict[str, str] = {}
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            where = f"{setting}={str(path)!r}, line {number}"
            if len(words) != 2 or words[0] in by_name:
                raise ConfigError(f"{where}: expected `name token`, each name once.")
            if not words[1].isascii():  # headers carry nothing else faithfully, so nobody could show it
                raise ConfigError(f"{where}: the token of {person} {words[0]!r} must be ASCII characters alone.")
            by_name[words[0]] = words[1]
        return cls(by_name, setting=setting, person=person)

    @classmethod
    def read_or_make(cls, path: Path) -> Tokens:
        """From a file that only its owner can read, made with one annotator and a random token if it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls.read(path)
        with os.fdopen(file, "w") as text:
            text.write(f"annotator {secrets.token_urlsafe(24)}\n")
        return cls.read(path)

    def digests(self) -> tuple[tuple[str, str], ...]:
        """Each name with the digest of its token (`http_guard.digest`)."""
        return tuple((name, digest(token)) for name, token in self._by_name.items())

    def owner(self, token: str) -> str | None:
        """Whose token it is."""
        return self._find(token, self._by_name)

    def session(self, name: str) -> str:
        """What the cookie of `name` holds: derived from the token, so that it outlives restarts and ends with it."""
        return hmac.digest(self._by_name[name].encode(), b"rayalign labelling session", "sha256").hex()

    def owner_of_session(self, session: str) -> str | None:
        """Whose cookie it is."""
        return self._find(session, {name: self.session(name) for name in self._by_name})

    @staticmethod
    def _find(given: str, known: Mapping[str, str]) -> str | None:
        """Every secret is compared, all of it, whatever the outcome: the time taken says nothing about them."""
        found = None
        hashed = hashlib.sha256(given.encode("utf-8", "replace")).digest()
        for name, secret in known.items():
            if hmac.compare_digest(hashed, hashlib.sha256(secret.encode()).digest()):
                found = name
        return found
