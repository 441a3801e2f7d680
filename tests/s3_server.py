"""A local server that speaks S3's language, and the environment of a machine that uses it."""

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NUMBERS = itertools.count()
"""All servers of a process hold the same buckets."""


@contextmanager
def bucket_of(cache) -> Iterator[str]:
    """The URI of an empty folder in a bucket, for this process, its children, and their cache in `cache`."""
    import pyarrow.fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    at = "{}:{}".format(*server.get_host_and_port())
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in {
                "AWS_ACCESS_KEY_ID": "somebody",
                "AWS_SECRET_ACCESS_KEY": "a-secret-of-somebody",
                "AWS_EC2_METADATA_DISABLED": "true",
                "RAYALIGN_CACHE": str(cache),
            }.items():
                environment.setenv(name, value)
            pyarrow.fs.S3FileSystem(endpoint_override=at, scheme="http", allow_bucket_creation=True).create_dir("runs")
            yield f"s3://runs/{next(NUMBERS)}/first?endpoint_override={at}&scheme=http"
    finally:
        server.stop()
