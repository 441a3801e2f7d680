"""A run in a bucket whose machine is lost goes on on an empty one, with the ledger of an undisturbed run."""

import os
import subprocess
import sys
import time

import pytest
from s3_server import bucket_of
from whole_runs import SMALL, contents, kill_driver, start_driver

from rayalign.ledger.ledger import fold
from rayalign.report.report import write_report
from rayalign.runs.result import Result
from rayalign.storage import fetched
from rayalign.storage.log import recorded
from rayalign.storage.objects import Bucket

SETTINGS = {"budget": 24, "seed": 3, **SMALL, "logging.report": True}


@pytest.fixture
def uri(tmp_path):
    with bucket_of(tmp_path / "first machine") as uri:
        yield uri


def labels(bucket: Bucket) -> int:
    """Labels in the bucket's ledger."""
    import pyarrow as pa

    data = recorded(bucket, "ledger.arrow")
    return fold(pa.ipc.open_stream(data)).spent if data else 0


@pytest.mark.timeout(900)
def test_a_run_in_a_bucket_loses_its_machine_and_no_label(small_run, uri, tmp_path, monkeypatch):
    undisturbed = contents(small_run(budget=SETTINGS["budget"]).path)
    bucket = Bucket(uri)
    with (tmp_path / "shown").open("w") as shown:
        driver = start_driver(tmp_path / "driver.py", "passive", shown, run_dir=uri, **SETTINGS)
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and driver.poll() is None and labels(bucket) < 8:
            time.sleep(0.2)
        kill_driver(driver)
        bought = contents(fetched(uri))
        assert 8 <= len(bought) < SETTINGS["budget"]
        assert bought == undisturbed[: len(bought)]

        empty = {**os.environ, "RAYALIGN_CACHE": str(tmp_path / "second machine")}
        command = [sys.executable, "-m", "rayalign.cli", "resume", uri]
        subprocess.run(command, env=empty, stdout=shown, stderr=shown, check=True, timeout=400)
    result = Result.load(uri)
    assert contents(result.path) == undisturbed
    assert result.labels_spent == SETTINGS["budget"]
    assert (result.checkpoint / "model.safetensors").is_file()

    monkeypatch.setenv("RAYALIGN_CACHE", str(tmp_path / "third machine"))
    bucket.delete(["report.html"])
    write_report([uri])
    everything = b"".join(bucket.get(name) or b"" for name in bucket.names(""))
    assert b"<html" in (bucket.get("report.html") or b"")
    assert b"a-secret-of-somebody" not in everything + (tmp_path / "shown").read_bytes()
