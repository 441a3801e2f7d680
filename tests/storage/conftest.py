"""A folder of its own for each test, in a server that speaks S3's language."""

import itertools
import logging

import pytest

from rayalign.storage import objects, place
from rayalign.storage.objects import Bucket

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def s3():
    """`host:port` of the server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-somebody")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def uri(s3, credentials, tmp_path, monkeypatch):
    """The URI of an empty folder in a bucket."""
    import pyarrow.fs

    pyarrow.fs.S3FileSystem(endpoint_override=s3, scheme="http", allow_bucket_creation=True).create_dir("runs")
    monkeypatch.setattr(objects, "RETRY_AFTER_S", ())
    monkeypatch.setattr(place, "cache_root", lambda: tmp_path / "cache")
    return f"s3://runs/number-{next(NUMBERS)}?endpoint_override={s3}&scheme=http"


@pytest.fixture
def bucket(uri):
    return Bucket(uri)
