"""A judge's call book in a bucket: the cap holds and no answer is lost, whichever replica comes when."""

import pytest

from rayalign.errors import OracleError, StorageError
from rayalign.serve.call_book import Answer, BucketCallBook, CallBook, Question
from rayalign.serve.http.client import HttpOracle
from rayalign.serve.judge_stats import judge_stats
from rayalign.storage import calls, fetched
from rayalign.storage.objects import Bucket

FIRST, SECOND, THIRD = (Question("j", duel, False, 0) for duel in "abc")


@pytest.fixture
def opened(uri):
    """`opened(turn, cap)`: the book as a replica of the driver with that turn has it."""
    folder = uri.replace("?", "/oracle?")
    return lambda turn="000001-x", cap=0.0: BucketCallBook(f"{folder}#{turn}", cap)


def test_what_was_paid_is_known_to_the_next_replica_and_counts_against_its_cap(opened):
    book = opened(cap=0.3)
    book.answer(book.reserve("a", 0.1), FIRST, Answer(0.7))
    book.reserve("b", 0.1)  # the crash
    book.free(book.reserve("c", 0.1), "HTTP 429")
    book.waste(book.reserve("c", 0.1), "unreadable")
    with pytest.raises(OracleError, match=r"has cost 0\.3 and another call costs 0\.1"):
        book.reserve("d", 0.1)
    book.flush()
    for turn in ("000002-x", "000003-x"):  # the second finds what the first made of it
        again = opened(turn, 0.3)
        assert again.lookup(FIRST) == Answer(0.7) and again.lookup(SECOND) is None
        assert (again.spent, again.calls, again.freed, again.wasted) == (0.3, 4, 1, 1)
        with pytest.raises(OracleError):
            again.reserve("d", 0.1)


def test_a_replica_that_was_replaced_makes_no_call_and_its_last_answer_is_not_lost(opened):
    old = opened()
    under_way = old.reserve("a", 0.1)
    new = opened("000002-x")
    with pytest.raises(StorageError, match="taken over"):
        old.reserve("b", 0.1)
    assert new.spent == 0.1 and new.lookup(FIRST) is None
    old.answer(under_way, FIRST, Answer(0.2))
    new.refresh()
    assert new.lookup(FIRST) == Answer(0.2) and new.spent_on("a") == 0.1
    assert opened("000003-x").lookup(FIRST) == Answer(0.2)


def test_a_replica_of_an_old_driver_that_comes_late_makes_no_call(opened):
    opened("000002-x").reserve("a", 0.1)
    with pytest.raises(StorageError, match="taken over"):
        opened("000001-x")


def test_of_a_replica_that_dies_while_it_tidies_up_nothing_counts_twice(opened, monkeypatch):
    book = opened()
    book.answer(book.reserve("a", 0.1), FIRST, Answer(0.7))
    book.waste(book.reserve("b", 0.1), "unreadable")
    book.flush()
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "delete", lambda *_: (_ for _ in ()).throw(StorageError("dead")))
        with pytest.raises(StorageError):
            opened("000002-x")
    again = opened("000003-x")
    assert (again.spent, again.calls, again.wasted) == (0.2, 2, 1)


def test_many_rows_become_few_objects_and_none_is_lost_whoever_dies(opened, uri, monkeypatch):
    monkeypatch.setattr(calls, "FOLD_AT", 4)
    folder, book = Bucket(uri), opened()
    for i in range(9):
        book.answer(book.reserve(f"d{i}", 0.1), FIRST._replace(duel=f"d{i}"), Answer(0.7))
    assert len(folder.names("oracle/calls")) < 9  # of 18 rows
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "delete", lambda *_: (_ for _ in ()).throw(StorageError("dead")))
        book.answer(book.reserve("d9", 0.1), FIRST._replace(duel="d9"), Answer(0.7))
    again = opened("000002-x")
    assert len(again.answers) == again.calls == 10 and again.spent == pytest.approx(1.0)


def test_what_was_given_back_late_stays_given_back(opened):
    old = opened()
    under_way = old.reserve("a", 0.1)
    new = opened("000002-x")
    old.free(under_way, "HTTP 429")
    old.flush()
    new.refresh()
    for book in (new, opened("000003-x"), opened("000004-x")):
        assert (book.spent, book.calls, book.freed) == (0.0, 1, 1)


def test_a_copy_that_has_rows_twice_counts_them_once(tmp_path):
    book = CallBook(tmp_path)
    book.answer(book.reserve("a", 0.5), FIRST, Answer(0.5))
    rows = book.path.read_bytes()
    book.path.write_bytes(rows + rows)
    assert (CallBook(tmp_path).spent, CallBook.copy_of(tmp_path).calls) == (0.5, 1)


def test_without_the_store_no_call_is_made_and_an_answer_waits_for_it(opened, monkeypatch):
    book = opened(cap=0.2)
    under_way = book.reserve("a", 0.1)

    def fail(*_):
        raise OSError("no store")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_write", fail)
        with pytest.raises(StorageError):
            book.reserve("b", 0.1)
        with pytest.raises(StorageError):
            book.answer(under_way, FIRST, Answer(0.7))
    assert book.lookup(FIRST) == Answer(0.7) and book.spent == 0.1
    book.answer(book.reserve("c", 0.1), THIRD, Answer(None))
    again = opened("000002-x")
    assert again.lookup(FIRST) == Answer(0.7) and again.lookup(THIRD) == Answer(None) and again.spent == 0.2


def test_a_copy_to_read_has_the_book(opened, uri):
    book = opened()
    book.answer(book.reserve("a", 0.5), FIRST, Answer(0.5))
    stats = judge_stats(fetched(uri) / "oracle")
    assert (stats.calls, stats.spent, stats.ties) == (1, 0.5, 1)


def test_a_run_has_one_name_at_an_oracles_service_however_its_bucket_is_reached():
    def name(uri, given=""):
        oracle = HttpOracle.__new__(HttpOracle)
        oracle.caller = given
        oracle.keep_in_bucket(uri)
        return oracle.caller

    one = name("s3://runs/first/oracle?endpoint_override=a:1#000001-x")
    assert one == name("s3://runs/first/oracle?endpoint_override=b:2#000002-y")
    assert len({one, name("s3://runs/first/oracle-evaluation"), name("s3://runs/second/oracle")}) == 3
    assert name("s3://runs/first/oracle", given="me") == "me"
