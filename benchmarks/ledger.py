"""How fast the ledger is written and read back.

    python benchmarks/ledger.py                      1,000,000 labels, about 2.5 GB in a temporary folder
    python benchmarks/ledger.py --labels 50000       a quick look

Appending: a batch of 128 duels with contents (48 prompt tokens, two responses of 32 tokens with their
log-probabilities), then its 128 answers, each with its fsync. Reading happens in a fresh process, so that its
peak memory is its own: the fold into budget and training set, then the whole training set as texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rayalign.ledger.ledger import Ledger
from rayalign.types import Candidate, Duel, Prompt, Verdict

PROMPT_TOKENS, RESPONSE_TOKENS = 48, 32


def duels(batch: int, size: int) -> list[Duel]:
    def candidate(i: int) -> Candidate:
        return Candidate(
            text=f"{i} " + "word " * (RESPONSE_TOKENS - 1),
            token_ids=tuple(range(i, i + RESPONSE_TOKENS)),
            logprobs=tuple(-0.01 * t for t in range(RESPONSE_TOKENS)),
            policy_version=batch,
        )

    made = []
    for slot in range(size):
        prompt = Prompt(
            id=f"p{slot}",
            text=f"{slot} " + "word " * (PROMPT_TOKENS - 1),
            token_ids=tuple(range(slot, slot + PROMPT_TOKENS)),
        )
        first, second = candidate(slot), candidate(slot + 1)
        name = Duel.make_id("benchmark", batch, slot, prompt, first, second)
        made.append(Duel(id=name, batch=batch, prompt=prompt, first=first, second=second, meta={"acquisition": 0.5}))
    return made


def write(path: Path, labels: int, size: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """Seconds of each commit and of each answer, and the CPU's share of them, for machines that are busy otherwise."""
    commits, answers, commits_cpu, answers_cpu = [], [], [], []
    with Ledger(path) as ledger:
        for batch in range(-(-labels // size)):
            made = duels(batch, min(size, labels - batch * size))
            verdicts = [Verdict(duel_id=duel.id, probability=0.75, price=0.01) for duel in made]
            start, start_cpu = time.perf_counter(), time.process_time()
            ledger.commit(batch, made)
            middle, middle_cpu = time.perf_counter(), time.process_time()
            ledger.answer(verdicts, [1.0] * len(made), oracle="benchmark/1")
            commits.append(middle - start)
            answers.append(time.perf_counter() - middle)
            commits_cpu.append(middle_cpu - start_cpu)
            answers_cpu.append(time.process_time() - middle_cpu)
    return commits, answers, commits_cpu, answers_cpu


def read(path: Path) -> dict[str, float]:
    """Run in a process of its own."""
    before = peak_mib()
    start, start_cpu = time.perf_counter(), time.process_time()
    ledger = Ledger(path)
    folded, folded_cpu = time.perf_counter(), time.process_time()
    peak_folded = peak_mib()
    last = ledger.stream_batch(ledger.num_streamed - 1)
    one_batch = time.perf_counter()
    rows = sum(len(labels) for _, labels, _, _ in ledger.labelled_rows())
    walked = time.perf_counter()
    assert rows == ledger.spent and last
    return {
        "labels": ledger.spent,
        "fold": folded - start,
        "fold_cpu": folded_cpu - start_cpu,
        "batch": one_batch - folded,
        "walk": walked - one_batch,
        "idle_mib": before,
        "fold_mib": peak_folded,
        "walk_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Of this process since its start; `getrusage` would count what its parent had when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def milliseconds(seconds: Sequence[float], cpu: Sequence[float]) -> str:
    late = sorted(seconds)[int(0.99 * (len(seconds) - 1))]
    return f"{1e3 * statistics.median(seconds):.2f} ms (CPU {1e3 * statistics.median(cpu):.2f}; 99 %: {1e3 * late:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read)))
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "ledger.arrow"
        commits, answers, commits_cpu, answers_cpu = write(path, args.labels, args.batch)
        size = path.stat().st_size / 2**20
        command = [sys.executable, __file__, "--read", str(path)]
        result = json.loads(subprocess.run(command, capture_output=True, check=True, text=True, timeout=600).stdout)
    table = Table(
        "what", "measured", "target", title=f"ledger: {args.labels:,} labels, batches of {args.batch}, {size:,.0f} MiB"
    )
    table.add_row("commit of a batch, median", milliseconds(commits, commits_cpu), "< 5 ms")
    table.add_row("its answers, median", milliseconds(answers, answers_cpu), "< 5 ms")
    table.add_row(
        "read back and fold", f"{result['fold']:.2f} s (CPU {result['fold_cpu']:.2f} s)", "< 5 s for 1,000,000"
    )
    table.add_row(
        "peak memory of that", f"{result['fold_mib']:.0f} MiB ({result['idle_mib']:.0f} before)", "< 1024 MiB"
    )
    table.add_row("read one batch as objects", f"{1e3 * result['batch']:.1f} ms", "")
    table.add_row("walk all contents", f"{result['walk']:.2f} s", "")
    table.add_row("peak memory after that", f"{result['walk_mib']:.0f} MiB", "")
    Console().print(table)


if __name__ == "__main__":
    main()
