"""A run in a part of a cluster: whoever starts the driver in a placement group lends it that group and nothing else.

    cluster:  [ group of run A: driver, collector, engines, scorers, room for learner and oracle ]  [ group of run B ]

Ray puts what the driver starts into the driver's own group, where the group was made to capture its children; Ray
Tune's trials are such drivers. Two parts can't be caught: Ray Train reserves a group of its own for the learner's
workers, and Serve places the oracle's replicas itself. Their CPUs are kept free inside the group, and outside of it
they reserve next to nothing; GPUs they reserve as set, beside the group.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.util import get_current_placement_group

OUTSIDE_TIMEOUT_S = 120.0
SETTLED_AFTER_S = 5.0
"""What is still in use then is in use by others."""


def in_group() -> bool:
    """Whether this process has a placement group that its children are put into."""
    return ray.is_initialized() and ray.get_runtime_context().should_capture_child_tasks_in_placement_group


def resources() -> dict[str, float]:
    """What a run that is started here may use: its placement group, or what is free of the cluster.

    The GPUs are the cluster's in either case: those of learner and oracle are none of the group's.
    """
    if not in_group():
        return _free()
    total: Counter[str] = Counter()
    for bundle in get_current_placement_group().bundle_specs:
        total.update(bundle)
    return {**total, "GPU": ray.cluster_resources().get("GPU", 0.0)}


def _free() -> dict[str, float]:
    """What nobody uses: a service beside the run keeps what it has, who has just ended gives it back in a moment."""
    total, deadline = ray.cluster_resources(), time.monotonic() + SETTLED_AFTER_S
    while True:
        free = ray.available_resources()
        left = {name: free.get(name, 0.0) for name in ("CPU", "GPU") if name in total}
        if time.monotonic() > deadline or all(left[name] > total[name] - 1e-6 for name in left):
            return {**total, **left}
        time.sleep(0.1)


def outside(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, called in a process that does not hand its placement group on, hence has none."""
    if not in_group():
        return function(*args)
    call = ray.remote(num_cpus=0)(function).options(scheduling_strategy="DEFAULT")
    return ray.get(call.remote(*args), timeout=OUTSIDE_TIMEOUT_S)
