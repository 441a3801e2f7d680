"""What one role of a run needs: bytes by what they are for, in each of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """One role's processes, which are alike."""

    role: str
    processes: int
    device: str
    """Where `parts` are: gpu or cpu."""
    parts: dict[str, int]
    """Bytes in each process, on each of its GPUs if it has several."""
    host: dict[str, int] = field(default_factory=dict)
    """Bytes in each process's memory on the CPU, beside those on its GPU."""
    gpus: float = 0.0
    """GPUs that each process reserves; 0 on a GPU: it lives in the collector's process, and shares the collector's."""
    spread: int = 1
    """GPUs that each process works on."""
    asleep: int | None = None
    """Bytes on a GPU that are left while the learner works, if engines sleep; None: all."""
    claims: float = 0.0
    """Share of its GPU's memory that it takes at the start, whatever `parts` are (vLLM)."""

    @property
    def total(self) -> int:
        """Bytes of one process on its device."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """A role that could not be counted."""

    role: str
    why: str


def total(roles: Sequence[RoleMemory], device: str) -> int:
    """Bytes of all processes on `device`, what GPU roles keep beside it counted on the CPU."""
    on_device = sum(role.processes * role.spread * role.total for role in roles if role.device == device)
    beside = sum(role.processes * sum(role.host.values()) for role in roles) if device == "cpu" else 0
    return on_device + beside
