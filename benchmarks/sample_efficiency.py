"""How much an agent makes of its labels on TinyWorld: whole runs through the real loop, on worlds nobody tuned on.

    python benchmarks/sample_efficiency.py --groups agents --worlds 10 11 12 13 14 --budget 2000 --jobs 2

A row is a tuned example or one with settings changed (`GROUPS`); a world is another hidden reward with its own initial
policy and another run seed. Worlds 0 to 9 are for development. What is finished in `--out` is not run again, what was
interrupted is resumed. `docs/results/sample_efficiency_<group>.json` keeps the whole curve, settings and code version
of every run ever finished, so that tables and plots are made again from it and from what is in `--out`: rows of an
earlier day need neither their run directories nor another run (`--again` runs them all the same), and a row that
another group has by another name is not run for both. Where a row's settings changed, its old runs go.

Same prompts, policy, learner, batch of 32 and evaluation for all rows; what a row changes, its settings say.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayalign.agents.sea import VARIANTS
from rayalign.cli.search import Lines
from rayalign.evaluation.evaluate import paired_ratio
from rayalign.example import load_example, merged
from rayalign.report.plots import compare_win_rate, png
from rayalign.report.standings import Rows, RunCurve, markdown, merge, rows_from_plain, rows_to_plain, table, verdicts
from rayalign.runs.record import RunRecord
from rayalign.studies.many import Job, run_many

ROOT = Path(__file__).parents[1]
TARGETS = (0.5, 0.55, 0.6, 0.65, 0.7)
MARKS = (256, 512, 1000, 1500, 2000)
USUAL_BUDGET = 2000
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
Numbers of different rows compare where they come from the same code: the JSON file says which made each run.
"""


# ==== runs ===========================================================================================================
def folder_of(out: Path, example: str, changes: Mapping[str, Any], world: int, budget: int) -> Path:
    """Equal settings have one folder, whatever the rows are called."""
    name = "-".join([example, *(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in sorted(changes.items()))])
    return out / f"{name}-{budget}-world{world}"


def job_of(example: str, changes: Mapping[str, Any], world: int, options: argparse.Namespace) -> Job:
    config = load_example(ROOT / "tuned_examples" / f"{example}_tinyworld.py")
    config |= {"env.seed": world, "evaluation.every": 128, "evaluation.num_prompts": 300, "logging.progress": "off"}
    config |= {"seed": world, "budget": options.budget, **changes}
    return Job(
        folder=folder_of(options.out, example, changes, world, options.budget).absolute(),
        agent=config.pop("agent"),
        env=config.pop("env"),
        settings=merged(config),
    )


def jobs_of(group: str, options: argparse.Namespace) -> dict[str, list[Job]]:
    """Row -> its runs, by world."""
    return {
        name: [job_of(example, changes, world, options) for world in options.worlds]
        for name, (example, changes) in GROUPS[group].items()
    }


# ==== what is known already ==========================================================================================
def stem_of(group: str, options: argparse.Namespace) -> Path:
    """Where a group's tables and plots are; an unusual budget is part of their names."""
    budget = "" if options.budget == USUAL_BUDGET else f"_{options.budget}"
    return options.results / f"sample_efficiency_{group}{budget}"


def stored_runs(group: str, options: argparse.Namespace) -> dict[str, list[RunCurve]]:
    """Row -> its runs in the group's JSON file, and in those of other groups that have the row by another name."""
    known: dict[str, list[RunCurve]] = {}
    for other in [name for name in GROUPS if name != group] + [group]:  # its own file has the last word
        file = stem_of(other, options).with_suffix(".json")
        found = rows_from_plain(json.loads(file.read_text()), options.budget) if file.exists() else {}
        for name, row in GROUPS[group].items():
            twins = [twin for twin, settings in GROUPS[other].items() if settings == row and twin in found]
            known, _ = merge(known, {name: [run for twin in twins for run in found[twin]]})
    return known


def has_curve(job: Job, runs: list[RunCurve]) -> bool:
    """Whether the run of `job` is among `runs`, with its whole curve."""
    return any(run.world[-1] == job.settings["loop.seed"] and run.settings for run in runs)


# ==== tables =========================================================================================================
def all_runs(group: str, jobs: Mapping[str, list[Job]], options: argparse.Namespace) -> dict[str, list[RunCurve]]:
    """Row -> what the JSON files know, and the finished runs that are there now."""
    new = {name: [RunCurve.of(RunRecord.read(job.folder)) for job in own if job.finished] for name, own in jobs.items()}
    rows, notes = merge(stored_runs(group, options), new)
    for note in notes:
        print(note, file=sys.stderr)
    return {name: rows[name] for name in [*jobs, *(n for n in rows if n not in jobs)] if name in rows}


def ratios(rows: Rows) -> list[str]:
    """Labels of the baseline over labels of each other row, world by world."""
    lines = []
    by_world = {name: {run.world: run for run in runs} for name, runs in rows.items()}
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


def code_of(rows: Rows) -> str:
    """Which code made the rows."""
    made: dict[str, list[str]] = {}
    for name, runs in rows.items():
        for code in dict.fromkeys(", then ".join(run.code) or "not recorded" for run in runs):
            made.setdefault(code, []).append(name)
    return "Code: " + "; ".join(f"{code} ({', '.join(names)})" for code, names in made.items()) + "."


def write(group: str, jobs: Mapping[str, list[Job]], options: argparse.Namespace) -> None:
    """`sample_efficiency_<group>.md`, `.json` and plots in `--results`."""
    stem = stem_of(group, options)
    rows = all_runs(group, jobs, options)
    if not rows:
        return
    marks = [mark for mark in MARKS if mark <= options.budget] or [options.budget]
    head, lines = table(rows, marks, TARGETS[2:4], unit="worlds")
    worlds = " ".join(map(str, options.worlds))
    command = f"python benchmarks/sample_efficiency.py --groups {group} --worlds {worlds} --budget {options.budget}"
    intro = INTRO.format(group=group, budget=options.budget, command=command)
    missing = [name for name in GROUPS[group] if name not in rows]
    text = [
        intro,
        *markdown(head, lines),
        f"\n![win rate over labels]({stem.name}_win_rate.png)",
        "",
        *ratios(rows),
        "",
    ]
    if BASELINE in rows:
        text += [*(f"- {verdict.sentence}" for verdict in verdicts(rows, BASELINE)), ""]
    text += [code_of(rows), *([f"\nNot run yet: {', '.join(missing)}."] if missing else [])]
    stem.with_suffix(".md").write_text("\n".join(text) + "\n")
    stem.with_suffix(".json").write_text(json.dumps(rows_to_plain(rows, marks, TARGETS), indent=1) + "\n")
    if (figure := compare_win_rate(rows)) is not None:
        stem.with_name(f"{stem.name}_win_rate.png").write_bytes(png(figure))
    print("\n".join(markdown(head, lines)))


def main() -> None:
    """Run what is missing, then write the tables of the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=["agents"], choices=list(GROUPS))
    parser.add_argument("--rows", nargs="+", help="run only these rows of the groups")
    parser.add_argument("--worlds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--budget", type=int, default=USUAL_BUDGET)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; 0: none, only tables and plots")
    parser.add_argument("--again", action="store_true", help="run also what the JSON files in --results have already")
    parser.add_argument("--out", type=Path, default=Path("runs/sample-efficiency"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed: dict[Path, str] = {}
    for group in options.groups:
        jobs = jobs_of(group, options)
        known = {} if options.again else stored_runs(group, options)
        wanted = [
            job
            for name, own in jobs.items()
            if not options.rows or name in options.rows
            for job in own
            if not has_curve(job, known.get(name, []))
        ]
        if options.jobs:
            failed |= run_many(sorted(wanted, key=lambda job: job.settings["loop.seed"]), options.jobs, Lines())
        write(group, jobs, options)
    if failed:
        sys.exit("\n".join(f"{folder.name}: {why}" for folder, why in failed.items()))


if __name__ == "__main__":
    main()
