"""The collector as a Ray actor, and the picklable client through which learner and driver talk to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from rayalign.agents.agent import Agent
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import WaitError
from rayalign.learner.stream import EndOfStream, PleasePublish, Span
from rayalign.loop.collector import Collector
from rayalign.rollout.weights import Weights
from rayalign.runs.config import RunConfig
from rayalign.types import TrainBatch

POLL_S = 10.0
CALL_TIMEOUT_S = 120.0
SAVE_TIMEOUT_S = 1800.0


class CollectorClient:
    """A `BatchSource` over the collector actor. Survives the collector's restarts: it asks again until its timeout."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    @classmethod
    def start(
        cls,
        config: RunConfig,
        world: World,
        agent: Agent,
        oracle: Oracle,
        eval_oracle: Oracle,
        kind: type[Collector] = Collector,
        name: Mapping[str, str] | None = None,
    ) -> CollectorClient:
        """Create the actor. Ray restarts it when it dies; its constructor recovers from the run directory.

        `name` has Ray's `name` and `namespace`, where others have to find it.
        """
        options = actor_options(config) | dict(name or {})
        actor = ray.remote(kind).options(**options).remote(config, world, agent, oracle, eval_oracle)
        return cls(actor)

    def next_batch(self, index: int, timeout_s: float) -> TrainBatch | EndOfStream | PleasePublish:
        """See `learner.stream.BatchSource`."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            reply = self._call("next_batch", left, index, min(POLL_S, left))
            if reply is not None:
                return reply
        raise WaitError(
            f"waited {timeout_s:.0f} s for batch {index} from the collector, which is {self.status()['phase']}. "
            "Look at the collector's log, or raise learner.batch_timeout_s."
        )

    def publish(self, weights: Weights, metrics: Mapping[str, float], spans: Sequence[Span] = ()) -> None:
        """See `learner.stream.BatchSource`. The weights travel through the object store."""
        self._call("publish", CALL_TIMEOUT_S, weights, dict(metrics), list(spans))

    def status(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """The collector's snapshot of itself."""
        return self._call("status", timeout_s)

    def interrupt(self, reason: str, timeout_s: float = 30.0) -> None:
        """See `Collector.interrupt`."""
        self._call("interrupt", timeout_s, reason)

    def save(self) -> None:
        """See `Collector.save`."""
        self._call("save", SAVE_TIMEOUT_S)

    def raise_failure(self) -> None:
        """Raise here what stopped the collector, if anything did."""
        if (error := self._call("failed_with", CALL_TIMEOUT_S)) is not None:
            raise error

    def close(self) -> None:
        """Stop engines and actor."""
        with contextlib.suppress(WaitError, RayActorError):  # it is killed all the same
            self._call("close", 30.0)
        ray.kill(self.actor, no_restart=True)

    def _call(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        """Call the actor; while it is being restarted, ask again until `timeout_s` is over."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(1.0, deadline - time.monotonic())
            try:
                return ray.get(getattr(self.actor, method).remote(*arguments), timeout=left + POLL_S)
            except GetTimeoutError:
                raise WaitError(f"the collector did not answer {method} within {left + POLL_S:.0f} s.") from None
            except (ActorUnavailableError, RayActorError) as error:
                if time.monotonic() > deadline or "creation task" in str(error):
                    raise
                time.sleep(0.5)


def actor_options(config: RunConfig) -> dict[str, Any]:
    """Ray options of an actor that does the collector's work; Ray restarts it however often it dies."""
    threads = config.loop.agent_threads or max(1, round(config.loop.collector_cpus))
    return {
        "num_cpus": config.loop.collector_cpus,
        "num_gpus": config.loop.collector_gpus,
        "label_selector": config.loop.collector_nodes,
        "max_restarts": -1,
        "max_concurrency": 32,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    }
