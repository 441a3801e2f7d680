"""How much an agent makes of its labels on TinyWorld: whole runs through the real loop, on worlds nobody tuned on.

    python benchmarks/sample_efficiency.py --groups agents --worlds 10 11 12 13 14 --budget 2000 --jobs 2

A row is a tuned example or one with settings changed (`GROUPS`); a world is another hidden reward with its own initial
policy and another run seed. Worlds 0 to 9 are for development. What is finished in `--out` is not run again, what was
interrupted is resumed, and the tables and plots in `docs/results` are made again from all that is there.

Same prompts, policy, learner, batch of 32 and evaluation for all rows; what a row changes, its settings say.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.agents.sea import VARIANTS
from rayalign.evaluate import area_under_curve, bootstrap_interval, paired_ratio
from rayalign.plots import compare_win_rate, png
from rayalign.run_record import RunRecord

ROOT = Path(__file__).parents[1]
RUN_TIMEOUT_S = 3600
TARGETS = (0.5, 0.55, 0.6, 0.65, 0.7)
BASELINE = "passive"
PAPER = {"agent.gamma_burn_in": 1000, "agent.gamma_after": 0.7, "agent.synthetic_pairs": "selected"}
ORACLE_ONLY = {"agent.gamma_after": 1.0}
LOSSES = {"dpo": {}, "ipo": {"agent.beta": 0.1}, "slic": {"agent.beta": 0.1}, "simpo": {"agent.beta": 2.0}}

GROUPS: Mapping[str, Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "agents": {
        "passive": ("passive", {}),
        "sea-paper": ("sea", PAPER),
        "sea": ("sea", {}),
        **{name: (name, {}) for name in ("xpo", "selm", "apl", "ae_borda", "ae_borda_dpo", "ae_dpo", "us_dpo")},
        **{name: (name, {}) for name in ("active_dpo", "random", "apo", "aplp", "dts", "drts", "delta_ucb")},
    },
    "controls": {
        "passive": ("passive", {}),
        "passive-2-steps": ("passive", {"learner.updates_per_batch": 2}),
        "passive-offline": ("passive", {"agent.schedule": "offline"}),
        "passive-offline-2-epochs": ("passive", {"agent.schedule": "offline", "loop.epochs": 2}),
    },
    "effects": {
        "passive": ("passive", {}),
        "selection alone": ("sea", ORACLE_ONLY),
        "pseudo pairs: selected, 0.7 after 1000": ("sea", PAPER),
        "pseudo pairs: extremes, 0.7 after 1000": ("sea", {**PAPER, "agent.synthetic_pairs": "extremes"}),
        "pseudo pairs: selected, 0.5 after 300": ("sea", {"agent.synthetic_pairs": "selected"}),
        "pseudo pairs: extremes, 0.5 after 300": ("sea", {}),
        "random real pairs, extremes, 0.5 after 300": ("sea", {"agent.exploration": "passive"}),
    },
    "losses": {
        **{f"passive, {loss}": ("passive", {"agent.loss": loss, **change}) for loss, change in LOSSES.items()},
        **{f"sea, {loss}": ("sea", {"agent.loss": loss, **change}) for loss, change in LOSSES.items()},
    },
    "explorations": {
        name: ("sea", {**ORACLE_ONLY, "agent.exploration": name})
        for name in ("passive", "uncertainty", "ee_ts", "bai_ts")
    },
    "variants": {f"variant {n}": ("sea", {**PAPER, **changes}) for n, changes in VARIANTS.items()},
}
"""Group -> row -> tuned example and the settings that differ from it."""
INTRO = """# Sample efficiency on TinyWorld: {group}
Whole runs through the real loop, one per row and world; a world is another hidden reward, initial policy and run seed.
{budget} labels, batches of 32, synchronous. Held-out: 300 prompts, greedy answers against the references, exact
rewards, ties one half. Means over worlds with 95% bootstrap intervals over worlds (with so few worlds they are too
narrow: look at the thin lines of the plot). Labels to a win rate: median over the worlds that reached it, and how many
did. Steps: optimizer steps. "Duels' own win rate": both shown responses against the prompt's reference, what a user who
labels would have met on the way. SEA's posterior reads responses with a backbone that was trained on other worlds of
the same family, never on these: it knows what kind of thing is rewarded, passive does not.

```
{command}
```
Machine: 2 CPU cores, 24 GiB, no GPU. What each row is: `GROUPS` in that file, on top of `tuned_examples/`.
"""


# ==== runs ===========================================================================================================
def folder_of(out: Path, example: str, changes: Mapping[str, Any], world: int, budget: int) -> Path:
    """Equal settings have one folder, whatever the rows are called."""
    name = "-".join([example, *(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in sorted(changes.items()))])
    return out / f"{name}-{budget}-world{world}"


def run_here(folder: Path, example: str, changes: Mapping[str, Any], world: int, budget: int) -> None:
    """One run in this process, or the rest of it."""
    import runpy

    import rayalign

    if (folder / "config.yaml").exists():
        rayalign.resume(folder)
        return
    config = dict(runpy.run_path(str(ROOT / "tuned_examples" / f"{example}_tinyworld.py"))["CONFIG"])
    config |= {"env.seed": world, "evaluation.every": 128, "evaluation.num_prompts": 300, "logging.progress": "off"}
    config |= {"seed": world, "budget": budget, **changes}
    rayalign.run(config.pop("agent"), config.pop("env"), run_dir=folder, **config)


def run_all(rows: Mapping[str, tuple[str, Mapping[str, Any]]], options: argparse.Namespace) -> list[str]:
    """Every missing run, `--jobs` at a time, each in a process and a Ray of its own. Returns what failed."""
    todo = [
        (example, changes, world)
        for world in options.worlds
        for example, changes in dict.fromkeys((e, json.dumps(c, sort_keys=True)) for e, c in rows.values())
        if not (folder_of(options.out, example, json.loads(changes), world, options.budget) / "result.json").exists()
    ]
    failed: list[str] = []

    def one(job: tuple[str, str, int]) -> None:
        example, changes, world = job
        command = [sys.executable, __file__, "--one", example, changes, "--worlds", str(world)]
        command += ["--budget", str(options.budget), "--out", str(options.out)]
        start = time.perf_counter()
        environment = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **os.environ}
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
            error = run.stderr.strip().splitlines()[-1:] if run.returncode else []
        except subprocess.TimeoutExpired:
            error = [f"no end after {RUN_TIMEOUT_S} s"]
        failed.extend(f"{example} {changes} world {world}: {line}" for line in error)
        state = "FAILED" if error else f"{time.perf_counter() - start:.0f} s"
        print(f"{example} {changes} world {world}: {state}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, todo))
    return failed


# ==== tables =========================================================================================================
def records(
    rows: Mapping[str, tuple[str, Mapping[str, Any]]], options: argparse.Namespace
) -> dict[str, list[RunRecord]]:
    """Row -> its finished runs, by world."""
    found = {}
    for name, (example, changes) in rows.items():
        folders = [folder_of(options.out, example, changes, world, options.budget) for world in options.worlds]
        if runs := [RunRecord.read(folder) for folder in folders if (folder / "result.json").exists()]:
            found[name] = runs
    return found


def table(runs: Mapping[str, Sequence[RunRecord]], budget: int) -> tuple[list[str], dict[str, Any]]:
    """Markdown lines, and the numbers behind them."""
    marks = [mark for mark in (256, 512, 1000, 1500, 2000) if mark <= budget]
    head = ["row", "worlds", *(f"win rate at {mark}" for mark in marks), "area under curve", "duels' own win rate"]
    head += [*(f"labels to {target:.2f}" for target in TARGETS[2:4]), "steps"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    numbers: dict[str, Any] = {}
    for name, row in runs.items():
        curves = [run.curve() for run in row]
        at = {mark: [float(np.interp(mark, *map(np.asarray, curve))) for curve in curves] for mark in marks}
        area = [area_under_curve(*curve, up_to=float(budget)) for curve in curves]
        online = [float(np.mean(run.series("online_win_rate")[1] or [np.nan])) for run in row]
        labels = {target: [run.labels_to(target) for run in row] for target in TARGETS}
        steps = [len(run.series("loss" if run.series("loss")[1] else "learner/loss")[1]) for run in row]
        updates = int(row[0].settings.get("learner.updates_per_batch", 1))
        numbers[name] = {
            "worlds": [run.world for run in row],
            "win_rate_at": at,
            "area_under_curve": area,
            "online_win_rate": online,
            "labels_to": labels,
            "steps": [updates * n for n in steps],
        }
        cells = [name, str(len(row)), *(interval(values) for values in at.values()), interval(area), interval(online)]
        for target in TARGETS[2:4]:
            reached = [value for value in labels[target] if value is not None]
            middle = f"{np.median(reached):.0f}" if 2 * len(reached) > len(row) else "-"
            cells.append(f"{middle} ({len(reached)}/{len(row)})")
        cells.append(f"{np.mean(numbers[name]['steps']):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines, numbers


def interval(values: Sequence[float]) -> str:
    """Mean and its 95% bootstrap interval over worlds."""
    estimate = bootstrap_interval(values)
    if np.isnan(estimate.value):
        return "-"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def ratios(runs: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """Labels of the baseline over labels of each other row, world by world."""
    lines = []
    by_world = {name: {run.world: run for run in row} for name, row in runs.items()}
    for name in by_world:
        for target in TARGETS[2:4] if name != BASELINE and BASELINE in by_world else ():
            pairs = [
                (by_world[BASELINE][world].labels_to(target), run.labels_to(target))
                for world, run in by_world[name].items()
                if world in by_world[BASELINE]
            ]
            both = [(p, r) for p, r in pairs if p and r]
            lost = [
                sum(r is None and p is not None for p, r in pairs),
                sum(p is None and r is not None for p, r in pairs),
            ]
            line = f"- {BASELINE} / {name}, labels to {target:.2f}: "
            if len(both) > 1:
                ratio = paired_ratio(*map(list, zip(*both, strict=True)))
                line += f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] over {len(both)} worlds"
            else:
                line += f"too few worlds where both reached it ({len(both)})"
            lines.append(
                line + f"; {BASELINE} alone reached it in {lost[0]}, {name} alone in {lost[1]} of {len(pairs)}."
            )
    return lines


def write(group: str, runs: Mapping[str, Sequence[RunRecord]], options: argparse.Namespace) -> None:
    """`sample_efficiency_<group>.md`, `.json` and plots in `--results`."""
    stem = options.results / f"sample_efficiency_{group}"
    lines, numbers = table(runs, options.budget)
    worlds = " ".join(map(str, options.worlds))
    command = f"python benchmarks/sample_efficiency.py --groups {group} --worlds {worlds} --budget {options.budget}"
    intro = INTRO.format(group=group, budget=options.budget, command=command)
    missing = [name for name in GROUPS[group] if name not in runs]
    plot = f"\n![win rate over labels]({stem.name}_win_rate.png)"
    text = [intro, *lines, plot, "", *ratios(runs), *([f"\nNot run yet: {', '.join(missing)}."] if missing else [])]
    stem.with_suffix(".md").write_text("\n".join(text) + "\n")
    stem.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    if (figure := compare_win_rate(runs)) is not None:
        stem.with_name(f"{stem.name}_win_rate.png").write_bytes(png(figure))
    print("\n".join(lines))


def main() -> None:
    """Run what is missing, then write the tables of the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=["agents"], choices=list(GROUPS))
    parser.add_argument("--rows", nargs="+", help="only these rows of the groups")
    parser.add_argument("--worlds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/sample-efficiency"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        example, changes = options.one[0], json.loads(options.one[1])
        world = options.worlds[0]
        run_here(
            folder_of(options.out, example, changes, world, options.budget), example, changes, world, options.budget
        )
        return
    failed: list[str] = []
    for group in options.groups:
        rows = {name: row for name, row in GROUPS[group].items() if not options.rows or name in options.rows}
        failed += run_all(rows, options)
        write(group, records(GROUPS[group], options), options)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
