"""Scores by content: what is scored, by whom, and what a file that can't be used costs."""

import logging
import math

import pytest

from rayalign.serve import score_cache
from rayalign.serve.score_cache import NAME, ScoreCache, content_key


class Scorer:
    """Scores a number by its square root, and notes what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, items):
        self.asked += items
        return [None if item < 0 else math.sqrt(item) for item in items]


def ask(cache, scorer, *numbers):
    items = {content_key(number): number for number in numbers}
    found = cache.through(items, scorer)
    return [found[content_key(number)] for number in numbers]


@pytest.fixture
def scorer():
    return Scorer()


def test_replicas_that_share_a_folder_score_nothing_twice_and_neither_do_those_that_come_later(tmp_path, scorer):
    one, other = ScoreCache(100), ScoreCache(100)
    for cache in (one, other):
        cache.keep_in(tmp_path, "model")
    assert ask(one, scorer, 2.0, 3.0) == [math.sqrt(2), math.sqrt(3)]
    assert ask(other, scorer, 3.0, 5.0) == [math.sqrt(3), math.sqrt(5)]
    assert scorer.asked == [2.0, 3.0, 5.0]
    later = ScoreCache(1)
    later.keep_in(tmp_path, "model")
    assert ask(later, scorer, 5.0, 3.0, 2.0) == [math.sqrt(n) for n in (5, 3, 2)], "to the last bit"
    assert len(scorer.asked) == 3


def test_another_model_or_way_of_reading_knows_nothing_of_it(tmp_path, scorer):
    for owner in ("model", "model, cut at 8"):
        cache = ScoreCache(100)
        cache.keep_in(tmp_path, owner)
        ask(cache, scorer, 4.0)
    assert scorer.asked == [4.0, 4.0]


def test_what_has_no_score_is_not_remembered_and_a_size_of_0_remembers_nothing(tmp_path, scorer):
    cache = ScoreCache(100)
    cache.keep_in(tmp_path, "model")
    assert ask(cache, scorer, -1.0) == ask(cache, scorer, -1.0) == [None]
    assert scorer.asked == [-1.0, -1.0]
    nothing = ScoreCache(0)
    nothing.keep_in(tmp_path / "no", "model")
    assert ask(nothing, scorer, 1.0) == ask(nothing, scorer, 1.0) == [1.0] and scorer.asked[2:] == [1.0, 1.0]


def test_more_keys_than_one_statement_takes(tmp_path, scorer, monkeypatch):
    monkeypatch.setattr(score_cache, "AT_ONCE", 3)
    numbers = [float(n) for n in range(10)]
    for _ in range(2):
        cache = ScoreCache(100)
        cache.keep_in(tmp_path, "model")
        assert ask(cache, scorer, *numbers) == [math.sqrt(n) for n in numbers]
    assert scorer.asked == numbers


@pytest.mark.parametrize("broken", ["a file", "no folder"])
def test_a_file_that_can_not_be_used_is_told_and_costs_no_answer(tmp_path, scorer, caplog, broken):
    if broken == "a file":
        (tmp_path / NAME).write_bytes(b"not a database, but long enough to look like one" * 100)
    cache = ScoreCache(100)
    with caplog.at_level(logging.WARNING):
        cache.keep_in(tmp_path if broken == "a file" else tmp_path / "none", "model")
        assert ask(cache, scorer, 4.0) == ask(cache, scorer, 4.0) == [2.0]
    assert scorer.asked == [4.0] and "in memory alone" in caplog.text
