"""Things that are built once per machine: `$RAYALIGN_CACHE`, by default `~/.cache/rayalign`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`$RAYALIGN_CACHE`, or `~/.cache/rayalign`."""
    return Path(os.environ.get("RAYALIGN_CACHE") or "~/.cache/rayalign").expanduser()


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build(empty_folder)` fills it if it is not there.

    `name` has to change whenever what `build` writes does.
    """
    return built_once(cache_root() / name, build)


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(empty_folder)` if it is not there.

    It is there completely or not at all, also when several processes build it at the same time: the first wins.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        build(building)
        building.chmod(0o755)
        building.rename(folder)
    except OSError:
        if not folder.is_dir():  # else somebody else was faster
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder
