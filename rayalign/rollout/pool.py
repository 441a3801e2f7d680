r"""The rollout pool: engines in Ray actors, work handed to whichever is free, and the weights they run.

                      chunks of prompts                      weights, version v
    caller --> generate -----------------> replica 0 (free)  <---------------- sync <-- caller
                  ^      \---------------> replica 1 (busy)   read back: (version, checksum)
                  |                        replica 2 (dead) -> new one: start, load current weights, then work
                  +---- candidates, in prompt order

One request at a time: `sync` waits for a running `generate` and the other way round, so that a request is answered
by one version of the weights. What is sampled for a prompt depends on (seed, position of the prompt), not on the
replica; a chunk that is redone comes out the same.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as ray_errors

from rayalign.errors import ConfigError, RayalignError, ResourceError, RolloutError, WaitError, WeightSyncError
from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.engine import Engine, Sampling
from rayalign.rollout.native_transfer import ReplicaClient
from rayalign.rollout.replica import Replica, engine_environment, engine_name, make_engine
from rayalign.rollout.weights import Weights
from rayalign.types import Candidate, Prompt

log = logging.getLogger(__name__)

_DEATHS = (
    ray_errors.RayActorError,
    ray_errors.OutOfMemoryError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
)
"""What a call raises when its actor, and not its code, failed."""
_FETCH_TIMEOUT_S = 60.0
"""Longest fetch of a result that is already there."""


@dataclass(eq=False)
class _Slot:
    """A place in the pool, and the actor that holds it now."""

    index: int
    actor: Any = None
    name: str = ""
    generation: int = 0
    starting: Any = None
    """Reference of the running `start` call; None once the replica has answered it."""
    starting_since: float = 0.0


@dataclass
class _Totals:
    tokens: int = 0
    responses: int = 0
    seconds: float = 0.0
    syncs: int = 0
    sync_seconds: float = 0.0
    restarts: int = 0


class RolloutPool:
    """`num_replicas` engines behind one `generate`. With `num_replicas=0` one engine inside this process, no Ray."""

    def __init__(
        self,
        config: RolloutConfig,
        policy_dir: str | Path,
        *,
        name: str = "rollout",
        actor_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts all replicas and waits for them.

        `actor_options` are added to the actors' Ray options (a scheduling strategy, say). Raises `ResourceError` if
        the cluster is too small, `WaitError` if a replica is not ready in `start_timeout_s`, and what the engine
        raises where the policy can't be loaded.
        """
        self.config, self.policy_dir, self.name = config, str(policy_dir), name
        self._options = dict(actor_options or {})
        self._weights: Weights | None = None
        self._ref: Any = None
        self._closed = False
        self._lock = threading.Lock()
        self._totals = _Totals()
        self._local: Engine | None = None
        self._slots: list[_Slot] = []
        engine_name(config)  # an engine that is not installed is an error here, not in an actor
        if config.num_replicas == 0:
            for key, value in engine_environment(config).items():
                os.environ.setdefault(key, value)
            self._local = make_engine(config, policy_dir)
            return
        self._check_resources()
        self._slots = [_Slot(index) for index in range(config.num_replicas)]
        try:
            for slot in self._slots:
                self._launch(slot)
            for slot in self._slots:
                self._wait_until_started(slot)
        except BaseException:
            self.close()
            raise

    # -- what the loop uses --------------------------------------------------------------------------------------
    @property
    def version(self) -> int:
        """Weights version that every replica runs; 0 is the initial policy."""
        return self._weights.version if self._weights is not None else 0

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, timeout_s: float | None = None
    ) -> list[list[Candidate]]:
        """`sampling.n` candidates for each prompt, in prompt order, all sampled by weights version `version`.

        Raises `WaitError` after `timeout_s` (default: never; each chunk has `request_timeout_s`), `RolloutError`
        if replicas keep dying, and what the engine raises where a prompt can't be used.
        """
        with self._exclusive("generate"):
            began = time.monotonic()
            if self._local is not None:
                groups = self._local.generate(prompts, sampling, seed)
            else:
                groups = _Request(self, prompts, sampling, seed, timeout_s).run()
            for prompt, group in zip(prompts, groups, strict=True):
                for candidate in group:
                    if candidate.policy_version != self.version:
                        raise WeightSyncError(
                            f"pool {self.name!r}: prompt {prompt.id!r} was answered by weights version "
                            f"{candidate.policy_version} instead of {self.version}."
                        )
            self._totals.seconds += time.monotonic() - began
            self._totals.responses += sum(map(len, groups))
            self._totals.tokens += sum(len(candidate.token_ids) for group in groups for candidate in group)
            return groups

    def sync(self, weights: Weights) -> None:
        """Have every replica run `weights`, and check the version and checksum that each reads back.

        Raises `WeightSyncError` naming the replica and the version, or `WaitError` after `sync_timeout_s`; the pool
        then still counts as running the old version, and restarts replicas that do not before it samples again.
        """
        self._renew(weights, "load")

    def confirm(self, weights: Weights) -> None:
        """Like `sync`, for weights that have reached the engines by `native_client` already: only read them back."""
        self._renew(weights, "adopt")

    def native_client(self) -> ReplicaClient:
        """What vLLM's trainer-side transfer engines talk to; good until a replica is replaced."""
        actors = [(slot.actor, slot.name) for slot in self._slots if slot.actor is not None]
        ranks = self.config.vllm.tensor_parallel
        return ReplicaClient([a for a, _ in actors], [n for _, n in actors], ranks, self.config.sync_timeout_s)

    def _renew(self, weights: Weights, how: str) -> None:
        with self._exclusive("sync"):
            began = time.monotonic()
            if self._local is not None:
                if how != "load":
                    raise ConfigError(
                        "native weight transfer goes to replicas, but rollout.num_replicas=0; use `sync`."
                    )
                found = self._local.load(weights)
                self._verify(f"{self.name}-0", weights, (self._local.version, found))
                self._weights = weights
            else:
                # Owned by this process, not by the learner: a replacement can be given it when the learner is gone.
                ref = ray.put(weights)
                self._sync_replicas(weights, ref, how)
                self._weights, self._ref = weights, ref
            self._totals.syncs += 1
            self._totals.sync_seconds += time.monotonic() - began

    def sleep(self) -> None:
        """Have every engine give its device memory back (collocated learners)."""
        self._on_all("sleep", lambda engine: engine.sleep())

    def wake(self) -> None:
        """Undo `sleep`."""
        self._on_all("wake", lambda engine: engine.wake())

    def ping(self, timeout_s: float = 10.0) -> list[dict[str, str | int] | None]:
        """For each replica its name, host and process, or None if it does not answer in time."""
        refs = [slot.actor.ping.remote() for slot in self._slots if slot.actor is not None]
        ready = set(ray.wait(refs, num_returns=len(refs), timeout=timeout_s)[0]) if refs else set()
        answers: list[dict[str, str | int] | None] = []
        for ref in refs:
            try:
                answers.append(ray.get(ref, timeout=_FETCH_TIMEOUT_S) if ref in ready else None)
            except _DEATHS:
                answers.append(None)
        return answers

    def stats(self) -> dict[str, float]:
        """Totals since the start: tokens, responses, seconds sampling, syncs, seconds syncing, replicas replaced."""
        totals = self._totals
        return {
            "tokens": totals.tokens,
            "responses": totals.responses,
            "seconds": totals.seconds,
            "tokens_per_second": totals.tokens / totals.seconds if totals.seconds else 0.0,
            "syncs": totals.syncs,
            "sync_seconds": totals.sync_seconds,
            "restarts": totals.restarts,
        }

    def close(self) -> None:
        """Kill the replicas. Idempotent; a running request fails."""
        self._closed = True
        for slot in self._slots:
            self._kill(slot)
        self._local = None

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- replicas ------------------------------------------------------------------------------------------------
    @contextmanager
    def _exclusive(self, what: str) -> Iterator[None]:
        """One request at a time, within the time that the other one may take."""
        limit = self.config.request_timeout_s * (self.config.max_restarts + 1) + self.config.sync_timeout_s
        if not self._lock.acquire(timeout=limit):
            raise WaitError(f"pool {self.name!r}: {what} waited {limit:g} s for the request before it.")
        try:
            if self._closed:
                raise RolloutError(f"pool {self.name!r} is closed; {what} needs an open one.")
            yield
        finally:
            self._lock.release()

    def _check_resources(self) -> None:
        have, config = ray.cluster_resources(), self.config
        for kind, each in (("CPU", config.cpus_per_replica), ("GPU", config.gpus_per_replica)):
            asked = each * config.num_replicas
            if asked > have.get(kind, 0.0) + 1e-9:
                raise ResourceError(
                    f"pool {self.name!r} asks for {config.num_replicas} x {each:g} {kind}, but the cluster has "
                    f"{have.get(kind, 0.0):g}. Lower rollout.num_replicas or rollout.{kind.lower()}s_per_replica."
                )

    def _launch(self, slot: _Slot, ref: Any = None) -> None:
        """Begin to start a fresh replica with the weights behind `ref` (default: the current ones)."""
        self._kill(slot)
        slot.generation += 1
        slot.name = f"{self.name}-{slot.index}" + (f" (restart {slot.generation - 1})" if slot.generation > 1 else "")
        options = {
            "num_cpus": self.config.cpus_per_replica,
            "num_gpus": self.config.gpus_per_replica * self.config.vllm.tensor_parallel,
            "max_restarts": 0,  # a restart must be given the current weights first: `_launch` does that
            "max_task_retries": 0,
            "runtime_env": {"env_vars": engine_environment(self.config)},
        }
        remote = ray.remote(concurrency_groups={"health": 1})(Replica)
        slot.actor = remote.options(**(options | self._options)).remote(slot.name)
        slot.starting = slot.actor.start.remote(self.config, self.policy_dir, self._ref if ref is None else ref)
        slot.starting_since = time.monotonic()

    def _wait_until_started(self, slot: _Slot) -> None:
        left = slot.starting_since + self.config.start_timeout_s - time.monotonic()
        if not ray.wait([slot.starting], timeout=max(0.0, left))[0]:
            raise self._late_start(slot)
        self._started(slot, self._weights)

    def _started(self, slot: _Slot, weights: Weights | None) -> None:
        """Take the answer of a finished `start`. Raises `RolloutError` if the replica died of it."""
        ref, slot.starting = slot.starting, None
        try:
            answer = _fetch(ref)
        except _DEATHS as error:
            self._kill(slot)
            raise RolloutError(f"replica {slot.name} died while it was starting: {_first_line(error)}") from error
        except BaseException:
            self._kill(slot)
            raise
        try:
            self._verify(slot.name, weights, answer)
        except WeightSyncError:
            self._kill(slot)
            raise

    def _late_start(self, slot: _Slot) -> WaitError:
        free = {kind: round(n, 2) for kind, n in ray.available_resources().items() if kind in ("CPU", "GPU")}
        self._kill(slot)
        return WaitError(
            f"replica {slot.name} was not ready after rollout.start_timeout_s={self.config.start_timeout_s:g}: "
            f"it waits for {self.config.cpus_per_replica:g} CPU and {self.config.gpus_per_replica:g} GPU "
            f"(free now: {free}), or the model is slow to load. Lower what it asks for, or raise the limit."
        )

    def _kill(self, slot: _Slot) -> None:
        if slot.actor is not None:
            try:
                ray.kill(slot.actor)
            except Exception as error:  # Ray is shut down already: nothing is left to kill
                log.debug("killing %s: %s", slot.name, error)
        slot.actor = slot.starting = None

    def _verify(self, replica: str, weights: Weights | None, answer: tuple[int, str]) -> None:
        version, found = answer
        wanted, checksum = (0, "") if weights is None else (weights.version, weights.checksum)
        if version != wanted or found != checksum:
            raise WeightSyncError(
                f"replica {replica} was sent weights version {wanted} with checksum {checksum}, but reads back version "
                f"{version} with checksum {found}. It is not used; publish the weights again."
            )

    # -- weights -------------------------------------------------------------------------------------------------
    def _sync_replicas(self, weights: Weights, ref: Any, how: str) -> None:
        """All replicas run `weights` when this returns; those that do not are dead when it raises."""
        deadline = time.monotonic() + self.config.sync_timeout_s
        restarts = 0
        jobs: dict[Any, _Slot] = {}

        def begin(slot: _Slot) -> None:
            if slot.actor is None or slot.starting is not None:  # a replica that only starts gets them at once
                self._launch(slot, ref)
                jobs[slot.starting] = slot
            else:
                jobs[getattr(slot.actor, how).remote(ref)] = slot

        for slot in self._slots:
            begin(slot)
        try:
            while jobs:
                ready, _ = ray.wait(list(jobs), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    names = ", ".join(sorted(slot.name for slot in jobs.values()))
                    raise WaitError(
                        f"replica {names} did not load weights version {weights.version} within "
                        f"rollout.sync_timeout_s={self.config.sync_timeout_s:g}."
                    )
                slot = jobs[ready[0]]
                try:
                    answer = _fetch(ready[0])
                    self._verify(slot.name, weights, answer)
                    slot.starting = None
                    del jobs[ready[0]]
                except _DEATHS as error:
                    del jobs[ready[0]]
                    self._kill(slot)
                    restarts += 1
                    if restarts > self.config.max_restarts:
                        raise WeightSyncError(
                            f"replica {slot.name} died while it loaded weights version {weights.version}, after "
                            f"{restarts - 1} restarts: {_first_line(error)}"
                        ) from error
                    self._totals.restarts += 1
                    log.warning(
                        "replica %s died during the sync of version %d; starting another", slot.name, weights.version
                    )
                    begin(slot)
        except BaseException:
            # Who has answered runs the new version, who has not runs nobody knows what: all start afresh with the old.
            for slot in self._slots:
                self._kill(slot)
            raise

    def _on_all(self, what: str, local: Callable[[Engine], None]) -> None:
        with self._exclusive(what):
            if self._local is not None:
                local(self._local)
                return
            refs = {getattr(slot.actor, what).remote(): slot for slot in self._slots if slot.actor is not None}
            late = ray.wait(list(refs), num_returns=len(refs), timeout=self.config.sync_timeout_s)[1] if refs else []
            if late:
                names = ", ".join(refs[ref].name for ref in late)
                raise WaitError(f"replica {names}: {what} took more than {self.config.sync_timeout_s:g} s.")
            for ref, slot in refs.items():
                try:
                    _fetch(ref)
                except _DEATHS:
                    self._kill(slot)  # replaced, awake, at the next request


class _Request:
    """One `generate` call: which chunk is where, until all are back."""

    def __init__(
        self, pool: RolloutPool, prompts: Sequence[Prompt], sampling: Sampling, seed: int, timeout_s: float | None
    ) -> None:
        self.pool, self.sampling, self.seed = pool, sampling, seed
        # What a person or a judge reads of a prompt need not travel to the engine.
        self.prompts = [Prompt(id=prompt.id, text="", token_ids=prompt.token_ids) for prompt in prompts]
        self.chunks = cut(len(prompts), pool.config.chunk_prompts, pool.config.num_replicas)
        self.todo = deque(range(len(self.chunks)))
        self.done: dict[int, list[list[Candidate]]] = {}
        self.running: dict[Any, tuple[_Slot, int, float]] = {}
        self.deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self.timeout_s, self.restarts = timeout_s, 0

    def run(self) -> list[list[Candidate]]:
        """Candidates in prompt order."""
        for slot in self.pool._slots:
            if slot.actor is None:
                self._relaunch(slot, "it was lost before this request", counted=False)
        while len(self.done) < len(self.chunks):
            self._hand_out()
            self._wait()
        return [group for index in range(len(self.chunks)) for group in self.done[index]]

    def _hand_out(self) -> None:
        busy = {slot.index for slot, _, _ in self.running.values()}
        for slot in self.pool._slots:
            if self.todo and slot.starting is None and slot.index not in busy:
                chunk = self.todo.popleft()
                positions = self.chunks[chunk]
                ref = slot.actor.generate.remote(
                    [self.prompts[i] for i in positions], self.sampling, self.seed, list(positions)
                )
                self.running[ref] = (slot, chunk, time.monotonic())

    def _wait(self) -> None:
        """Until one chunk is back, one replica has started, or one of them has taken too long."""
        config, now = self.pool.config, time.monotonic()
        starting = {slot.starting: slot for slot in self.pool._slots if slot.starting is not None}
        limits = [began + config.request_timeout_s for _, _, began in self.running.values()]
        limits += [slot.starting_since + config.start_timeout_s for slot in starting.values()]
        wait_s = max(0.0, min([*limits, self.deadline]) - now)
        ready, _ = ray.wait([*self.running, *starting], num_returns=1, timeout=wait_s)
        for ref in ready:
            if ref in starting:
                self._take_start(starting[ref])
            else:
                self._take_chunk(ref)
        if not ready:
            self._expire(starting.values())

    def _take_start(self, slot: _Slot) -> None:
        try:
            self.pool._started(slot, self.pool._weights)
        except RolloutError as error:
            self._relaunch(slot, str(error))

    def _take_chunk(self, ref: Any) -> None:
        slot, chunk, _ = self.running.pop(ref)
        try:
            self.done[chunk] = _fetch(ref)
        except _DEATHS as error:
            self.todo.appendleft(chunk)
            self._relaunch(slot, _first_line(error))

    def _expire(self, starting: Any) -> None:
        now, config = time.monotonic(), self.pool.config
        if now >= self.deadline:
            names = ", ".join(slot.name for slot, _, _ in self.running.values()) or "replicas to start"
            raise WaitError(
                f"pool {self.pool.name!r}: {len(self.done)} of {len(self.chunks)} chunks were sampled within "
                f"{self.timeout_s:g} s; still waiting for {names}."
            )
        for slot in starting:
            if now >= slot.starting_since + config.start_timeout_s:
                raise self.pool._late_start(slot)
        for ref, (slot, chunk, began) in list(self.running.items()):
            if now >= began + config.request_timeout_s:
                del self.running[ref]
                self.todo.appendleft(chunk)
                self._relaunch(
                    slot, f"no answer within rollout.request_timeout_s={config.request_timeout_s:g}", late=True
                )

    def _relaunch(self, slot: _Slot, why: str, counted: bool = True, late: bool = False) -> None:
        """Replace a lost replica, unless too many were lost in this request."""
        if counted and self.restarts >= self.pool.config.max_restarts:
            self.pool._kill(slot)
            kind = WaitError if late else RolloutError
            raise kind(
                f"pool {self.pool.name!r}: replica {slot.name} was lost ({why}), and rollout.max_restarts="
                f"{self.pool.config.max_restarts} replicas were replaced in this request already. If it ran out of "
                "memory, lower rollout.max_batch_tokens, rollout.chunk_prompts or rollout.max_tokens."
            )
        log.warning("replica %s was lost (%s); starting another", slot.name, why)
        self.restarts += counted
        self.pool._totals.restarts += 1
        self.pool._launch(slot)


def cut(num_prompts: int, chunk_prompts: int, num_replicas: int) -> list[range]:
    """Positions of each chunk's prompts. Depends on the settings alone, never on who is free.

    >>> cut(5, 0, 1), cut(5, 2, 1)
    ([range(0, 5)], [range(0, 2), range(2, 4), range(4, 5)])
    """
    if not chunk_prompts:
        chunk_prompts = num_prompts if num_replicas <= 1 else -(-num_prompts // (2 * num_replicas))
    return [range(i, min(i + chunk_prompts, num_prompts)) for i in range(0, num_prompts, max(1, chunk_prompts))]


def _fetch(ref: Any) -> Any:
    """The result of a finished call; our own errors come out as they were raised."""
    try:
        return ray.get(ref, timeout=_FETCH_TIMEOUT_S)
    except ray_errors.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayalignError):
            raise cause from None
        raise
    except ray_errors.GetTimeoutError as error:
        raise WaitError(f"a result that is ready was not fetched within {_FETCH_TIMEOUT_S:g} s.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
