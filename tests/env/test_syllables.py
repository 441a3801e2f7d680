import pytest

from rayalign.env.syllables import count, count_line, is_known, words

# Counted aloud by hand.
HAND_COUNTED = """
whisper 2 silent 2 moonlight 2 river 2 dancing 2 leaves 1 golden 2 autumn 2 breeze 1 gentle 2 petals 2 loved 1
washed 1 wanted 2 frozen 2 quiet 2 ocean 2 idea 3 area 3 beautiful 3 memories 3 mysterious 4 serenity 4
melancholy 4 butterfly 3 dragonfly 3 hummingbird 3 caterpillar 4 raindrops 2 snowflakes 2 fades 1 blooms 1
horses 2 branches 2 stretches 2 being 2 science 2 people 2 rhythm 2 prism 2 cried 1 hurried 2 naked 2 wicked 2
jumped 1 drifted 2 painted 2 shimmered 2 breathes 1 breathe 1 create 2 created 3 radio 3 piano 3 recipe 3
typewriter 3 lighthouse 2 grandmother 3 coyote 3 homework 2 sometimes 2 loneliness 3 lovely 2 through 1 queue 1
isn't 2 sun-kissed 2 silhouette 3 blossoms 2 nature's 2 earth's 1 ancient 2 imagination 5 society 4 poetry 3
""".split()


def test_words_counted_by_hand_have_the_dictionarys_counts():
    wrong = {
        word: count_line(word)
        for word, hand in zip(HAND_COUNTED[::2], HAND_COUNTED[1::2], strict=True)
        if not count_line(word)[0] <= int(hand) <= count_line(word)[1]
    }
    assert len(HAND_COUNTED) >= 2 * 60
    assert not wrong


@pytest.mark.parametrize(
    ("word", "interval"), [("fire", (1, 2)), ("hour", (1, 2)), ("every", (2, 3)), ("moon", (1, 1))]
)
def test_a_word_with_two_pronunciations_counts_as_an_interval(word, interval):
    assert count(word) == interval


def test_bashos_frog_pond_in_english_is_five_seven_five():
    lines = ["An old silent pond", "A frog jumps into the pond", "Splash! Silence again"]
    assert [count_line(line) for line in lines] == [(5, 5), (7, 7), (5, 5)]


def test_unknown_words_are_taken_apart_or_estimated_but_never_silent():
    assert is_known("dragonfly") and is_known("dragonfly's")
    assert count("dragonfly") == (3, 3)
    assert not is_known("zzyqqx")
    assert count("zzyqqx")[0] >= 1


def test_words_drop_accents_digits_and_other_scripts():
    assert words("Café №5: 月 -- L’été") == ["cafe", "no", "l'ete"]
    assert count_line("月 42 !?") == (0, 0)
