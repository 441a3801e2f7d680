"""Many runs on one cluster: as many at the same time as fit, each in a placement group of its own.

    jobs --> [ finished: kept ] [ interrupted: resumed ] [ missing: started ]
                 |
                 v   `parallel` at a time
             placement group -> driver actor -> run directory -> next job

A run that fails does not stop the others; its directory stays, and the next call resumes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayalign.errors import RayalignError, ResourceError, WaitError
from rayalign.loop import loop, preparation
from rayalign.loop.guided import GuidedRun
from rayalign.runs.resources import bundles, shares
from rayalign.runs.result import Result
from rayalign.serve.applications import stop_application
from rayalign.system import share

Tell = Callable[["Board", "Job", str], None]
POLL_S = 1.0
PLACE_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
SPARE_CPUS = 0.02
"""Of each run's part of the cluster, left free: what Ray places beside the group reserves a little."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: what `rayalign.run` takes."""

    folder: Path
    """Its run directory."""
    agent: str
    env: str = "rayalign/TinyWorld-v0"
    policy: str | None = None
    oracle: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By dotted names."""

    def prepare(self) -> preparation.Plan:
        """The plan of a new run; nothing is written."""
        return preparation.prepare(self.agent, self.env, self.policy, self.folder, self.oracle, dict(self.settings))

    def open(self) -> preparation.Plan | Result:
        """A new run's plan, or that of the rest of it, or what came out where it is finished."""
        if (self.folder / "config.yaml").exists():
            return preparation.old_run(self.folder)
        return preparation.new_run(
            self.agent, self.env, policy=self.policy, run_dir=self.folder, oracle=self.oracle, given=self.settings
        )

    @property
    def kind(self) -> str:
        """The same for jobs that differ in seed and world alone, which ask the same of the cluster."""
        shared = {k: v for k, v in self.settings.items() if k not in ("seed", "loop.seed") and not k.startswith("env.")}
        return repr((self.agent, self.env, sorted(shared.items(), key=lambda item: item[0])))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return (self.folder / "result.json").exists()

    @property
    def labels(self) -> int:
        """Labels bought so far, as its own log says."""
        last = 0
        with contextlib.suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16_384))
            for line in file:
                with contextlib.suppress(ValueError):
                    last = int(json.loads(line).get("labels", last))
        return last


class Driver:
    """The process of one run, as an actor in the run's placement group."""

    def __init__(self) -> None:
        self._guided: GuidedRun | None = None

    def run(self, job: Job) -> None:
        """Returns when the run is finished; raises what stopped it."""
        found = job.open()
        if isinstance(found, preparation.Plan):
            self._guided = GuidedRun(found)
            self._guided.wait()

    def stop(self, reason: str) -> None:
        """Break the run off."""
        if self._guided is not None:
            self._guided.stop(reason, STOP_TIMEOUT_S)


def part_of_cluster(cluster: Mapping[str, float], parallel: int) -> dict[str, float]:
    """What each of `parallel` runs may use of a cluster.

    >>> part_of_cluster({"CPU": 2.0, "GPU": 4.0, "memory": 1e9}, 2)
    {'CPU': 0.98, 'GPU': 2.0}
    """
    cpus = math.floor((cluster.get("CPU", 0.0) / parallel - SPARE_CPUS) * 1000) / 1000
    return {"CPU": cpus, "GPU": cluster.get("GPU", 0.0) / parallel}


def how_many_fit(plan: preparation.Plan, cluster: Mapping[str, float]) -> int:
    """Runs like `plan` that fit side by side with all that they ask for; at least one."""
    asked = shares(plan.config, plan.agent)
    cpus = sum(share.processes * share.cpus for share in asked) + SPARE_CPUS
    gpus = sum(share.processes * share.gpus for share in asked)
    fitting = min(cluster.get("CPU", 0.0) / cpus, cluster.get("GPU", 0.0) / gpus if gpus else math.inf)
    return max(1, int(fitting + 1e-9))


def group_of(plan: preparation.Plan, cluster: Mapping[str, float], parallel: int) -> list[dict[str, float]]:
    """Bundles of one of `parallel` runs (`rayalign.runs.resources`). `ResourceError` if that is too many."""
    try:
        return bundles(plan.config, plan.agent, part_of_cluster(cluster, parallel), plan.set_by_user)
    except ResourceError as error:
        raise ResourceError(
            f"parallel={parallel} leaves each run a part of the cluster that is too small: {error}"
        ) from None


@dataclass
class Board:
    """What is going on, for the display: written by the threads that wait for runs."""

    total: int
    done: int = 0
    running: dict[Path, float] = field(default_factory=dict)
    """Run directory -> when it was started."""
    failed: dict[Path, str] = field(default_factory=dict)
    """Run directory -> why."""


def run_many(jobs: Sequence[Job], parallel: int | None = None, show: Tell | None = None) -> dict[Path, str]:
    """Run what is missing of `jobs`, resume what was interrupted; returns why runs failed, by their directories.

    Args:
        jobs: equal directories are one run.
        parallel: runs at the same time; None: as many as fit with all that they ask for.
        show: is told when a run starts, ends or (every second) goes on: `start`, `done`, `failed`, `running`.

    Raises `ResourceError` before anything is started if so many don't fit.
    """
    todo = [job for job in {job.folder: job for job in jobs}.values() if not job.finished]
    board = Board(total=len(todo))
    if not todo:
        return {}
    with loop.cluster() as own:
        cluster = share.resources()
        kinds = {job.kind: job for job in todo}
        at_once = parallel or min(how_many_fit(job.prepare(), cluster) for job in kinds.values())
        at_once = min(at_once, len(todo))
        groups = {kind: group_of(job.prepare(), cluster, at_once) for kind, job in kinds.items()}
        stop = threading.Event()
        tell = show or (lambda *_: None)
        with ThreadPoolExecutor(at_once, thread_name_prefix="run") as pool:
            waiting = [pool.submit(_one, job, groups[job.kind], board, tell, stop) for job in todo]
            try:
                for future in waiting:
                    future.result()
            except BaseException:
                stop.set()
                for future in waiting:
                    future.cancel()
                raise
        if not own:
            stop_application("")  # Serve, which the runs share, if nobody else is on it
    return board.failed


def _one(job: Job, group: Sequence[Mapping[str, float]], board: Board, tell: Tell, stop: threading.Event) -> None:
    """One run from its placement group to its end; a driver whose process died is started once more."""
    board.running[job.folder] = time.monotonic()
    tell(board, job, "start")
    error = ""
    for again in (True, False):
        try:
            _drive(job, group, board, tell, stop)
            error = ""
        except RayTaskError as failed:  # first: it is also of its cause's kind
            cause = failed.cause
            error = str(cause) if isinstance(cause, RayalignError) else f"{type(cause).__name__}: {cause}"
        except RayActorError as died:
            error = f"the driver's process died: {str(died).strip().splitlines()[-1]}"
            if again and not stop.is_set():
                continue
        except RayalignError as failed:
            error = str(failed)
        break
    del board.running[job.folder]
    board.done += 1
    if error:
        board.failed[job.folder] = error
    tell(board, job, "failed" if error else "done")


def _drive(job: Job, group: Sequence[Mapping[str, float]], board: Board, tell: Tell, stop: threading.Event) -> None:
    lent = placement_group([dict(bundle) for bundle in group if bundle], strategy="PACK")
    driver = None
    try:
        deadline = time.monotonic() + PLACE_TIMEOUT_S
        while not (there := lent.wait(POLL_S)) and time.monotonic() < deadline and not stop.is_set():
            pass
        if stop.is_set():
            raise RayalignError("interrupted")
        if not there:
            raise WaitError(f"waited {PLACE_TIMEOUT_S:.0f} s for {group} to be free on the cluster; others use it.")
        strategy = PlacementGroupSchedulingStrategy(lent, placement_group_capture_child_tasks=True)
        driver = ray.remote(Driver).options(num_cpus=0, max_concurrency=2, scheduling_strategy=strategy).remote()
        answer = driver.run.remote(job)
        while True:
            with contextlib.suppress(GetTimeoutError):
                ray.get(answer, timeout=POLL_S)
                return
            if stop.is_set():
                with contextlib.suppress(Exception):  # it is killed all the same
                    ray.get(driver.stop.remote("interrupted"), timeout=STOP_TIMEOUT_S)
                raise RayalignError("interrupted")
            tell(board, job, "running")
    finally:
        if driver is not None:
            ray.kill(driver)
        remove_placement_group(lent)
