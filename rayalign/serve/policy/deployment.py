"""The endpoint as a Ray Serve application: each replica has an engine, the agent if it picks, and the HTTP app."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from ray import serve

from rayalign.agents.agent import Chooser
from rayalign.errors import ConfigError, ResourceError, RolloutError, WaitError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.replica import make_engine
from rayalign.serve.applications import (
    ServeElsewhereError,
    StartError,
    last_line,
    start_serve_at,
    stop_application,
    wait_until_running,
)
from rayalign.serve.http_guard import HttpGuard
from rayalign.serve.policy.answerer import EngineAnswerer
from rayalign.serve.policy.app import build_app
from rayalign.serve.policy.config import PolicyServerConfig

SPARE_CALLS = 16
"""Requests beyond the guard's limit that Serve hands to a replica, so that it is the guard who refuses them."""


class _PolicyDeployment:
    """One replica. The engine works in a thread of its own while the event loop takes requests."""

    def __init__(
        self,
        config: PolicyServerConfig,
        rollout: RolloutConfig,
        policy: str,
        make_chooser: Callable[[], Chooser] | None = None,
    ) -> None:
        import torch

        torch.set_num_threads(rollout.threads)
        self.config, self.rollout, self.policy = config, rollout, policy
        self.answerer = EngineAnswerer(
            make_engine(rollout, policy),
            best_of=config.best_of,
            chooser=None if make_chooser is None else make_chooser(),
            max_batch=config.max_batch,
            timeout_s=config.request_timeout_s,
        )

    def __serve_build_asgi_app__(self) -> HttpGuard:
        return build_app(self.config, self.rollout, self.policy, self.answerer)

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has failed."""
        self.answerer.check_health()

    def __del__(self) -> None:
        if hasattr(self, "answerer"):
            self.answerer.close()


PolicyDeployment: Any = serve.ingress()(_PolicyDeployment)


def start_policy(
    config: PolicyServerConfig,
    rollout: RolloutConfig,
    policy: str,
    make_chooser: Callable[[], Chooser] | None,
    name: str,
) -> str:
    """Serve the policy in directory `policy` as application `name`, wait until it answers, and return its URL.

    `make_chooser` is called in each replica. Raises `ResourceError` if the cluster is too small, `ConfigError` if
    Serve already listens elsewhere, `RolloutError` if a replica can't be made, and `WaitError` after
    `start_timeout_s`; then nothing is left running. Needs `ray.init`.
    """
    _check_fits(config, rollout)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _start_serve(config)
    deployment = serve.deployment(
        PolicyDeployment,
        name="policy",
        num_replicas=config.num_replicas,
        ray_actor_options={
            "num_cpus": rollout.cpus_per_replica,
            "num_gpus": rollout.gpus_of_replica,
            "runtime_env": {"env_vars": rollout.environment()},
        },
        max_ongoing_requests=config.max_requests + SPARE_CALLS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        max_constructor_retry_count=1,  # a policy that can't be loaded is an error, not something to try again
    )
    target = serve.RunTarget(deployment.bind(config, rollout, policy, make_chooser), name=name, route_prefix="/")
    try:
        serve.run_many([target], wait_for_applications_running=False)
        _wait_until_running(name, config.start_timeout_s)
    except BaseException:
        stop_application(name)
        raise
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}/v1"


def _check_fits(config: PolicyServerConfig, rollout: RolloutConfig) -> None:
    import ray

    have = ray.cluster_resources()
    for kind, each in (("CPU", rollout.cpus_per_replica), ("GPU", rollout.gpus_of_replica)):
        if config.num_replicas * each > have.get(kind, 0.0) + 1e-9:
            raise ResourceError(
                f"{config.num_replicas} replicas with {each:g} {kind}s each (rollout.{kind.lower()}s_per_replica) do "
                f"not fit into the cluster, which has {have.get(kind, 0.0):g}. Lower one of the two, or add nodes."
            )


def _start_serve(config: PolicyServerConfig) -> None:
    """Serve with HTTP at the config's address, or `ConfigError` if it listens elsewhere already."""
    try:
        start_serve_at(config.host, config.port)
    except ServeElsewhereError as error:
        raise ConfigError(f"the policy {error}") from error


def _wait_until_running(name: str, timeout_s: float) -> None:
    try:
        wait_until_running(name, time.monotonic() + timeout_s)
    except StartError as error:
        raise RolloutError(f"the policy can't be served: {last_line(str(error))}") from None
    except TimeoutError as error:
        raise WaitError(
            f"waited {timeout_s:g} s (start_timeout_s) for the policy to be served. Its status: {error}"
        ) from None
