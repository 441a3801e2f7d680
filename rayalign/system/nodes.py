"""Which nodes of a cluster a role may run on: Ray's label selectors, read here so that mistakes are told early.

nodes started with `ray start --labels role=rollout`   {"role": "rollout"}
either of two kinds                                    {"role": "in(rollout,spare)"}
any node but those (ray.io/... are Ray's own labels)   {"ray.io/market-type": "!spot"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rayalign.errors import ConfigError

_WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:[a-zA-Z0-9.-]{{1,253}}/)?{_WORD}")
_CONDITION = re.compile(rf"(!?)(?:({_WORD})|in\(({_WORD}(?:,{_WORD})*)\))")


def check_selector(setting: str, selector: Mapping[str, str]) -> None:
    """Raise `ConfigError` that names `setting` where Ray would not understand `selector`."""
    for key, condition in selector.items():
        if not _KEY.fullmatch(key) or not _CONDITION.fullmatch(condition):
            raise ConfigError(
                f"{setting}={{{key!r}: {condition!r}}} is no label of nodes: write a name and what it must be, "
                "'value', '!value', 'in(value,value)' or '!in(value,value)', without blanks."
            )


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with `labels` may be used.

    >>> matches({"role": "in(a,b)", "zone": "!x"}, {"role": "b"})
    True
    """
    for key, condition in selector.items():
        found = _CONDITION.fullmatch(condition)
        assert found is not None, f"{condition!r} was not checked"
        unwanted, value, values = found.groups()
        wanted = [value] if value else values.split(",")
        if (labels.get(key) in wanted) == bool(unwanted):
            return False
    return True
