"""A tuned example as a Ray job: submitted to a cluster that runs already, with a token, as a user would do it."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rayalign.result import Result

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture
def head():
    """A head node of its own, which asks for a token; yields the environment and the address of its dashboard."""
    port, dashboard, client = free_ports(3)
    folder = tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket has 107 characters at most
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    with (Path(folder) / "start.log").open("w") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield environment, f"http://127.0.0.1:{dashboard}"
    finally:
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def wait_for(environment, address, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        asked = subprocess.run([RAY, "job", "list", f"--address={address}"], env=environment, capture_output=True)
        if asked.returncode == 0:
            return
        time.sleep(1)
    raise TimeoutError(f"no dashboard at {address}: {asked.stderr.decode()[-500:]}")


@pytest.mark.timeout(300)
def test_a_tuned_example_runs_as_a_ray_job(head, tmp_path):
    environment, address = head
    wait_for(environment, address)
    shutil.copytree(ROOT / "tuned_examples", tmp_path / "work" / "tuned_examples")
    command = [RAY, "job", "submit", f"--address={address}", "--working-dir", tmp_path / "work", "--"]
    command += [sys.executable, "tuned_examples/passive_tinyworld.py", "--budget", "48", "--run-dir", tmp_path / "run"]
    command += ["--set", "evaluation.num_prompts=20", "--set", "loop.batch_size=16"]
    job = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-1000:]
    assert "succeeded" in job.stdout
    assert Result.load(tmp_path / "run").labels_spent == 48
