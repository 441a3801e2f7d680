"""How much memory this machine has left, for who is about to load something large."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

_GROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit and use of a container, and what of that the kernel gives back on demand (files that were read), as the two
versions of control groups tell them."""


def free_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process may still take: of the machine, or of its container where that has less."""
    found = [int(psutil.virtual_memory().available)]
    for limit, used, cached in _GROUPS:
        try:
            left = int((groups / limit).read_text()) - int((groups / used).read_text())
            rows = dict(line.split() for line in (groups / used).with_name("memory.stat").read_text().splitlines())
            found.append(left + int(rows.get(cached, 0)))
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
    return max(0, min(found))


def gpu_memory() -> tuple[int, int] | None:
    """Bytes of this machine's first GPU that are free, and all of them; None without a GPU."""
    import torch

    return torch.cuda.mem_get_info(0) if torch.cuda.is_available() else None
