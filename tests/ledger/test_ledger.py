"""The ledger: what is written is what is read, whatever is killed in between."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayalign.errors import LedgerError
from rayalign.ledger.ledger import Ledger, fold
from rayalign.types import Candidate, Duel, LabelSource, Preference, Prompt, Verdict


def duel(name: str, batch: int = 0, version: int = 0) -> Duel:
    def candidate(text: str) -> Candidate:
        return Candidate(text=text, token_ids=(5, 6, 2), logprobs=(-0.1, -2.5, -1 / 3), policy_version=version)

    prompt = Prompt(
        id=f"p-{name}",
        text=f"Say {name} — é",
        token_ids=(1, 2, 3),
        reference="ref",
        pair=("one", "two"),
        meta={"n": 1, "messages": [{"role": "user", "content": f"Say {name}"}]},
    )
    return Duel(
        id=name,
        batch=batch,
        prompt=prompt,
        first=candidate(f"{name} first"),
        second=candidate(f"{name} second"),
        meta={"v": 0.25},
    )


def answer(ledger: Ledger, *names: str, label: float = 1.0) -> None:
    ledger.answer(
        [Verdict(duel_id=n, probability=0.75, price=0.01) for n in names], [label] * len(names), oracle="test/1"
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.arrow"


def filled(path) -> None:
    """Two batches: a answered, b failed, s synthetic; c answered (0.0), d outstanding."""
    with Ledger(path) as ledger:
        synthetic = Preference(duel=duel("s"), label=0.0, source=LabelSource.SYNTHETIC)
        ledger.commit(0, [duel("a"), duel("b")], [synthetic], meta={"note": "x"})
        ledger.answer(
            [Verdict(duel_id="a", probability=0.75, price=0.01), Verdict(duel_id="b", failure="unreadable")],
            [1.0, None],
            "o/1",
        )
        ledger.commit(1, [duel("c", 1, 1), duel("d", 1, 1)])
        answer(ledger, "c", label=0.0)


def test_what_is_committed_and_answered_is_read_back_exactly(path):
    filled(path)
    with Ledger(path) as ledger:
        a, s = ledger.stream_batch(0)
        assert a == Preference(duel=duel("a"), label=1.0, probability=0.75)
        assert s == Preference(duel=duel("s"), label=0.0, source=LabelSource.SYNTHETIC)
        with pytest.raises(LedgerError, match=r"no stream batch 1 in .*: 1 are closed"):
            ledger.stream_batch(1)
        assert ledger.outstanding() == [duel("d", 1, 1)]
        assert [p.duel.id for p in ledger.preferences()] == ["a", "s", "c"]


def test_budget_is_counted_from_the_file_alone(path):
    filled(path)
    with Ledger(path) as ledger:
        assert (ledger.spent, ledger.committed, ledger.num_collected, len(ledger)) == (2, 3, 2, 5)
        assert (ledger.num_streamed, ledger.num_outstanding) == (1, 1)
        assert ledger.price == pytest.approx(0.02)
        assert [ledger.labels_before(b) for b in (0, 1, 2, 9)] == [0, 1, 2, 2]
        index = fold(ledger.events())
        assert (index.spent, index.outstanding, index.seq) == (2, 1, 10)


def test_header_says_what_the_batch_is_made_of(path):
    filled(path)
    with Ledger(path) as ledger:
        header = ledger.header(0)
        assert header == {"duels": 2, "synthetic": 1, "labels_before": 0, "policy_versions": [0], "note": "x"}
        assert ledger.header(1)["labels_before"] == 1  # b failed and is not charged


def test_known_tells_preference_failure_and_nothing_apart(path):
    filled(path)
    with Ledger(path) as ledger:
        assert ledger.known("c") == Preference(duel=duel("c", 1, 1), label=0.0, probability=0.75)
        assert ledger.known("s").source is LabelSource.SYNTHETIC
        assert ledger.known("b") == Verdict(duel_id="b", failure="unreadable")
        assert ledger.known("d") is None and ledger.known("never") is None


def test_file_is_an_ordinary_arrow_stream(path):
    filled(path)
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    assert table["event"].to_pylist() == (
        [
            "batch",
            "requested",
            "requested",
            "synthetic",
            "answered",
            "failed",
            "batch",
            "requested",
            "requested",
            "answered",
        ]
    )
    assert table["seq"].to_pylist() == list(range(10))
    assert table["oracle"].to_pylist()[4:6] == ["o/1", "o/1"]


def test_a_file_cut_anywhere_in_its_last_message_loses_that_message_alone(path):
    filled(path)
    whole = path.read_bytes()
    with Ledger(path) as ledger:
        start = ledger._log.scan()
        ends = [end for _, _, end in start]
    assert ends[-1] == len(whole)
    for length in range(ends[-2], ends[-1], 8):
        path.write_bytes(whole[:length] + b"\0" * (length % 3))  # odd lengths, and zeros that a file system left
        with Ledger(path) as ledger:
            assert ledger.spent == 1 and len(ledger.outstanding()) == 2, length
            answer(ledger, "c", "d")  # and it can be written again
        with Ledger(path) as ledger:
            assert ledger.spent == 3


def test_a_batch_is_there_entirely_or_not_at_all(path):
    with Ledger(path) as ledger:
        ledger.commit(0, [duel("a")])
        before = path.stat().st_size
        ledger.commit(1, [duel(str(i), 1) for i in range(20)], [Preference(duel=duel("s", 1), label=1.0)])
    whole = path.read_bytes()
    for length in np.linspace(before + 1, len(whole) - 1, 15).astype(int):
        path.write_bytes(whole[:length])
        with Ledger(path) as ledger:
            assert (ledger.num_collected, len(ledger)) == (1, 1)


def test_a_torn_new_file_is_begun_again(path):
    Ledger(path).close()
    path.write_bytes(path.read_bytes()[:40])
    with Ledger(path) as ledger:
        ledger.commit(0, [duel("a")])
    with Ledger(path) as ledger:
        assert len(ledger.outstanding()) == 1


def test_damage_before_the_last_message_is_an_error_and_cuts_nothing(path):
    filled(path)
    whole = path.read_bytes()
    with Ledger(path) as ledger:
        offsets = [offset for offset, _, _ in ledger._log.scan()]
    damages = {
        "marker": (offsets[1], b"\0\0\0\0"),
        "length": (offsets[1] + 4, b"\xff\xff\xff\x0f"),
        "metadata": (offsets[1] + 8, b"\xff" * 16),
        "a duel's event": (whole.index(b"requested"), b"?"),
    }
    for what, (at, bytes_) in damages.items():
        path.write_bytes(whole[:at] + bytes_ + whole[at + len(bytes_) :])
        with pytest.raises(LedgerError, match="damaged at byte"):
            Ledger(path)
        assert path.stat().st_size == len(whole), what


def test_another_file_is_not_taken_for_a_ledger(path):
    path.write_bytes(b"a,b\n1,2\n" * 1000)
    with pytest.raises(LedgerError, match="not a ledger"):
        Ledger(path)


def test_a_second_writer_is_told_that_there_is_one_and_a_reader_is_welcome(path):
    filled(path)
    with Ledger(path):
        with pytest.raises(LedgerError, match="being written by another process"):
            Ledger(path, lock_timeout_s=0)
        with Ledger(path, read_only=True) as reader:
            assert reader.spent == 2
            with pytest.raises(LedgerError, match="reading only"):
                answer(reader, "d")
    Ledger(path, lock_timeout_s=0).close()


def test_a_writer_killed_without_warning_leaves_its_lock_and_its_labels(path):
    script = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[2]); from test_ledger import *\n"
        "ledger = Ledger(sys.argv[1]); ledger.commit(0, [duel('a'), duel('b')]); answer(ledger, 'a')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path), str(Path(__file__).parent)], timeout=60)
    assert killed.returncode == -9
    with Ledger(path, lock_timeout_s=0) as ledger:
        assert ledger.spent == 1 and [d.id for d in ledger.outstanding()] == ["b"]


def test_what_contradicts_the_ledger_is_refused_and_not_written(path):
    filled(path)
    size = path.stat().st_size
    with Ledger(path) as ledger:
        with pytest.raises(LedgerError, match="the next one is 2"):
            ledger.commit(5, [duel("z", 5)])
        with pytest.raises(LedgerError, match="duel a is already in the ledger"):
            ledger.commit(2, [duel("a", 2)])
        with pytest.raises(LedgerError, match="duel z is already in the ledger"):
            ledger.commit(2, [duel("z", 2), duel("z", 2)])
        with pytest.raises(LedgerError, match="not outstanding"):
            answer(ledger, "a")
        with pytest.raises(LedgerError, match="not outstanding"):
            answer(ledger, "never")
        with pytest.raises(LedgerError, match="answered twice"):
            answer(ledger, "d", "d")
        odd = Duel(
            id="z", batch=2, prompt=duel("z").prompt, first=duel("z").first, second=duel("z").second, meta={"o": {1}}
        )
        with pytest.raises(LedgerError, match="meta of duel z"):
            ledger.commit(2, [odd])
        assert path.stat().st_size == size


def test_numpy_numbers_in_meta_are_recorded_as_numbers(path):
    d = duel("a")
    d = Duel(id="a", batch=0, prompt=d.prompt, first=d.first, second=d.second, meta={"score": np.float32(0.5)})
    with Ledger(path) as ledger:
        ledger.commit(0, [d], meta={"counts": np.arange(2)})
        assert ledger.outstanding()[0].meta == {"score": 0.5}
        assert ledger.header(0)["counts"] == [0, 1]


def test_duels_outside_the_batches_need_no_header(path):
    with Ledger(path) as ledger:
        ledger.commit(None, [duel("e", batch=7)])
        ledger.commit(None, [])
        answer(ledger, "e")
        assert (ledger.num_collected, ledger.spent) == (0, 1)
        assert next(ledger.preferences()).duel.batch == 7


def test_an_empty_batch_is_a_batch(path):
    with Ledger(path) as ledger:
        ledger.commit(0, [])
        assert ledger.num_collected == 1 and ledger.stream_batch(0) == []


def test_a_label_is_on_disk_before_the_call_returns(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd)))
    with Ledger(path) as ledger:
        ledger.commit(0, [duel("a")])
        answer(ledger, "a")
        assert synced[-1] == path.stat().st_size


def test_a_full_disk_leaves_the_ledger_as_it_was(path, monkeypatch):
    filled(path)
    with Ledger(path) as ledger:
        size, real = path.stat().st_size, os.write

        def full(fd, data):
            real(fd, bytes(data)[:100])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(LedgerError, match="No space left"):
            answer(ledger, "d")
        monkeypatch.undo()
        assert path.stat().st_size == size and ledger.spent == 2
        answer(ledger, "d")
    with Ledger(path) as ledger:
        assert ledger.spent == 3


# -- the training set ---------------------------------------------------------------------------------------------
def test_preference_table_has_winners_losers_and_no_ties(path):
    filled(path)
    with Ledger(path) as ledger:
        answer(ledger, "d", label=0.5)
        table = ledger.to_preference_table()
    assert table["duel_id"].to_pylist() == ["a", "s", "c"]
    assert table["prompt"].to_pylist()[0] == "Say a — é"
    assert table["chosen"].to_pylist() == ["a first", "s second", "c second"]
    assert table["rejected"].to_pylist() == ["a second", "s first", "c first"]
    assert table["winner_is_first"].to_pylist() == [True, False, False]
    assert table["source"].to_pylist() == ["oracle", "synthetic", "oracle"]
    assert table["probability"].to_pylist() == [0.75, None, 0.75]
    assert table["policy_version"].to_pylist() == [0, 0, 1]


def test_an_export_of_the_first_batches_is_what_was_trained_on_whatever_came_later(path, tmp_path):
    filled(path)  # stream batch 0 is closed, batch 1 waits for d
    with Ledger(path) as ledger:
        early = ledger.export(tmp_path / "early", batches=ledger.num_streamed)
        answer(ledger, "d")
        late = ledger.export(tmp_path / "late", batches=2)
        paid = ledger.export(tmp_path / "paid", batches=2, synthetic=False)
    duels = [pq.read_table(folder)["duel_id"].to_pylist() for folder in (early, late, paid)]
    assert duels == [["a", "s"], ["a", "s", "c", "d"], ["a", "c", "d"]]


def test_conversational_table_has_the_messages(path):
    filled(path)
    with Ledger(path) as ledger:
        row = ledger.to_preference_table(conversational=True).to_pylist()[0]
    assert row["prompt"] == [{"role": "user", "content": "Say a"}]
    assert row["chosen"] == [{"role": "assistant", "content": "a first"}]


def test_export_is_read_by_the_datasets_library(path, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    filled(path)
    folder = Ledger(path, read_only=True).export(tmp_path / "preferences")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(loaded.column_names)
    assert loaded[2]["chosen"] == "c second" and loaded[2]["rejected"] == "c first"
    assert loaded.num_rows == 3


def test_an_empty_ledger_exports_an_empty_set(path, tmp_path):
    Ledger(path).close()
    with Ledger(path) as ledger:
        assert ledger.to_preference_table().num_rows == 0
        assert math.isclose(ledger.price, 0)
    assert (Ledger(path, read_only=True).export(tmp_path / "out") / "preferences.parquet").exists()
