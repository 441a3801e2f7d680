"""Haiku: a world for real language models, whose hidden reward is a program.

A prompt asks for a haiku about one of 750 subjects. `score` says how good a response is, from what can be
counted alone; it does not know what is beautiful. Five terms, each in [0, 1], each with partial credit, so that
a model that has never met the form still makes pairs that differ:

    form       10/20   mean over the lines of exp(-|syllables - (5, 7, 5)| / 3); a line too few or too many counts 0
    lines       3/20   exp(-|number of lines - 3| / 2), blank lines not counted
    subject     3/20   share of the subject's words that occur, in any of their forms
    fresh       2/20   share of the content words that are not a repetition of an earlier one
    clean       2/20   share of the words that are plain English words of a poem: no chatter ("haiku", "syllables"),
                       labels, digits, markup or invented words

A response without a word scores 0. The best score is exactly 1 for every subject.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from rayalign.env.syllables import count_line, is_known, words
from rayalign.env.world import World
from rayalign.errors import ConfigError
from rayalign.types import Prompt

FORM = (5, 7, 5)
_INSTRUCTION = (
    "Write a haiku about {subject}. Use three lines of five, seven and five syllables, and write nothing else."
)
_PLAIN_MARKS = ".,;!?'\"‘’“”-–—…()&/"
_CHATTER = frozenset("haiku haikus syllable syllables assistant".split())
_FUNCTION_WORDS = frozenset(
    "a an the and or but nor so yet of in on at by to from for with without into onto over under through as if than "
    "that this these those it its it's i i'm me my mine we us our you your he him his she her they them their is are "
    "was were be been am do does did has have had not no there here who what where when why how all".split()
)
_IRREGULAR = {
    "goose": "geese",
    "mouse": "mice",
    "child": "children",
    "wolf": "wolves",
    "thief": "thieves",
    "knife": "knives",
    "leaf": "leaves",
    "fisherman": "fishermen",
    "snowman": "snowmen",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HaikuScore:
    """The terms of a score, each in [0, 1]; see the head of this file."""

    form: float
    lines: float
    subject: float
    fresh: float
    clean: float

    @property
    def total(self) -> float:
        """The reward, in [0, 1]. Whole weights over 20, so that five ones make exactly 1.

        >>> HaikuScore(form=1, lines=1, subject=1, fresh=1, clean=1).total
        1.0
        """
        return (10 * self.form + 3 * self.lines + 3 * self.subject + 2 * self.fresh + 2 * self.clean) / 20


def score(subject: str, response: str) -> HaikuScore:
    """Score any text as a haiku about `subject`."""
    lines = [line for line in response.split("\n") if line.strip()]
    spoken = words(response)
    if not spoken:
        return HaikuScore(form=0.0, lines=0.0, subject=0.0, fresh=0.0, clean=0.0)
    content = [word for word in spoken if word not in _FUNCTION_WORDS]
    asked = subject_words(subject)
    named = sum(not forms(word).isdisjoint(spoken) for word in asked)
    return HaikuScore(
        form=sum(_closeness(line, target) for line, target in zip(lines, FORM, strict=False))
        / max(len(FORM), len(lines)),
        lines=math.exp(-abs(len(lines) - len(FORM)) / 2),
        subject=named / len(asked),
        fresh=len(set(content)) / len(content) if content else 0.0,
        clean=_clean_share(response, frozenset(words(subject))),
    )


def _closeness(line: str, target: int) -> float:
    """`exp(-d / 3)`, where `d` is how far `target` lies outside the line's possible syllable counts; 0 if wordless."""
    low, high = count_line(line)
    return math.exp(-max(low - target, target - high, 0) / 3) if high else 0.0


def _clean_share(response: str, subject: frozenset[str]) -> float:
    """Share of the blank-separated tokens that hold nothing but known words and plain punctuation."""
    tokens = response.split()
    return sum(_is_clean(token, subject) for token in tokens) / len(tokens)


def _is_clean(token: str, subject: frozenset[str]) -> bool:
    if not all(character.isalpha() or character in _PLAIN_MARKS for character in token):
        return False
    found = words(token)
    if any(character.isalpha() for character in token) and not found:
        return False  # another script
    return all(word in subject or (word not in _CHATTER and is_known(word)) for word in found)


def subject_words(subject: str) -> list[str]:
    """The words of a subject that a haiku has to name; all of them if they are all small.

    >>> subject_words("the north wind"), subject_words("nothing")
    (['north', 'wind'], ['nothing'])
    """
    found = words(subject)
    return [word for word in found if word not in _FUNCTION_WORDS] or found


@cache
def forms(word: str) -> frozenset[str]:
    """`word` in singular, plural, possessive, and with -ed and -ing; letter rules, so non-words are among them.

    >>> sorted({"berry", "berries", "berry's"} & forms("berry")), "dancing" in forms("dance"), "boot" in forms("boots")
    (['berries', 'berry', "berry's"], True, True)
    """
    bases = {word, _IRREGULAR.get(word, word)} | {one for one, many in _IRREGULAR.items() if many == word}
    if word.endswith("ies"):
        bases.add(word[:-3] + "y")
    if word.endswith("es"):
        bases.add(word[:-2])
    if word.endswith("s"):
        bases.add(word[:-1])
    result = set(bases)
    for base in bases:
        short = base[:-1] if base.endswith(("e", "y")) else base
        doubled = base + base[-1]
        result |= {base + ending for ending in ("s", "es", "'s", "s'", "ed", "ing")}
        result |= {doubled + "ed", doubled + "ing", short + "ed", short + "ing"}
        if base.endswith("y"):
            result |= {short + "ies", short + "ied"}
    return frozenset(result)


@cache
def subjects() -> tuple[str, ...]:
    """All subjects, in the order of the data file."""
    text = resources.files("rayalign.env").joinpath("data/haiku_subjects.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


class Haiku(World):
    """Haiku about everyday subjects, scored by a program; see the head of this file for the reward.

    `seed` splits the subjects into training and held-out ones and orders the training prompts; the reward is
    the same for every seed.
    """

    id = "rayalign/Haiku-v0"

    def __init__(self, seed: int = 0, num_heldout: int = 150) -> None:
        everything = list(subjects())
        if not 1 <= num_heldout < len(everything):
            raise ConfigError(
                f"env.num_heldout={num_heldout} must be from 1 to {len(everything) - 1}: "
                f"there are {len(everything)} subjects, and training needs at least one."
            )
        self.seed = seed
        random.Random(f"haiku split {seed}").shuffle(everything)
        self._heldout, self._training = everything[:num_heldout], everything[num_heldout:]

    def prompt(self, index: int) -> Prompt:
        """Training prompt `index`: every subject once, then every subject once more in another order, without end."""
        epoch, position = divmod(index, len(self._training))
        return self._make(self._order(epoch)[position])

    def heldout(self, n: int) -> Sequence[Prompt]:
        """The first `n` held-out subjects."""
        return [self._make(subject) for subject in self._heldout[:n]]

    def check_prompts(self) -> Sequence[Prompt]:
        """All prompts of the world, training and held out."""
        return [self._make(subject) for subject in (*self._training, *self._heldout)]

    @property
    def has_truth(self) -> bool:
        """Always: the reward is a program."""
        return True

    def reward(self, prompt: Prompt, response: str) -> float:
        """`score(...).total`, in [0, 1]."""
        return score(prompt.meta["subject"], response).total

    def best_reward(self, prompt: Prompt) -> float:
        """1: every term can be had in full, for every subject."""
        return 1.0

    @property
    def reward_scale(self) -> float:
        """Bradley-Terry strength; see `docs/haiku.md` for how informative it makes a label."""
        return 10.0

    def default_policy(self) -> str | None:
        """SmolLM2-135M-Instruct, by its hub id; `rayalign.models.resolve_policy` finds it without a hub too."""
        return "HuggingFaceTB/SmolLM2-135M-Instruct"

    def defaults(self) -> Mapping[str, Any]:
        """Settings for a small chat model on two CPU cores."""
        return {
            "loop.batch_size": 16,
            "rollout.max_tokens": 40,
            "rollout.temperature": 0.7,
            "rollout.max_prompt_tokens": 128,
            "rollout.dtype": "bfloat16",
            "learner.dtype": "bfloat16",
            "learner.learning_rate": 3e-5,
            "learner.schedule": "constant",
            "agent.beta": 0.1,
            "evaluation.num_prompts": 150,
            "evaluation.every": 64,
        }

    def _order(self, epoch: int) -> list[str]:
        order = list(self._training)
        random.Random(f"haiku order {self.seed} {epoch}").shuffle(order)
        return order

    def _make(self, subject: str) -> Prompt:
        text = _INSTRUCTION.format(subject=subject)
        return Prompt(
            id="haiku-" + subject.replace(" ", "-"),
            text=text,
            token_ids=(),
            meta={"messages": [{"role": "user", "content": text}], "subject": subject},
        )
