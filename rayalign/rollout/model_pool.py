r"""A pool of models: engines or scorers in Ray actors, work handed to whichever is free, and the weights they run.

                      chunks of prompts                      weights, version v
    caller --> map ----------------------> replica 0 (free)  <---------------- sync <-- caller
                  ^      \---------------> replica 1 (busy)   read back: (version, checksum)
                  |                        replica 2 (dead) -> new one: start, load current weights, then work
                  +---- answers, in prompt order

One request at a time: `sync` waits for a running `map` and the other way round, so that a request is answered by one
version of the weights. What a model answers depends on its arguments and weights alone, not on the replica; a chunk
that is redone comes out the same.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray import exceptions as ray_errors

from rayalign.errors import RayalignError, ResourceError, RolloutError, WaitError, WeightSyncError
from rayalign.rollout.config import PoolConfig
from rayalign.rollout.engine import Model
from rayalign.rollout.replica import Make, Replica
from rayalign.rollout.weights import Weights
from rayalign.types import Prompt

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
class Totals:
    """What a pool has done since its start."""

    seconds: float = 0.0
    """In `map`."""
    syncs: int = 0
    sync_seconds: float = 0.0
    restarts: int = 0


class ModelPool:
    """`num_replicas` models behind one `map`. With `num_replicas=0` one model inside this process, no Ray."""

    def __init__(
        self,
        make: Make,
        config: PoolConfig,
        policy_dir: str | Path,
        *,
        name: str,
        actor_options: Mapping[str, Any] | None = None,
        wait: bool = True,
    ) -> None:
        """Starts all replicas and waits for them, now or (`wait=False`) when the pool is first used.

        `make(config, policy_dir)` gives a model; `actor_options` are added to the actors' Ray options (a scheduling
        strategy, say). Raises `ResourceError` if the cluster is too small, `WaitError` if a replica is not ready in
        `start_timeout_s`, and what `make` raises where the policy can't be loaded; the last two where it waits.
        """
        self.make, self.config, self.policy_dir, self.name = make, config, str(policy_dir), name
        self._options = dict(actor_options or {})
        self._weights: Weights | None = None
        self._ref: Any = None
        self._closed = False
        self._lock = threading.Lock()
        self._totals = Totals()
        self._local: Model | None = None
        self._waited = True
        self._slots: list[_Slot] = []
        if config.num_replicas == 0:
            for key, value in config.environment().items():
                os.environ.setdefault(key, value)
            self._local = make(config, self.policy_dir)
            return
        self._check_resources()
        self._slots = [_Slot(index) for index in range(config.num_replicas)]
        self._waited = False
        try:
            for slot in self._slots:
                self._launch(slot)
        except BaseException:
            self.close()
            raise
        if wait:
            self.wait_until_started()

    # -- what the loop uses --------------------------------------------------------------------------------------
    def wait_until_started(self) -> None:
        """Wait for the replicas' first start. Raises what the constructor says; the pool is closed then."""
        with self._exclusive("start"):
            pass

    @property
    def version(self) -> int:
        """Weights version that every replica runs; 0 is the initial policy."""
        return self._weights.version if self._weights is not None else 0

    def map(
        self,
        method: str,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]],
        arguments: Mapping[str, Any],
        timeout_s: float | None = None,
    ) -> list[Any]:
        """`model.method(prompts, **columns, **arguments)`, a list with an answer per prompt, cut into chunks.

        `columns` have an entry per prompt and are cut with them; `arguments` go to every chunk. Raises `WaitError`
        after `timeout_s` (default: never; each chunk has `request_timeout_s`), `RolloutError` if replicas keep dying,
        and what the model raises where a prompt can't be used.
        """
        with self._exclusive(method):
            began = time.monotonic()
            if self._local is not None:
                answers = getattr(self._local, method)(prompts, **columns, **arguments)
            else:
                answers = _Request(self, method, prompts, columns, arguments, timeout_s).run()
            self._totals.seconds += time.monotonic() - began
            return answers

    def sync(self, weights: Weights) -> None:
        """Have every replica run `weights`, and check the version and checksum that each reads back.

        Raises `WeightSyncError` naming the replica and the version, or `WaitError` after `sync_timeout_s`; the pool
        then still counts as running the old version, and restarts replicas that do not before it samples again.
        """
        self._renew(weights, "load")

    def _renew(self, weights: Weights, how: str) -> None:
        with self._exclusive("sync"):
            began = time.monotonic()
            if self._local is not None:
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
        """Have every model give its device memory back (collocated learners)."""
        self._on_all("sleep", lambda model: model.sleep())

    def wake(self) -> None:
        """Undo `sleep`."""
        self._on_all("wake", lambda model: model.wake())

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
        """Totals since the start: seconds at work, syncs, seconds syncing, replicas replaced."""
        return dataclasses.asdict(self._totals)

    def close(self) -> None:
        """Kill the replicas. Idempotent; a running request fails."""
        self._closed = True
        for slot in self._slots:
            self._kill(slot)
        self._local = None

    def __enter__(self) -> Self:
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
            self._finish_start()
            yield
        finally:
            self._lock.release()

    def _finish_start(self) -> None:
        if self._waited:
            return
        try:
            for slot in self._slots:
                self._wait_until_started(slot)
        except BaseException:
            self.close()
            raise
        self._waited = True

    def _check_resources(self) -> None:
        have, config, section = ray.cluster_resources(), self.config, self.config.section
        for kind, each in (("CPU", config.cpus_per_replica), ("GPU", config.gpus_per_replica)):
            asked = each * config.num_replicas
            if asked > have.get(kind, 0.0) + 1e-9:
                raise ResourceError(
                    f"pool {self.name!r} asks for {config.num_replicas} x {each:g} {kind}, but the cluster has "
                    f"{have.get(kind, 0.0):g}. Lower {section}.num_replicas or {section}.{kind.lower()}s_per_replica."
                )

    def _launch(self, slot: _Slot, ref: Any = None) -> None:
        """Begin to start a fresh replica with the weights behind `ref` (default: the current ones)."""
        self._kill(slot)
        slot.generation += 1
        slot.name = f"{self.name}-{slot.index}" + (f" (restart {slot.generation - 1})" if slot.generation > 1 else "")
        options = {
            "num_cpus": self.config.cpus_per_replica,
            "num_gpus": self.config.gpus_of_replica,
            "label_selector": self.config.nodes,
            "max_restarts": 0,  # a restart must be given the current weights first: `_launch` does that
            "max_task_retries": 0,
            "runtime_env": {"env_vars": self.config.environment()},
        }
        remote = ray.remote(concurrency_groups={"health": 1})(Replica)
        slot.actor = remote.options(**(options | self._options)).remote(slot.name)
        weights = self._ref if ref is None else ref
        slot.starting = slot.actor.start.remote(self.make, self.config, self.policy_dir, weights)
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
        config = self.config
        free = {kind: round(n, 2) for kind, n in ray.available_resources().items() if kind in ("CPU", "GPU")}
        where = f" on a node with {config.nodes}" if config.nodes else ""
        self._kill(slot)
        return WaitError(
            f"replica {slot.name} was not ready after {config.section}.start_timeout_s={config.start_timeout_s:g}: "
            f"it waits for {config.cpus_per_replica:g} CPU and {config.gpus_per_replica:g} GPU{where} "
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
                        f"{self.config.section}.sync_timeout_s={self.config.sync_timeout_s:g}."
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

    def _on_all(self, what: str, local: Callable[[Model], None]) -> None:
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
    """One `map` call: which chunk is where, until all are back."""

    def __init__(
        self,
        pool: ModelPool,
        method: str,
        prompts: Sequence[Prompt],
        columns: Mapping[str, Sequence[Any]],
        arguments: Mapping[str, Any],
        timeout_s: float | None,
    ) -> None:
        self.pool, self.method, self.columns = pool, method, columns
        self.arguments = ray.put(dict(arguments))
        # What a person or a judge reads of a prompt need not travel to the model.
        self.prompts = [Prompt(id=prompt.id, text="", token_ids=prompt.token_ids) for prompt in prompts]
        self.chunks = cut(len(prompts), pool.config.chunk_prompts, pool.config.num_replicas)
        self.todo = deque(range(len(self.chunks)))
        self.done: dict[int, list[Any]] = {}
        self.running: dict[Any, tuple[_Slot, int, float]] = {}
        self.deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self.timeout_s, self.restarts = timeout_s, 0

    def run(self) -> list[Any]:
        """Answers in prompt order."""
        for slot in self.pool._slots:
            if slot.actor is None:
                self._relaunch(slot, "it was lost before this request", counted=False)
        while len(self.done) < len(self.chunks):
            self._hand_out()
            self._wait()
        return [answer for index in range(len(self.chunks)) for answer in self.done[index]]

    def _hand_out(self) -> None:
        busy = {slot.index for slot, _, _ in self.running.values()}
        for slot in self.pool._slots:
            if self.todo and slot.starting is None and slot.index not in busy:
                chunk = self.todo.popleft()
                positions = self.chunks[chunk]
                part = {name: [column[i] for i in positions] for name, column in self.columns.items()}
                ref = slot.actor.ask.remote(self.method, [self.prompts[i] for i in positions], part, self.arguments)
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
                f"pool {self.pool.name!r}: {len(self.done)} of {len(self.chunks)} chunks were done within "
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
                    slot, f"no answer within {config.section}.request_timeout_s={config.request_timeout_s:g}", late=True
                )

    def _relaunch(self, slot: _Slot, why: str, counted: bool = True, late: bool = False) -> None:
        """Replace a lost replica, unless too many were lost in this request."""
        if counted and self.restarts >= self.pool.config.max_restarts:
            self.pool._kill(slot)
            kind, section = WaitError if late else RolloutError, self.pool.config.section
            raise kind(
                f"pool {self.pool.name!r}: replica {slot.name} was lost ({why}), and {section}.max_restarts="
                f"{self.pool.config.max_restarts} replicas were replaced in this request already. If it ran out of "
                f"memory, lower {section}.max_batch_tokens, {section}.chunk_prompts or rollout.max_tokens."
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
