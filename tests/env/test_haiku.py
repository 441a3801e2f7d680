import itertools
import math
import pickle

import pytest

from rayalign.env.haiku import Haiku, forms, score, subject_words, subjects
from rayalign.env.syllables import count, count_line, is_known, words
from rayalign.errors import ConfigError

POND = "An old silent pond\nA frog jumps into the pond\nSplash! Silence again"


def near(a, b):
    return a == pytest.approx(b, abs=1e-12)


def test_a_perfect_haiku_scores_one():
    assert (
        score("rain", "Rain falls on the roof\nCold fingers tap all night long\nSoft gray morning sighs").total == 1.0
    )


def test_the_frog_pond_loses_only_its_second_pond():
    # Content words: old silent pond, frog jumps pond, splash silence again: one of nine repeats.
    found = score("an old frog", POND)
    assert (found.form, found.lines, found.subject, found.clean) == (1, 1, 1, 1)
    assert near(found.fresh, 8 / 9)
    assert near(found.total, 1 - 0.1 / 9)


def test_each_syllable_too_many_costs_a_factor_on_its_line():
    # 6 instead of 5 in the first line, 9 instead of 7 in the second, the third missing.
    found = score("rain", "Rain falls upon the roof\nAnd all night the cold wind sings and sighs")
    assert near(found.form, (math.exp(-1 / 3) + math.exp(-2 / 3)) / 3)
    assert near(found.lines, math.exp(-1 / 2))


def test_a_fourth_line_dilutes_the_form():
    perfect = "Rain falls on the roof\nCold fingers tap all night long\nSoft gray morning sighs"
    found = score("rain", perfect + "\n\nThe end")
    assert near(found.form, 3 / 4)
    assert near(found.lines, math.exp(-1 / 2))


def test_blank_lines_and_outer_space_do_not_count():
    spaced = "\n\nRain falls on the roof\n\nCold fingers tap all night long  \n   \nSoft gray morning sighs\n"
    assert score("rain", spaced).total == 1.0


def test_the_subject_counts_by_its_content_words_in_any_form():
    assert score("the winter moon", "moons").subject == 0.5
    assert score("the winter moon", "Winter's first moons").subject == 1
    assert score("a wolf", "wolves").subject == 1
    assert score("a wolf", "a wolfhound").subject == 0
    assert score("swimming", "swim").subject == 0
    assert score("a dance", "dancing").subject == 1
    assert score("strawberries", "one strawberry").subject == 1
    assert score("nothing", "nothing").subject == 1


def test_repeating_a_word_is_worse_each_time_and_function_words_are_free():
    assert near(score("rain", "rain rain rain rain").fresh, 1 / 4)
    assert near(score("rain", "rain and the rain and the").fresh, 1 / 2)
    assert score("rain", "rain and wind and hail").fresh == 1
    assert score("rain", "the and of").fresh == 0


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("rain falls", 1),
        ("“Rain” falls — softly…", 1),
        ("haiku rain", 1 / 2),
        ("Haiku: rain 5 falls", 2 / 4),
        ("**rain** falls", 1 / 2),
        ("rain zzyqqx", 1 / 2),
        ("rain 雨", 1 / 2),
        ("rain 🌧", 1 / 2),
    ],
)
def test_chatter_markup_digits_and_inventions_are_unclean(text, clean):
    assert near(score("rain", text).clean, clean)


@pytest.mark.parametrize("text", ["", " \n\n", "5-7-5", "雨 雨 雨", "\x00\ud800", "!" * 5000, "\n" * 5000])
def test_a_text_without_a_word_scores_zero(text):
    assert score("rain", text).total == 0


def test_any_text_has_a_score_between_zero_and_one():
    texts = ["a" * 10_000, "rain\n" * 3000, "'" * 9 + "rain'", "ı̇ ﬁre ß Ⅷ", "rain\r\nrain\r\nrain", "\u2028rain\u2028"]
    assert all(0 <= score("rain", text).total <= 1 for text in texts)


FILLERS = [
    "green",
    "light",
    "falls",
    "stone",
    "sings",
    "cold",
    "wind",
    "wakes",
    "dry",
    "grass",
    "blue",
    "smoke",
    "climbs",
    "far",
]


def perfect_haiku(subject):
    """A haiku of full score by construction: the subject's words in the line of seven, then one-syllable fillers."""
    rest = iter([w for w in FILLERS if w not in words(subject)])
    low, high = count_line(subject)
    assert high <= 7
    middle = [*subject.split(), *itertools.islice(rest, 7 - low)]
    lines = [["the", *itertools.islice(rest, 2), "in", next(rest)], middle, ["on", "a", *itertools.islice(rest, 3)]]
    return "\n".join(" ".join(line) for line in lines)


def test_every_subject_has_a_haiku_of_the_best_reward():
    assert all(count(word) == (1, 1) for word in FILLERS)
    world = Haiku()
    short = [p.meta["subject"] for p in world.check_prompts() if world.reward(p, perfect_haiku(p.meta["subject"])) != 1]
    assert not short
    assert {world.best_reward(p) for p in world.check_prompts()} == {1.0}


def test_subjects_are_many_distinct_and_known_to_the_dictionary():
    assert len(subjects()) >= 600
    assert len(set(subjects())) == len(subjects())
    assert all(is_known(word) for subject in subjects() for word in words(subject))
    assert all(subject_words(subject) and forms(subject_words(subject)[0]) for subject in subjects())


def test_held_out_subjects_are_never_trained_on_and_every_subject_comes_once_per_round():
    world = Haiku(seed=3)
    n = len(subjects()) - 150
    first, second = ([world.prompt(i).id for i in range(start, start + n)] for start in (0, n))
    assert len(set(first)) == n and set(first) == set(second) and first != second
    heldout = {p.id for p in world.heldout(10_000)}
    assert len(heldout) == 150 and not heldout & set(first)


def test_the_seed_decides_the_split_and_the_order_and_nothing_else():
    world, again, other = Haiku(seed=1), pickle.loads(pickle.dumps(Haiku(seed=1))), Haiku(seed=2)
    assert [world.prompt(i) for i in (0, 700)] == [again.prompt(i) for i in (0, 700)]
    assert [p.id for p in world.heldout(5)] != [p.id for p in other.heldout(5)]
    prompt = world.prompt(0)
    assert world.reward(prompt, POND) == other.reward(prompt, POND)


def test_a_prompt_is_a_chat_message_that_names_its_subject():
    prompt = Haiku().prompt(0)
    assert prompt.meta["messages"] == [{"role": "user", "content": prompt.text}]
    assert prompt.meta["subject"] in prompt.text


def test_a_split_without_training_subjects_is_refused():
    with pytest.raises(ConfigError, match=r"env\.num_heldout=750 must be from 1 to 749"):
        Haiku(num_heldout=750)
