"""Ray Serve's applications, whatever they serve: start Serve, wait until one runs, stop one.

Statuses come from Serve's controller as `serve.run` asks for them. `serve.status` tells more than is needed here, and
each call of it costs some tenths of a second of CPU time.
"""

from __future__ import annotations

import time
from typing import Any

POLL_S = 0.1
QUIET = {"runtime_env": {"env_vars": {"RAY_SERVE_LOG_TO_STDERR": "0"}}}  # Serve's log files have everything


class ServeElsewhereError(Exception):
    """Serve's HTTP is not, and can't be, where it is wanted; the text says why."""


class StartError(Exception):
    """Serve gave an application up; the text is what Serve says of it."""


def start_serve() -> None:
    """Serve itself, where it does not run yet. Without proxies it opens no port, so that clusters don't collide."""
    from ray import serve

    for attempt in range(3):
        try:
            serve.start(proxy_location="Disabled", controller_options=QUIET)
            return
        except ValueError:  # another run of this cluster was faster
            if attempt == 2:
                raise
            time.sleep(1.0)


def start_serve_at(host: str, port: int, named: str = "") -> None:
    """Serve with its HTTP proxy at that address, or `ServeElsewhereError`; `named` says which settings gave it."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, controller_options=QUIET)
        found = serve.context._get_global_client().http_config
    except RayServeException as error:
        raise ServeElsewhereError(f"can't be served at {host}:{port}{named}: {error}") from error
    if (found.host, found.port) != (host, port) or not serve.status().proxies:
        raise ServeElsewhereError(
            f"can't be served at {host}:{port}{named}: Ray Serve runs on this cluster already, and not with HTTP at "
            "that address, which can't be changed while it runs. Name the one where it listens, stop it (`serve "
            "shutdown`), or use another cluster."
        )


def wait_until_running(name: str, deadline: float) -> None:
    """Wait for the application `name`, until `deadline` (of `time.monotonic`).

    Raises `StartError`, and `TimeoutError` with what Serve says of it.
    """
    from ray.serve.schema import ApplicationStatus

    message = "not deployed yet"
    while time.monotonic() < deadline:
        if (controller := _controller()) is not None:
            overview = controller.get_serve_status(name)
            status = overview.app_status
            if status.status == ApplicationStatus.RUNNING:
                return
            details = [deployment.message for deployment in overview.deployment_statuses if deployment.message]
            message = "\n".join(details) or status.message or status.status.value
            if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise StartError(message)
        time.sleep(POLL_S)
    raise TimeoutError(message)


def is_there(name: str) -> bool:
    """Whether an application of that name runs, starts or stops."""
    return name in _names()


def stop_application(name: str, *, stop_serve: bool = True) -> None:
    """Stop the application `name`, and Serve itself if nothing else runs on it; does nothing if neither runs.

    Where `ray.shutdown` follows and ends the cluster anyway, `stop_serve=False` saves the time.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    if is_there(name):
        serve.delete(name)
    if stop_serve and not _names():
        serve.shutdown()


def last_line(text: str) -> str:
    """Where a traceback says what went wrong."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _controller() -> Any:
    """Serve's own client of its controller; None where Serve does not run."""
    from ray import serve

    return serve.context._get_global_client(raise_if_no_controller_running=False)


def _names() -> list[str]:
    controller = _controller()
    return [] if controller is None else [overview.name for overview in controller.list_serve_statuses()]
