"""Run directories, from the name that a user gives to the folder that is this run's alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rayalign import storage
from rayalign.system import code_version
from rayalign import config as settings
from rayalign.errors import ConfigError, LedgerError
from rayalign.ledger.ledger import Ledger
from rayalign.runs.config import RunConfig
from rayalign.runs.record import CONFIG

FAILED_START = "failed_start.txt"
"""Says that a run failed before it committed to anything, and why: its name is free for another."""


def default_name(config: RunConfig) -> str:
    """Of a run that nobody named: a folder below `runs`."""
    world = config.env.split("/")[-1]
    return f"runs/{config.agent_name}-{world}-seed{config.loop.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def refuse_old(run_dir: str) -> None:
    """Raises `ConfigError` if `run_dir` holds a run that anything was bought for."""
    if storage.holds(run_dir, CONFIG) and not _failed_at_its_start(run_dir):
        where = storage.plain(run_dir)
        raise ConfigError(
            f"run_dir={where!r} already holds a run. `rayalign resume {where}` goes on with it; for a new run "
            "choose another run_dir."
        )


def set_aside(run_dir: str) -> None:
    """Give a run that failed at its start another name, beside its old one, so that nothing of it is mixed up."""
    if _failed_at_its_start(run_dir):
        folder = _free(Path(run_dir).with_name(f"{Path(run_dir).name}.failed"))
        folder.rmdir()
        Path(run_dir).rename(folder)


def note_failed_start(run_dir: str, error: BaseException) -> None:
    """Leave a mark if the run in `run_dir`, which `error` ended, had not committed to anything yet."""
    if not storage.in_bucket(run_dir) and not _has_committed(Path(run_dir)):
        with contextlib.suppress(OSError):
            (Path(run_dir) / FAILED_START).write_text(f"{type(error).__name__}: {error}\n")


def new_folder(run_dir: str) -> str:
    """Make it; with a number behind its name where an equal run began in the same second, in any process."""
    return str(_free(Path(run_dir)))


@contextmanager
def released_on_error(run_dir: str) -> Iterator[None]:
    """Whoever took `run_dir` and fails gives it back."""
    try:
        yield
    except BaseException:
        storage.release(run_dir)
        raise


def write_config(config: RunConfig) -> None:
    """Say what the run is, and which code works on it."""
    folder = storage.folder_of(config.run_dir)
    (folder / CONFIG).write_text(settings.to_yaml(replace(config, run_dir=storage.plain(config.run_dir))))
    code_version.record(folder)


def _failed_at_its_start(run_dir: str) -> bool:
    return not storage.in_bucket(run_dir) and (Path(run_dir) / FAILED_START).exists()


def _has_committed(folder: Path) -> bool:
    for file in (folder / "ledger.arrow", folder / "evaluation.arrow"):
        try:
            if file.exists():
                ledger = Ledger(file, read_only=True)
                if ledger.num_collected or ledger.committed:
                    return True
        except LedgerError:  # can't be read now: for all that is known, it has
            return True
    return False


def _free(folder: Path) -> Path:
    number, free = 1, folder
    while True:
        try:
            free.mkdir(parents=True)
            return free
        except FileExistsError:
            number += 1
            free = folder.with_name(f"{folder.name}-{number}")
