"""A tuned example as a Ray job: submitted to a cluster that runs already, with a token, as a user would do it."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from rayalign.runs.result import Result
from rayalign.system.cache import cache_root

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
def head(tmp_path):
    """A head node of its own, which asks for a token; yields the environment and the address of its dashboard."""
    port, dashboard, client, agent = free_ports(4)  # the usual ones belong to a cluster that may run already
    folder = tempfile.mkdtemp(prefix="ray-")  # short: the path of a socket has 107 characters at most
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path / "home")}
    environment.setdefault("RAYALIGN_CACHE", str(cache_root()))  # else it is below the home
    environment.pop("RAY_ADDRESS", None)
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}"]
    with (Path(folder) / "start.log").open("w") as log:
        node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield environment, f"http://127.0.0.1:{dashboard}"
    finally:
        everybody = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in everybody:  # asked to end, a node first waits half a minute for its own
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everybody, timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


def submit(environment, address, arguments, timeout_s=90):
    """`ray job submit`, again while the new cluster has no dashboard yet, or no agent that takes jobs."""
    command = [str(part) for part in (RAY, "job", "submit", f"--address={address}", *arguments)]
    deadline = time.monotonic() + timeout_s
    while True:
        job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        early = "No available agent" in job.stderr or "Failed to connect" in job.stderr
        if not early or time.monotonic() > deadline:
            return job
        time.sleep(1)


@pytest.mark.timeout(300)
def test_a_tuned_example_runs_as_a_ray_job(head, tmp_path):
    environment, address = head
    shutil.copytree(ROOT / "tuned_examples", tmp_path / "work" / "tuned_examples")
    arguments = ["--working-dir", tmp_path / "work", "--", sys.executable, "tuned_examples/passive_tinyworld.py"]
    arguments += ["--budget", "48"]
    arguments += ["--set", "evaluation.num_prompts=20", "--set", "loop.batch_size=16"]
    job = submit(environment, address, arguments)
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-1000:]
    assert "succeeded" in job.stdout
    (run_dir,) = (tmp_path / "home" / "runs").iterdir()  # not in Ray's copy of the working directory, which goes
    assert f"rayalign/TinyWorld-v0: {run_dir}" in job.stdout
    assert Result.load(run_dir).labels_spent == 48
