"""URIs of run directories, and the file systems behind them.

    s3://bucket/runs/first?endpoint_override=127.0.0.1:9000&scheme=http#000003-5f2c91ab
    scheme  bucket  path   where the store is, not who you are          the driver's turn, see `lease`; not in a config

Credentials come from the environment of each process, never from a URI: those are written down.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from rayalign.errors import ConfigError

OPTIONS = {
    "s3": ("endpoint_override", "scheme", "region"),
    "gs": ("endpoint_override", "scheme"),
    "gcs": ("endpoint_override", "scheme"),
}
"""Scheme -> what may stand behind the question mark."""
CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S, GCS_RETRY_S = 10.0, 60.0, 60
_ANY_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_PACKAGES = "working_dir_files"
"""Part of the path of every copy that Ray makes of a job's working directory."""
_SQUEEZED = re.compile(r"^(s3|gs|gcs):/[^/]")


@dataclass(frozen=True, kw_only=True)
class Uri:
    """A folder in a bucket."""

    scheme: str
    bucket: str
    path: str
    query: str = ""
    turn: str = ""
    """Of the driver on whose behalf it is used."""

    @classmethod
    def parse(cls, text: str) -> Uri:
        """Take a URI apart. Raises `ConfigError` for one that names no folder of a bucket, or a secret."""
        parts = urlsplit(text)
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if parts.scheme not in OPTIONS:
            raise ConfigError(
                f"run_dir={shown!r}: {parts.scheme}:// is not supported. Use s3:// (S3 and what speaks its language), "
                "gs://, or a local path."
            )
        if "@" in parts.netloc:
            raise ConfigError(
                f"run_dir={shown!r} must not hold credentials, as run directories are written down. Leave them out of "
                "the URI; the environment has them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "GOOGLE_APPLICATION_CREDENTIALS)."
            )
        unknown = [name for name, _ in parse_qsl(parts.query) if name not in OPTIONS[parts.scheme]]
        if unknown:
            raise ConfigError(
                f"run_dir={shown!r} has the option {unknown[0]!r}. Only {', '.join(OPTIONS[parts.scheme])} may stand "
                "in it; credentials belong into the environment."
            )
        path = unquote(parts.path).strip("/")
        if not parts.netloc or not path:
            raise ConfigError(f"run_dir={shown!r} must name a folder in a bucket: {parts.scheme}://bucket/runs/first.")
        if ".." in path.split("/") or "//" in path:
            raise ConfigError(f"run_dir={shown!r} must not have '..' or empty parts in its path.")
        return cls(scheme=parts.scheme, bucket=parts.netloc, path=path, query=parts.query, turn=parts.fragment)

    @property
    def root(self) -> str:
        """Bucket and path, as pyarrow's file systems name it."""
        return f"{self.bucket}/{self.path}"

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.scheme}://{self.root}"

    def __str__(self) -> str:
        query = f"?{self.query}" if self.query else ""
        return self.shown + query + (f"#{self.turn}" if self.turn else "")

    def filesystem(self) -> Any:
        """The pyarrow file system; made once per process, asks nothing by itself."""
        return _filesystem(self.scheme, self.bucket, self.query)


@functools.lru_cache
def _filesystem(scheme: str, bucket: str, query: str) -> Any:
    import pyarrow.fs

    options = dict(parse_qsl(query))
    if scheme != "s3":
        return pyarrow.fs.GcsFileSystem(retry_time_limit=_seconds(GCS_RETRY_S), **options)
    if "endpoint_override" not in options and "region" not in options:
        options["region"] = pyarrow.fs.resolve_s3_region(bucket)
    return pyarrow.fs.S3FileSystem(
        connect_timeout=CONNECT_TIMEOUT_S, request_timeout=REQUEST_TIMEOUT_S, allow_delayed_open=True, **options
    )


def _seconds(number: float) -> Any:
    from datetime import timedelta

    return timedelta(seconds=number)


def in_bucket(run_dir: str | Path) -> bool:
    """Whether it names a place in a bucket. Raises `ConfigError` for schemes that nobody here knows."""
    text = str(run_dir)
    if _SQUEEZED.match(text):
        raise ConfigError(f"run_dir={text!r} is a URI that went through pathlib.Path; pass it as a string.")
    found = _ANY_SCHEME.match(text)
    if not found or found[1] == "file":
        return False
    Uri.parse(text)
    return True


def absolute(run_dir: str | Path) -> str:
    """A URI as it is; an absolute path for everything else, `file:///path` included.

    A relative path is one below the working directory, but in a Ray job below the home directory: there the working
    directory is Ray's copy of what was submitted, which goes when the job is over.
    """
    if in_bucket(run_dir):
        return str(Uri.parse(str(run_dir)))
    here = Path.cwd()
    return str((Path.home() if _PACKAGES in here.parts else here) / str(run_dir).removeprefix("file://"))


def join(run_dir: str | Path, name: str) -> str:
    """The place `name` inside a run directory."""
    if not in_bucket(run_dir):
        return str(Path(run_dir) / name)
    uri = Uri.parse(str(run_dir))
    return str(replace(uri, path=f"{uri.path}/{name}"))


def last_name(run_dir: str | Path) -> str:
    """What a run directory is called: the last part of its path."""
    return Uri.parse(str(run_dir)).path.rpartition("/")[2] if in_bucket(run_dir) else Path(run_dir).name


def plain(run_dir: str | Path) -> str:
    """Without whose turn it is: what people are shown, and what a config keeps."""
    return str(replace(Uri.parse(str(run_dir)), turn="")) if in_bucket(run_dir) else str(run_dir)


def local_only(path: str | Path | None, setting: str) -> None:
    """Raise `ConfigError` if `setting` names a place in a bucket, where only runs themselves are written."""
    if path is not None and in_bucket(path):
        raise ConfigError(
            f"{setting}={plain(path)!r} must be a local path: a bucket can hold a run, and a run that is there can be "
            "read by every command, but what is written here is files. Name a folder, and copy it to the bucket with "
            "your store's own tools."
        )


def ray_storage(path: str | Path) -> dict[str, Any]:
    """`path` as Ray Train's settings name it: `storage_path`, and a file system where it is in a bucket."""
    if not in_bucket(path):
        return {"storage_path": str(path)}
    uri = Uri.parse(str(path))
    return {"storage_path": uri.root, "storage_filesystem": uri.filesystem()}
