"""The book: what was shown and chosen is on disk first, counted once, and found again."""

import shutil
import threading

import pytest

from rayalign.errors import LedgerError
from rayalign.serve.users.book import Book, Shown, Told, is_swapped
from rayalign.types import Candidate, Duel, Prompt


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_book(tmp_path, clock):
    """`open_book()`: the book of this test, opened again after it was closed."""
    opened = []

    def make(path=tmp_path / "book.arrow"):
        for book in opened:
            book.close()
        opened.append(Book(path, choose_within_s=60, clock=clock))
        return opened[-1]

    yield make
    opened[-1].close()


def duel(name):
    first, second = (
        Candidate(text=text, token_ids=(1, n), logprobs=(-0.1 * n, -1 / 3), policy_version=n, finished=n == 2)
        for n, text in ((1, f"{name} one"), (2, f"{name} two"))
    )
    prompt = Prompt(id=f"p-{name}", text=f"about {name}", token_ids=(7, 8), meta={"messages": [{"role": "user"}]})
    return Duel(id=name, batch=3, prompt=prompt, first=first, second=second, meta={"value": 0.5})


def offer(book, *names, owner=""):
    book.show([Shown(regret=None, duel=duel(name), owner=owner) for name in names])


def as_shown(name, own):
    """What the user has to say to mean the duel's own `first` or `second`."""
    return {"first": "second", "second": "first"}[own] if is_swapped(name) else own


def test_a_chosen_comparison_is_the_duel_that_was_offered_and_keeps_the_order_of_the_choices(open_book):
    book = open_book()
    offer(book, "a", "b", "c")
    assert book.chosen(10, batch=5) == [] and not book.wait_for(1, 0.0)
    assert book.choose("c", as_shown("c", "first")) is Told.RECORDED
    assert book.choose("a", as_shown("a", "second")) is Told.RECORDED
    found = book.chosen(10, batch=5)
    assert [d.id for d in found] == ["c", "a"] and {d.batch for d in found} == {5}
    for one in found:
        made = duel(one.id)
        assert (one.prompt, one.first, one.second, one.meta) == (made.prompt, made.first, made.second, made.meta)
    assert book.choices(["a", "b", "c", "d"]) == ["second", None, "first", None]
    assert book.chosen(1, batch=5) == found[:1]
    book.committed(["c"])
    assert [d.id for d in book.chosen(10, batch=6)] == ["a"]


def test_which_answer_is_shown_first_is_a_coin_that_the_id_decides():
    heads = sum(is_swapped(f"duel-{i}") for i in range(400))
    assert 150 < heads < 250


def test_the_same_choice_again_is_one_choice_and_another_one_is_refused(open_book):
    book = open_book()
    offer(book, "a")
    for again in (book, open_book):
        book = again if again is book else open_book()
        assert book.choose("a", "first") is Told.RECORDED
        assert book.choose("a", "second") is Told.DIFFERENT
        assert book.choose("a", "skip") is Told.DIFFERENT
        assert book.numbers()["chosen"] == 1


def test_a_comparison_belongs_to_who_got_it(open_book):
    book = open_book()
    offer(book, "a", owner="ann")
    assert book.choose("a", "first", "bob") is book.choose("a", "first") is Told.UNKNOWN
    assert book.choose("nothing", "first", "ann") is Told.UNKNOWN
    assert book.choose("a", "tie", "ann") is Told.RECORDED
    assert book.choose("a", "tie", "bob") is Told.UNKNOWN


def test_who_is_too_late_is_told_so_and_who_was_in_time_may_repeat_it(open_book, clock):
    book = open_book()
    offer(book, "a", "b")
    clock.now += 59
    offer(book, "c")
    assert book.num_open == 3 and book.choose("a", "tie") is Told.RECORDED
    clock.now += 2
    assert book.num_open == 1 and book.choose("b", "tie") is Told.EXPIRED
    assert book.choose("a", "tie") is Told.RECORDED
    again = open_book()
    assert again.choose("b", "tie") is Told.EXPIRED and again.num_open == 1
    assert again.numbers() == {
        "questions": 3,
        "offered": 3,
        "chosen": 1,
        "skipped": 0,
        "expired": 1,
        "open": 1,
        "preferred_share": 0.0,
    }


def test_a_skip_ends_a_comparison_and_is_no_duel(open_book):
    book = open_book()
    offer(book, "a")
    assert book.choose("a", "skip") is Told.RECORDED
    assert (book.num_open, book.num_chosen, book.numbers()["skipped"]) == (0, 0, 1)


def test_regret_adds_up_over_all_questions_whose_truth_is_known_and_survives(open_book):
    book = open_book()
    book.show([Shown(regret=0.5), Shown(regret=None), Shown(regret=1.25, duel=duel("a"))])
    book.show([Shown(regret=0.0, duel=duel("s"), label=1.0)])
    for found in (book, open_book()):
        numbers = found.numbers()
        assert (numbers["cumulative_regret"], numbers["known"], numbers["questions"]) == (1.75, 3, 4)


def test_a_pair_that_the_agent_labelled_is_kept_and_nobody_can_choose_it(open_book):
    book = open_book()
    book.show([Shown(regret=None, duel=duel("s"), label=0.0)])
    assert book.choose("s", "first") is Told.UNKNOWN and book.num_open == 0
    book = open_book()
    (kept,) = book.synthetic(10, batch=2)
    assert (kept.label, kept.source, kept.duel.id, kept.duel.batch) == (0.0, "synthetic", "s", 2)
    book.committed(["s"])
    assert book.num_synthetic == 0


def test_a_restarted_run_strikes_out_what_is_in_its_ledger(open_book):
    book = open_book()
    offer(book, "a", "b")
    for name in ("b", "a"):
        book.choose(name, "tie")
    book = open_book()
    book.settle({"b"}.__contains__)
    assert [d.id for d in book.chosen(10, batch=0)] == ["a"]


def test_a_crash_at_any_byte_loses_no_choice_that_was_acknowledged(open_book, tmp_path):
    book, path = open_book(), tmp_path / "book.arrow"
    offer(book, "a", "b")
    acknowledged = [(path.stat().st_size, [])]
    for name in ("b", "a"):
        book.choose(name, "tie")
        acknowledged.append((path.stat().st_size, [*acknowledged[-1][1], name]))
    book.close()
    for size in range(acknowledged[0][0], path.stat().st_size + 1, 61):
        torn = tmp_path / "torn.arrow"
        shutil.copy(path, torn)
        with torn.open("ab") as file:
            file.truncate(size)
        expected = max((entry for entry in acknowledged if entry[0] <= size), key=lambda entry: entry[0])[1]
        again = open_book(torn)
        assert [d.id for d in again.chosen(10, batch=0)] == expected
        assert again.choose("a", "tie") is Told.RECORDED


def test_what_the_disk_refuses_has_not_happened(open_book, monkeypatch):
    book = open_book()
    offer(book, "a")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rayalign.ledger.arrow_log.os.fsync", full)
        with pytest.raises(LedgerError, match="No space left"):
            book.choose("a", "first")
        with pytest.raises(LedgerError, match="No space left"):
            offer(book, "b")
    assert (book.num_chosen, book.num_open, book.num_questions) == (0, 1, 1)
    assert book.choose("a", "second") is Told.RECORDED


def test_whoever_waits_for_choices_is_woken_by_the_last_of_them(open_book):
    book, woken = open_book(), []
    offer(book, "a", "b")
    waiting = threading.Thread(target=lambda: woken.append(book.wait_for(2, 30.0)))
    waiting.start()
    book.choose("a", "tie")
    book.choose("b", "tie")
    waiting.join(timeout=30)
    assert woken == [True]
