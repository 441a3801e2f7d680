"""Which roles share a GPU, and what the fullest one has to hold.

Ray puts a fraction of a GPU on the fullest GPU that still has room for it, and a whole one on an empty GPU; roles start
in the order of `rayalign.runs.placement`. On several machines Ray may do otherwise: it chooses the machine first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rayalign.estimate.role import RoleMemory

PARTS = 10_000
"""Shares are counted in so many parts of a GPU, as Ray does: sums of floats are not what they seem."""


@dataclass(frozen=True, kw_only=True)
class FullestGpu:
    """The GPU that has to be the largest."""

    gpus: int
    """All that are used."""
    roles: tuple[RoleMemory, ...]
    """What is on it, a process each."""
    sleeping: bool
    """Whether engines sleep while the learner works."""

    @property
    def bytes(self) -> int:
        """Of all roles together; what vLLM takes beyond its need is not counted."""
        return sum(role.total for role in self.roles)

    @property
    def while_learning(self) -> int:
        """Bytes while those sleep who can."""
        return sum(role.total if role.asleep is None else role.asleep for role in self.roles)

    @property
    def claimed(self) -> float:
        """Share of the GPU that vLLM takes."""
        return sum(role.claims for role in self.roles)

    @property
    def smallest(self) -> float:
        """Bytes of the smallest GPU that will do: vLLM needs its part within its share, the others theirs beside it.

        Infinite where vLLM leaves nothing to others.
        """
        own = [role.total / role.claims for role in self.roles if role.claims]
        others = sum(role.total for role in self.roles if not role.claims)
        left = 1 - self.claimed
        beside = 0.0 if not others else others / left if left > 1e-9 else float("inf")
        return max([beside, *own])


def fullest_gpu(roles: Iterable[RoleMemory], sleeping: bool = False) -> FullestGpu | None:
    """The fullest of the GPUs that `roles`, in the order in which they start, are placed on; None without any."""
    placed = assign([role for role in roles if role.device == "gpu"])
    if not placed:
        return None
    found = [FullestGpu(gpus=len(placed), roles=tuple(on_it), sleeping=sleeping) for on_it in placed]
    return max(found, key=lambda gpu: (gpu.smallest, gpu.bytes))


def assign(roles: Sequence[RoleMemory]) -> list[list[RoleMemory]]:
    """What is on each GPU, by Ray's rule. Roles that live in the collector's process are where the collector is."""
    inside = [role for role in roles if not role.gpus]
    left: list[int] = []
    placed: list[list[RoleMemory]] = []
    home: list[RoleMemory] | None = None
    for role in roles:
        for _ in range(role.processes if role.gpus else 0):
            share = PARTS if role.gpus >= 1 else round(role.gpus * PARTS)
            for number in range(max(1, int(role.gpus))):
                fitting = [i for i, room in enumerate(left) if room >= share]
                best = min(fitting, key=lambda i: left[i], default=len(left))
                if best == len(left):
                    left.append(PARTS)
                    placed.append([])
                left[best] -= share
                placed[best] += [role] if number < role.spread else []
                home = placed[best] if role.role == "posterior" else home
    if inside:
        if home is None:
            placed.append(home := [])
        home.extend(inside)
    return placed
