"""The language of TinyWorld: a maintenance report in, a list of things to see to out.

    prompt      Report: rusty hinge, wet rope, loose bolt, bent axle. Summary:
    response    hinge bolt

Everything is read from text alone, so that any text, typed by a person or sampled by a model, has a meaning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rayalign.errors import DataError

_ITEM_WORDS = (
    "anchor axle barrel basket bell bolt bottle brush bucket cable candle chain clock cord crane drill "
    "engine fan fence filter gate gear hammer handle hinge hose kettle ladder lamp lens lever lock "
    "mirror motor nozzle panel pipe piston pulley pump radio rope sensor shelf spring tank valve wheel"
)
ITEMS: tuple[str, ...] = tuple(_ITEM_WORDS.split())
"""What a report is about, and what a response may name."""
ATTRIBUTES: tuple[str, ...] = ("bent", "broken", "loose", "missing", "rusty", "wet")
"""What is the matter with an item; never worth a word in a response."""
FILLERS: tuple[str, ...] = ("please", "check", "the", "kindly", "note", "and", "also", "thanks")
"""Words of polite annotators; every one of them is stray."""

MIN_ITEMS, MAX_ITEMS = 4, 8
"""Items in a prompt, each at most once."""
MAX_WORDS = 14
"""A response of so many words did not stop: a policy that ends in time has used at least one of `MAX_WORDS`
tokens for end-of-sequence. So `rollout.max_tokens` of this many makes 'cut off' and 'too long' the same."""

ITEM_INDEX = {word: i for i, word in enumerate(ITEMS)}
ATTRIBUTE_INDEX = {word: i for i, word in enumerate(ATTRIBUTES)}
_WORD = re.compile(r"\w+|[^\w\s]")
_PROMPT = re.compile(r"Report: (.+)\. Summary:")

Listing = tuple[tuple[int, int], ...]
"""(item, attribute) indices in prompt order."""


def render_prompt(listing: Sequence[tuple[int, int]]) -> str:
    """The prompt's text.

    >>> render_prompt([(24, 4), (5, 2)])
    'Report: rusty hinge, loose bolt. Summary:'
    """
    return f"Report: {', '.join(f'{ATTRIBUTES[a]} {ITEMS[i]}' for i, a in listing)}. Summary:"


def parse_prompt(text: str) -> Listing:
    """The inverse of `render_prompt`. Raises `DataError` for a text that is no TinyWorld prompt.

    >>> parse_prompt("Report: rusty hinge, loose bolt. Summary:")
    ((24, 4), (5, 2))
    """
    match = _PROMPT.fullmatch(text.strip())
    try:
        pairs = [part.split() for part in match[1].split(", ")] if match else []
        listing = tuple((ITEM_INDEX[item], ATTRIBUTE_INDEX[attribute]) for attribute, item in pairs)
    except (KeyError, ValueError):
        listing = ()
    if not listing or len({item for item, _ in listing}) < len(listing):
        raise DataError(
            f"prompt.text={text!r} is not a TinyWorld prompt; the hidden reward reads "
            "'Report: <attribute> <item>, ... . Summary:' with known, distinct items. Take prompts from "
            "TinyWorld.prompt() or TinyWorld.heldout()."
        )
    return listing


def words(text: str) -> list[str]:
    """Words and punctuation marks of a response, in lower case. Any text has some; an empty one has none.

    >>> words("Hinge, bolt...")
    ['hinge', ',', 'bolt', '.', '.', '.']
    """
    return _WORD.findall(text.casefold())
