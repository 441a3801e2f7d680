"""The run directory as the parts of a run see it: a local folder, or a folder of their own in front of a bucket.

    collector   open_place      ledgers that are in the bucket before they count, files that are saved now and then
    driver      take, resume    its turn, and config and result in a folder of its own
                publish         some of them to the bucket
                gathered        everything that the collector wrote, too
                release         the next one's turn
    anybody     fetched         a copy to read; fetched_ledger: of a ledger alone

The local folders are under `$RAYALIGN_CACHE/buckets`. Each process has its own, made anew: nothing old is trusted.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rayalign.errors import ConfigError, StorageError
from rayalign.ledger.ledger import Ledger
from rayalign.storage.calls import recorded_calls
from rayalign.storage.files import Snapshots, restore
from rayalign.storage.lease import Lease
from rayalign.storage.log import BucketLog, Writer, recorded
from rayalign.storage.objects import Bucket
from rayalign.storage.uri import Uri, absolute, in_bucket
from rayalign.system.cache import cache_root

SAVE_EVERY_S = 30.0
"""Seconds of numbers that a lost machine may take along; ledgers and checkpoints are not among them."""
LEDGERS = ("ledger.arrow", "evaluation.arrow")
CHECKPOINT = "checkpoint"
ORACLES = ("oracle", "oracle-evaluation")
"""Folders of oracles, which only their replicas write."""
_ELSEWHERE = ("live/", "learner/", "oracle/", "oracle-evaluation/", "plots/", f"{CHECKPOINT}/")
"""What is no part of a copy to read, or fetched by itself."""
_LAST = ("config.yaml", "result.json")

_leases: dict[str, Lease] = {}
"""Of this process, by URI with turn."""


class Place:
    """A local run directory, as the collector writes it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def ledger(self, name: str) -> Ledger:
        """The ledger `name`, open for writing."""
        return Ledger(self.folder / name)

    def save(self) -> None:
        """Everything written so far is durable on return."""

    def save_if_due(self) -> None:
        """`save`, if the last time is long ago."""


class BucketPlace(Place):
    """A run directory in a bucket, as one collector writes it; the collectors before it can write no longer."""

    def __init__(self, run_dir: str) -> None:
        uri = Uri.parse(run_dir)
        self.writer = Writer(_bucket(uri), uri.turn)
        super().__init__(_scratch(uri) / self.writer.name)
        restore(self.writer.bucket, self.folder, before=self.writer.name)
        self._snapshots = Snapshots(self.writer, self.folder)
        self._saved_at = time.monotonic()

    def ledger(self, name: str) -> Ledger:
        """The ledger `name`, as the bucket has it."""
        return Ledger(self.folder / name, open_log=functools.partial(BucketLog, writer=self.writer, name=name))

    def save(self) -> None:
        """Put a snapshot of the folder into the bucket. Raises `StorageError`."""
        self._snapshots.save()
        self._saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """`save`, if the last time is `SAVE_EVERY_S` ago."""
        if time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save()


def open_place(run_dir: str) -> Place:
    """The run directory for the collector."""
    return BucketPlace(run_dir) if in_bucket(run_dir) else Place(run_dir)


# -- the driver -----------------------------------------------------------------------------------------------------
def folder_of(run_dir: str | Path) -> Path:
    """The driver's folder: the run directory itself, or the one in front of the bucket."""
    return _scratch(Uri.parse(str(run_dir))) / "driver" if in_bucket(run_dir) else Path(run_dir)


def holds(run_dir: str | Path, name: str) -> bool:
    """Whether the run directory has the file `name`. Raises `ConfigError` if its bucket can't be used."""
    if not in_bucket(run_dir):
        return (Path(run_dir) / name).exists()
    bucket = _bucket(Uri.parse(str(run_dir)))
    bucket.check()
    return bucket.get(name) is not None


def take(run_dir: str) -> str:
    """Begin to drive a run: the run directory as this driver and its parts have to name it.

    Raises `ConfigError` if another driver has the run.
    """
    if not in_bucket(run_dir):
        return run_dir
    uri = replace(Uri.parse(run_dir), turn="")
    bucket = Bucket(uri)
    lease = Lease.take(bucket)
    mine = replace(uri, turn=lease.turn)
    _leases[str(mine)] = lease
    for left in _scratch(uri).iterdir() if _scratch(uri).is_dir() else ():  # by drivers that can't go on
        if str(replace(uri, turn=left.name)) not in _leases and not left.name.startswith("read-"):
            shutil.rmtree(left, ignore_errors=True)
    return str(mine)


def resume(run_dir: str | Path, config: str) -> str:
    """`take` for a run that is there, as its file `config` says, with its files in the driver's folder."""
    if not in_bucket(run_dir):
        return absolute(run_dir)
    uri = Uri.parse(str(run_dir))
    if not holds(str(uri), config):
        raise ConfigError(f"run_dir={uri.shown!r} holds no run (no {config}). Start one with `rayalign run`.")
    bucket = _bucket(uri)
    for name in LEDGERS:  # what is bought in a bucket is recorded otherwise, so these labels would be bought again
        if not bucket.names(f"live/{name}") and bucket.get(name) is not None:
            raise ConfigError(
                f"run_dir={uri.shown!r} is a copy of a local run (its {name} is a file). It can be read there, but not "
                "gone on with: copy it to a folder, and resume that."
            )
    mine = take(str(uri))
    try:
        _download(bucket, folder_of(mine))
    except BaseException:
        release(mine)
        raise
    return mine


def publish(run_dir: str, *names: str) -> None:
    """Make files and folders in the bucket what they are in the driver's folder; those that are not there go."""
    if in_bucket(run_dir):
        lease = _leases.get(run_dir)
        if lease is None or not lease.is_last():
            raise StorageError(f"{Uri.parse(run_dir).shown} was taken over by another driver; nothing was published.")
        _upload(_bucket(Uri.parse(run_dir)), folder_of(run_dir), names)


def publish_all(run_dir: str) -> None:
    """Publish the whole folder of a driver. What says that a run is there, and then that it is complete, comes last."""
    if in_bucket(run_dir):
        names = sorted(path.name for path in folder_of(run_dir).iterdir())
        publish(run_dir, *(name for name in names if name not in (CHECKPOINT, *ORACLES, *_LAST)), *_LAST)


def gathered(run_dir: str) -> Path:
    """The driver's folder with everything that collector and learner wrote."""
    folder = folder_of(run_dir)
    if in_bucket(run_dir):
        bucket = _bucket(Uri.parse(run_dir))
        _download_live(bucket, folder)
        _download_checkpoint(bucket, folder)
    return folder


def release(run_dir: str) -> None:
    """End to drive a run."""
    lease = _leases.pop(run_dir, None)
    if lease is not None:
        lease.release()


# -- others ---------------------------------------------------------------------------------------------------------
def fetched(run_dir: str | Path, *, checkpoint: bool = False) -> Path:
    """A local folder to read the run from: itself, or a copy that goes with this process.

    `checkpoint`: with the final policy, if the run is finished.
    """
    if not in_bucket(run_dir):
        return Path(str(run_dir).removeprefix("file://"))
    uri = replace(Uri.parse(str(run_dir)), turn="")
    folder, bucket = _reading_folder(uri), _bucket(uri)
    _download(bucket, folder)
    for name in LEDGERS:
        if not (folder / name).exists():  # a finished run that was copied there without `live/`
            bucket.get_file(name, folder / name)
    if checkpoint and (folder / _LAST[-1]).exists():
        _download_checkpoint(bucket, folder)
    return folder


def fetched_ledger(place: str | Path, *, run: bool = False) -> Path:
    """The file of the ledger at `place` to read: itself, or a copy that goes with this process.

    `run`: with the run that it lies in around it, if it lies in one. The file is not there if the ledger is not.
    Raises `ConfigError` for one that lies in no folder of its bucket.
    """
    if not in_bucket(place):
        return Path(str(place).removeprefix("file://"))
    uri = replace(Uri.parse(str(place)), turn="")
    parent, _, name = uri.path.rpartition("/")
    if not parent:
        raise ConfigError(
            f"the ledger {uri.shown!r} must lie in a folder of its bucket: {uri.scheme}://bucket/runs/first."
        )
    beside = replace(uri, path=parent)
    bucket = Bucket(beside)
    if run and bucket.get(_LAST[0]) is not None:
        file = fetched(str(beside)) / name
    else:
        file = _reading_folder(uri) / name
        data = recorded(bucket, name)
        if data is not None:
            file.write_bytes(data)
    if not file.exists():
        bucket.get_file(name, file)
    return file


def upload(run_dir: str | Path, folder: Path, *names: str) -> None:
    """Make `names` in the bucket what they are in `folder`: for files that are views of others."""
    _upload(_bucket(Uri.parse(str(run_dir))), folder, names)


def replace_folder(place: str, folder: Path) -> None:
    """Make the bucket folder at the URI `place` what `folder` is."""
    uri = Uri.parse(place)
    parent, _, name = uri.path.rpartition("/")
    bucket = Bucket(replace(uri, path=parent, turn=""))
    files = {f"{name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
    bucket.put_files(files)
    bucket.delete(old for old in (f"{name}/{old}" for old in bucket.names(name)) if old not in files)


def scratch_of(place: str | Path) -> Path:
    """A folder of this machine for what need not survive it; `place` itself where that is local."""
    return _scratch(Uri.parse(str(place))) if in_bucket(place) else Path(place)


# -- inside ---------------------------------------------------------------------------------------------------------
def _bucket(uri: Uri) -> Bucket:
    return Bucket(replace(uri, turn=""))


def _scratch(uri: Uri) -> Path:
    name = hashlib.blake2b(str(replace(uri, turn="")).encode(), digest_size=8).hexdigest()
    return cache_root().absolute() / "buckets" / f"{uri.path.rpartition('/')[2]}-{name}" / uri.turn


def _reading_folder(uri: Uri) -> Path:
    _scratch(uri).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="read-", dir=_scratch(uri)))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _upload(bucket: Bucket, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = folder / name
        files = {name: path} if path.is_file() else {}
        files |= {f.relative_to(folder).as_posix(): f for f in path.rglob("*") if f.is_file()}
        bucket.put_files(files)
        there = [name, *(f"{name}/{old}" for old in bucket.names(name))]
        bucket.delete(old for old in there if old not in files)


def _download(bucket: Bucket, folder: Path) -> None:
    names = [name for name in bucket.names("") if not name.startswith(_ELSEWHERE) and not name.endswith(".arrow")]
    for name in names:
        bucket.get_file(name, folder / name)
    _download_live(bucket, folder)


def _download_live(bucket: Bucket, folder: Path) -> None:
    restore(bucket, folder)
    for name in LEDGERS:
        data = recorded(bucket, name)
        if data is not None:
            (folder / name).write_bytes(data)
    for name in ORACLES:
        if calls := recorded_calls(bucket, name):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "calls.jsonl").write_bytes(calls)


def _download_checkpoint(bucket: Bucket, folder: Path) -> None:
    for name in bucket.names(CHECKPOINT):
        bucket.get_file(f"{CHECKPOINT}/{name}", folder / CHECKPOINT / name)
