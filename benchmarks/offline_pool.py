"""Memory and time of picking the best pairs out of pools of growing size, streamed through Ray Data.

    python benchmarks/offline_pool.py [--rows 20000 200000] [--count 1000] [--store-mib 200]

Synthetic pairs of 6 KB, made as they are read, and a score that costs nothing: what is measured is the stream. Ray's
object store is made smaller than the larger pool, so that a pool held in memory would have to spill; blocks are 8 MiB.
"driver adds" is the growth of the driver's peak memory, "actor adds" that of the scoring actor's over what it was at
its first batch; both see blocks in shared memory as their own.

No figures yet.
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.offline_pool import SCORE, BestSoFar, stream_top


def resident_peak() -> float:
    """Peak resident memory of this process, MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


class Cheap(BestSoFar):
    """Scores by number; the memory that its process has added goes into a column."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.start: float | None = None

    def scores(self, rows: Any) -> np.ndarray:
        """A permutation of the numbers."""
        self.start = resident_peak() if self.start is None else self.start
        return np.array([row["id"] * 7_919 % 1_000_003 for row in rows], dtype=np.float64)

    def __call__(self, table: pa.Table) -> pa.Table:
        """As its parent, with what was added so far."""
        best = super().__call__(table)
        return best.append_column("adds", pa.array([resident_peak() - (self.start or 0.0)] * len(best)))


def with_pairs(table: pa.Table) -> pa.Table:
    """Rows of about 6 KB."""
    texts = [f"{i:02000}" for i in table["id"].to_pylist()]
    return table.append_column("prompt", pa.array(texts)).append_column(
        "responses", pa.array([[text, text] for text in texts])
    )


def main() -> None:
    """Pools of each size in turn, in one cluster."""
    import ray
    import ray.data
    from ray._private.internal_api import memory_summary

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--store-mib", type=int, default=200)
    options = parser.parse_args()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=options.store_mib * 2**20,
    )
    ray.data.DataContext.get_current().target_max_block_size = 8 * 2**20
    address = ray.get_runtime_context().gcs_address
    for rows in options.rows:
        before, start = resident_peak(), time.perf_counter()
        data = ray.data.range(rows).map_batches(with_pairs, batch_format="pyarrow", batch_size=1_024)
        best = stream_top(data, Cheap, {}, options.count, batch_rows=1_024, config=ScorerConfig(cpus_per_replica=0.5))
        seconds = time.perf_counter() - start
        scores = np.sort(np.arange(rows) * 7_919 % 1_000_003)[::-1][: options.count]
        assert (np.array(best[SCORE]) == scores).all(), "not the best pairs of the pool"
        spilled = re.search(r"Spilled (\d+) MiB", memory_summary(address, stats_only=True))
        adds = f"driver adds {resident_peak() - before:4.0f} MiB, actor adds {max(best['adds'].to_pylist()):4.0f} MiB"
        size = f"{rows:8,} pairs, {rows * 6_000 / 2**20:5.0f} MiB"
        print(f"{size}: {seconds:5.1f} s, {adds}, spilled {spilled[1] if spilled else 0} MiB")
    ray.shutdown()


if __name__ == "__main__":
    main()
