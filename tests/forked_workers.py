"""Ray's workers start, in the tests, as forks of one process that has imported torch and the rest already.

A whole run starts eight processes that import the same modules, which is most of its CPU time. Here the *nursery* has
imported them once for all tests, and a fork needs a sixth of that time. Ray starts a worker
with the `py_executable` of its runtime environment; that is this file, which asks the nursery for a fork that goes on
as the worker, and stays until the fork is gone. The workers are what they were: Ray's own, each a process that can be
killed alone.

Before that Ray starts a script that reads the runtime environment, and imports all of Ray for it. Where a test's own
process starts the cluster, this file takes its place, too.

Where a variable that is read on import has another value than in the nursery (`READ_ON_IMPORT`), the worker is a plain
Python. `RAYALIGN_TESTS_FORK=0` makes all of them plain.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SOCKET = "RAYALIGN_TESTS_NURSERY"
PLAIN = "-S -E"
"""Options of a Python that imports nothing by itself."""
PRELOADED = (  # what Ray and rayalign import, but not Ray: its core reads on import whose worker it is
    *("torch.distributed", "torch.export", "torch._dynamo", "torch.nn.parallel"),
    *("transformers.models.llama.modeling_llama", "datasets", "pandas", "pyarrow.dataset", "pyarrow.parquet"),
    *("fastapi", "starlette", "uvicorn", "aiohttp", "grpc", "google.protobuf", "opentelemetry.sdk.metrics"),
    *("prometheus_client", "requests", "jsonschema", "fsspec", "msgpack", "yaml", "gymnasium"),
    "rayalign.rollout.transformers_engine",
)
READ_ON_IMPORT = ("CUDA_", "HF_", "PYTHON", "TORCH_", "TRANSFORMERS_")
CONTEXT = {"--language": "", "--serialized-runtime-env-context": "{}"}
"""What Ray tells its script."""
READ_LATER = ("PYTHONBREAKPOINT",)  # Ray sets it in every worker; it is read when somebody calls breakpoint()


# ==== in whoever calls `ray.init` ====================================================================================
def with_fork(runtime_env):
    """Ray calls this with the runtime environment of every `ray.init` (`RAY_RUNTIME_ENV_HOOK`), before it starts."""
    from ray._private import ray_constants

    ray_constants.SETUP_WORKER_FILENAME = __file__  # which is joined to a folder, so that a whole path replaces it
    return {"py_executable": f"{sys.executable} {PLAIN} {__file__}", **(runtime_env or {})}


@contextlib.contextmanager
def nursery():
    """While this is entered, what calls `ray.init` here and in child processes has forks as its workers."""
    folder = Path(tempfile.mkdtemp(prefix="nursery-"))
    here = str(Path(__file__).parent)
    os.environ |= {
        SOCKET: str(folder / "socket"),
        "RAY_RUNTIME_ENV_HOOK": f"{Path(__file__).stem}.{with_fork.__name__}",
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # what Ray sets in a worker before torch can read it
    process = subprocess.Popen([sys.executable, __file__, "nursery"], stdin=subprocess.PIPE, env=environment)
    try:
        yield
    finally:
        process.stdin.close()  # it leaves
        process.wait(timeout=120)
        shutil.rmtree(folder)


# ==== the nursery ====================================================================================================
def serve():
    """Forks for whoever asks, until standard input is closed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[SOCKET])
        listener.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        for module in PRELOADED:
            importlib.import_module(module)
        gc.freeze()  # what a fork collects is its own
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return None
            caller, _ = listener.accept()
            with caller:
                message, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
                wanted = json.loads(message)
                same = read_on_import(wanted["environment"]) == read_on_import(os.environ)
                caller.sendall(b"y" if same else b"n")
                if same and os.fork() == 0:
                    listener.close()
                    caller.detach()  # open for as long as the fork lives: the caller waits for its end
                    return worker(files, **wanted)
                for file in files:
                    os.close(file)


def read_on_import(environment):
    return {
        key: value for key, value in environment.items() if key.startswith(READ_ON_IMPORT) and key not in READ_LATER
    }


def worker(files, environment, folder, arguments):
    """The life of a fork."""
    import numpy
    import torch

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    numpy.random.seed()
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


# ==== what Ray starts ================================================================================================
def set_up(arguments):
    """As Ray's own script does it, where the runtime environment is one of ours; else that script does it."""
    mine, others = dict(CONTEXT), []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in mine:
            mine[name] = value
        else:
            others.append(argument)
    context = json.loads(mine["--serialized-runtime-env-context"])
    ours = mine["--language"] == "PYTHON" and str(context.get("py_executable")).endswith(f"{PLAIN} {__file__}")
    if not ours or context["command_prefix"] or context["override_worker_entrypoint"]:
        script = str(Path(others[0]).with_name("setup_worker.py"))
        os.execv(sys.executable, [sys.executable, script, *arguments])
    for name, value in context["env_vars"].items():
        os.environ[name] = os.path.expandvars(value)
    ask(others)


def ask(arguments):
    """A fork with these arguments and this process's environment and files; then wait until it is gone."""
    wanted = {"environment": dict(os.environ), "folder": os.getcwd(), "arguments": arguments}
    with contextlib.suppress(OSError, KeyError), socket.socket(socket.AF_UNIX) as nursery:
        nursery.connect(os.environ[SOCKET])
        socket.send_fds(nursery, [json.dumps(wanted).encode()], [0, 1, 2])
        if nursery.recv(1) == b"y":
            nursery.recv(1)
            return
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    if sys.argv[1:] == ["nursery"]:
        serve()
    elif any(argument.startswith("--language=") for argument in sys.argv):
        set_up(sys.argv[1:])
    else:
        ask(sys.argv[1:])
