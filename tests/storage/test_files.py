"""Everything beside the ledgers in a bucket: snapshots, the oracle's answers, what the driver publishes."""

import pytest

from rayalign import storage
from rayalign.errors import StorageError
from rayalign.storage.files import FILES, Snapshots, restore
from rayalign.storage.journal import ANSWERS, open_journal
from rayalign.storage.log import Writer
from rayalign.storage.objects import Bucket
from rayalign.types import Verdict


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def saved(bucket, tmp_path):
    """`saved(files)`: a new writer with a folder of these files, saved once."""

    def save(files):
        writer = Writer(bucket, "000001-a")
        write(tmp_path / writer.name, files)
        snapshots = Snapshots(writer, tmp_path / writer.name)
        snapshots.save()
        return snapshots

    return save


def test_a_snapshot_is_the_folder_without_ledgers_and_unfinished_files(bucket, saved, tmp_path):
    left_out = {"ledger.arrow": "", "agent/observed-000002.partial/model": "", "pinned.partial": "", "wandb/x": ""}
    files = {"metrics.jsonl": "{}", "agent/observed-000001/model": "weights"}
    saved(files | left_out)
    restore(bucket, tmp_path / "copy")
    assert tree(tmp_path / "copy") == files


def test_only_what_changed_is_put_again_and_what_nobody_needs_is_deleted(bucket, saved, tmp_path):
    snapshots = saved({"a": "1", "b": "1", "c": "1"})
    write(snapshots.folder, {"b": "two"})
    (snapshots.folder / "c").unlink()
    snapshots.save()
    assert [name.partition("/")[2] for name in bucket.names(FILES)] == ["000001/a", "000002/b", "manifest-000002"]
    restore(bucket, tmp_path / "copy")
    assert tree(tmp_path / "copy") == {"a": "1", "b": "two"}


def test_a_snapshot_that_was_not_finished_is_none(bucket, saved, tmp_path):
    snapshots = saved({"a": "1"})
    place = f"{FILES}/{snapshots.writer.name}"
    bucket.put(f"{place}/000002/a", b"half")
    bucket.put(f"{place}/manifest-000002", b'{"a": ')
    restore(bucket, tmp_path / "copy")
    assert tree(tmp_path / "copy") == {"a": "1"}


def test_an_old_writer_harms_no_snapshot_of_the_last_one(bucket, saved, tmp_path):
    old, new = saved({"a": "old"}), saved({"a": "new"})
    write(old.folder, {"a": "older"})
    old.save()
    restore(bucket, tmp_path / "copy")
    assert tree(tmp_path / "copy") == {"a": "new"}
    new.save()
    assert not [name for name in bucket.names(FILES) if name.startswith(old.writer.name)]


def test_a_file_that_the_store_lost_is_an_error(bucket, saved, tmp_path):
    snapshots = saved({"a": "1"})
    bucket.delete([f"{FILES}/{snapshots.writer.name}/000001/a"])
    with pytest.raises(StorageError, match="missing or damaged"):
        restore(bucket, tmp_path / "copy")


def test_paid_answers_are_known_to_all_replicas_and_a_torn_one_to_none(uri):
    place = storage.join(uri, "oracle")
    first, second = open_journal(place), open_journal(place)
    first.record([Verdict(duel_id="a", probability=0.25, price=0.5), Verdict(duel_id="b", failure="unreadable")])
    Bucket(place).put(f"{ANSWERS}/zz", b'{"duel_id": "c", "proba')
    for journal in (first, second, open_journal(place)):
        assert journal.lookup("abc") == {"a": Verdict(duel_id="a", probability=0.25, price=0.5)}
    second.record([Verdict(duel_id="d", probability=1.0)])
    assert set(first.lookup("ad")) == {"a", "d"}


def test_what_a_driver_publishes_is_there_until_it_is_gone_from_its_folder(uri, bucket):
    mine = storage.take(uri)
    folder = storage.folder_of(mine)
    write(folder, {"config.yaml": "1", "plots/a": "1", "plots/b": "1"})
    storage.publish_all(mine)
    (folder / "plots/a").unlink()
    storage.publish(mine, "plots")
    assert [name for name in bucket.names("") if not name.startswith("live/")] == ["config.yaml", "plots/b"]
    storage.release(mine)
    with pytest.raises(StorageError, match="taken over"):
        storage.publish(mine, "plots")


def test_a_folder_is_replaced_as_a_whole(uri, bucket, tmp_path):
    for files in ({"a": "1", "adapter/b": "1"}, {"a": "2"}):
        folder = tmp_path / files["a"]
        write(folder, files)
        storage.replace_folder(storage.join(uri, "checkpoint"), folder)
    assert [(name, bucket.get(name)) for name in bucket.names("")] == [("checkpoint/a", b"2")]
