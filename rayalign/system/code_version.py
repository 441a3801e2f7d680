"""Which code made a run: the package's version and, in a git checkout, its commit. Kept in `code.json` of the run."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

NAME = "code.json"
_GIT_TIMEOUT_S = 10.0


@cache
def code_version() -> str:
    """`0.1.0`, in a checkout `0.1.0+g1a2b3c4d5e6f`, with `.changed` behind it where the package differs from it."""
    package = Path(__file__).parents[1]
    version = _version()
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if not top or Path(top) != package.parent:  # installed below somebody else's repository
            return version
        commit = _git(package, "rev-parse", "--short=12", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", str(package))
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+g{commit}" + (".changed" if changed else "")


def record(run_dir: Path) -> None:
    """Add this code to those that worked on the run, if it is another one than the last."""
    versions = recorded(run_dir)
    if not versions or versions[-1] != code_version():
        (run_dir / NAME).write_text(json.dumps([*versions, code_version()]))


def recorded(run_dir: Path) -> list[str]:
    """The versions of the code that worked on the run, the first one first; empty where nobody wrote it down."""
    file = run_dir / NAME
    return [str(version) for version in json.loads(file.read_text())] if file.exists() else []


def _version() -> str:
    try:
        return metadata.version("rayalign")
    except metadata.PackageNotFoundError:
        import rayalign

        return rayalign.__version__


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
    )
    return done.stdout.strip()
