"""How much memory this machine has left, for who is about to load something large."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container, as the kernel's two versions of control groups tell them."""


def free_memory() -> int:
    """Bytes that a process may still take: of the machine, or of its container where that has less."""
    found = [int(psutil.virtual_memory().available)]
    for limit, used in _GROUPS:
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
    return max(0, min(found))


def gpu_memory() -> tuple[int, int] | None:
    """Bytes of this machine's first GPU that are free, and all of them; None without a GPU."""
    import torch

    return torch.cuda.mem_get_info(0) if torch.cuda.is_available() else None
