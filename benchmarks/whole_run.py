"""A whole tuned example: seconds from start to result, seconds by stage, labels per second, and peak memory.

    python benchmarks/whole_run.py tuned_examples/sea_tinyworld.py [--set loop.budget=512 ...]

Memory is the proportional set size of the run's whole process tree, Ray included, looked at twice a second: what
the machine has less while the run lasts, pages that processes share counted once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import psutil

from rayalign.runs.logs import read_metrics


def main() -> None:
    """Run the example and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example")
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "rayalign.cli", "run", options.example, "--run-dir", str(run_dir)]
        for change in ["logging.progress=off", *options.set]:
            command += ["--set", change]
        start = time.perf_counter()
        run = subprocess.Popen(command)
        peak = watch(run)
        if run.returncode:
            sys.exit(f"the run failed: {run.returncode}")
        seconds = time.perf_counter() - start
        result = json.loads((run_dir / "result.json").read_text())
        print(f"{seconds:.0f} s for {result['labels_spent']} labels, evaluation and start included")
        for stage, times in sorted(stages(run_dir).items()):
            print(f"  {stage:18s} median {statistics.median(times):7.3f} s   sum {sum(times):7.1f} s")
        print(f"peak memory {sum(peak.values()) / 2**30:.2f} GiB")
        for name, size in sorted(peak.items(), key=lambda item: -item[1])[:10]:
            print(f"  {name:30s} {size / 2**30:6.2f} GiB")


def stages(run_dir: Path) -> dict[str, list[float]]:
    """Seconds of each stage of each batch, the collector's and the learner's."""
    times: dict[str, list[float]] = defaultdict(list)
    for row in read_metrics(run_dir):
        for name, value in row.items():
            if name.startswith(("seconds/", "learner/seconds/")):
                times[name.replace("seconds/", "")].append(value)
    return times


def watch(run: subprocess.Popen) -> dict[str, int]:
    """Bytes by kind of process at the moment of the largest sum."""
    peak: dict[str, int] = {}
    ended = threading.Event()
    threading.Thread(target=lambda: (run.wait(), ended.set()), daemon=True).start()
    while not ended.wait(0.5):
        now = memory(run.pid)
        if sum(now.values()) > sum(peak.values()):
            peak = now
    return peak


def memory(root: int) -> dict[str, int]:
    """Proportional set size of the process tree, by the first word of the command line."""
    sizes: dict[str, int] = defaultdict(int)
    try:
        processes = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.Error:
        return {}
    for process in processes:
        try:
            name = Path((process.cmdline() or [process.name()])[0]).name
            sizes[name] += process.memory_full_info().pss
        except (psutil.Error, OSError):
            continue
    return dict(sizes)


if __name__ == "__main__":
    main()
