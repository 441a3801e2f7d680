"""The ledger in a bucket: what is acknowledged is there, whoever dies and whoever takes over."""

import functools
import random
import threading

import pytest

from rayalign.errors import LedgerError, RayalignError, StorageError
from rayalign.ledger.ledger import Ledger
from rayalign.storage.log import BucketLog, Writer, recorded
from rayalign.storage.objects import Bucket
from rayalign.types import Candidate, Duel, Prompt, Verdict

NAME = "ledger.arrow"


def duel(name: str, batch: int) -> Duel:
    first, second = (
        Candidate(text=f"{name}{i}", token_ids=(i,), logprobs=(-1.0,), policy_version=batch) for i in (1, 2)
    )
    return Duel(id=name, batch=batch, prompt=Prompt(id="p", text="P", token_ids=(1,)), first=first, second=second)


def buy(ledger: Ledger, name: str) -> None:
    """A batch of one duel, and its label: two appends."""
    ledger.commit(ledger.num_collected, [duel(name, ledger.num_collected)])
    ledger.answer([Verdict(duel_id=name, probability=0.75)], [1.0], oracle="test/1")


@pytest.fixture
def open_ledger(bucket, tmp_path):
    """`open_ledger(turn)` takes over as a process of the driver whose turn it is."""
    opened = []

    def take_over(turn="000001-a"):
        writer = Writer(bucket, turn)
        log = functools.partial(BucketLog, writer=writer, name=NAME)
        opened.append(Ledger(tmp_path / writer.name / NAME, open_log=log))
        return opened[-1]

    yield take_over
    for ledger in opened:
        ledger.close()


def answered(ledger: Ledger) -> list[str]:
    return [preference.duel.id for preference in ledger.preferences()]


def test_what_is_acknowledged_is_in_the_bucket_byte_by_byte(bucket, open_ledger):
    ledger = open_ledger()
    for name in "abc":
        buy(ledger, name)
        assert recorded(bucket, NAME) == ledger.path.read_bytes()


def test_a_new_process_takes_over_all_of_it_and_goes_on(open_ledger):
    for turn, name in (("000001-a", "a"), ("000001-a", "b"), ("000002-a", "c")):
        ledger = open_ledger(turn)
        buy(ledger, name)
    assert answered(open_ledger("000003-a")) == ["a", "b", "c"]


def test_an_old_copy_on_disk_is_not_believed(bucket, tmp_path):
    path = tmp_path / "copy" / NAME
    with Ledger(path) as stale:
        buy(stale, "never paid")
    log = functools.partial(BucketLog, writer=Writer(bucket, "000001-a"), name=NAME)
    with Ledger(path, open_log=log) as ledger:
        assert answered(ledger) == []


def test_who_was_replaced_is_told_and_acknowledges_nothing(open_ledger):
    old = open_ledger("000001-a")
    buy(old, "a")
    new = open_ledger("000002-a")
    with pytest.raises(StorageError, match="taken over by another process"):
        buy(old, "b")
    with pytest.raises(LedgerError, match="takes nothing more"):
        buy(old, "c")
    buy(new, "b")
    assert answered(open_ledger("000003-a")) == ["a", "b"]


def test_an_old_driver_can_not_take_over_from_a_newer_one(open_ledger):
    buy(open_ledger("000002-a"), "a")
    with pytest.raises(StorageError, match="taken over"):
        open_ledger("000001-z")


@pytest.mark.parametrize("when", ["before the append is put", "after it is put"])
def test_a_label_bought_while_somebody_takes_over_is_nobodys_or_everybodys(when, open_ledger, monkeypatch):
    old, new = open_ledger("000001-a"), []
    put = Bucket.put

    def interrupted(self, name, data):
        if new or name.startswith("live/writers"):
            return put(self, name, data)
        monkeypatch.setattr(Bucket, "put", put)
        if when == "after it is put":
            put(self, name, data)
        new.append(open_ledger("000002-a"))
        if when != "after it is put":
            put(self, name, data)

    old.commit(0, [duel("a", 0)])
    monkeypatch.setattr(Bucket, "put", interrupted)
    with pytest.raises(StorageError, match="taken over"):
        old.answer([Verdict(duel_id="a", probability=0.75)], [1.0], oracle="test/1")
    there = ["a"] if when == "after it is put" else []
    assert answered(new[0]) == there
    assert answered(open_ledger("000003-a")) == there


def test_a_torn_append_was_acknowledged_by_nobody_and_is_left_out(bucket, open_ledger):
    old = open_ledger()
    buy(old, "a")
    name = old.path.parent.name
    whole = bucket.get(f"live/{NAME}/{name}/00000001")
    bucket.put(f"live/{NAME}/{name}/00000002", whole[: len(whole) // 2])
    buy(open_ledger(), "b")
    assert answered(open_ledger()) == ["a", "b"]


def test_an_append_that_failed_and_is_there_all_the_same_is_found_by_the_next_process(open_ledger, monkeypatch):
    ledger = open_ledger()
    buy(ledger, "a")
    write = Bucket._write

    def lost_reply(self, name, chunks):
        write(self, name, chunks)
        raise OSError("AWS Error NETWORK_CONNECTION")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "_write", lost_reply)
        with pytest.raises(StorageError, match="does not answer"):
            buy(ledger, "b")
    with pytest.raises(LedgerError, match="takes nothing more"):
        buy(ledger, "c")
    with open_ledger() as new:
        assert [duel.id for duel in new.outstanding()] == ["b"]


def test_a_base_that_was_never_finished_is_passed_over(bucket, open_ledger):
    buy(open_ledger(), "a")
    late = Writer(bucket, "000001-a")
    bucket.put(f"live/{NAME}/{late.name}/base", b"half of i")
    assert answered(open_ledger()) == ["a"]


def test_an_append_that_the_store_lost_is_an_error(bucket, open_ledger):
    ledger = open_ledger()
    buy(ledger, "a")
    bucket.delete([f"live/{NAME}/{ledger.path.parent.name}/00000000"])
    with pytest.raises(LedgerError, match="lacks append 0"):
        open_ledger()


def test_whatever_was_acknowledged_in_a_crowd_of_writers_is_in_the_ledger_once(bucket, tmp_path):
    acknowledged, mutex = [], threading.Lock()

    def drive(number):
        chance = random.Random(number)
        for attempt in range(3):
            try:
                writer = Writer(bucket, f"{chance.randint(1, 3):06d}-{number}")
                log = functools.partial(BucketLog, writer=writer, name=NAME)
                with Ledger(tmp_path / writer.name / NAME, open_log=log) as ledger:
                    for i in range(3):
                        name = f"{number}/{attempt}/{i}"
                        buy(ledger, name)
                        with mutex:
                            acknowledged.append(name)
            except RayalignError:
                continue

    threads = [threading.Thread(target=drive, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = functools.partial(BucketLog, writer=Writer(bucket, "000009-a"), name=NAME)
    with Ledger(tmp_path / "last" / NAME, open_log=log) as last:
        found = answered(last)
    assert len(set(found)) == len(found)
    assert set(acknowledged) <= set(found)
    assert acknowledged
