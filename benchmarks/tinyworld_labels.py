"""How many labels SEA and passive online DPO need on TinyWorld: whole runs through the real loop, fresh worlds.

    python benchmarks/tinyworld_labels.py [--worlds 10 11 12 13 14] [--budget 2000] [--out runs/tinyworld-labels]

A world is another hidden reward with its own initial policy, so a seed here is a world, a policy and a run. Worlds
0 to 9 are for development; settings were never tuned on the others. A run that is already in `--out` is not run again.

    passive       online DPO, two samples per prompt
    sea-paper     SEA as its paper says: gamma 0.7 after 1,000 labels, pseudo pairs are the selected ones
    sea           tuned_examples/sea_tinyworld.py: gamma 0.5 after 300 labels, pseudo pairs are extremes (not the paper)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import ray

import rayalign
from rayalign.env.tinyworld.build import backbone_dir
from rayalign.evaluate import over_seeds, paired_ratio
from rayalign.report import write_report
from rayalign.result import Result

BACKBONE = {"agent.features.backbone": str(backbone_dir())}
AGENTS = {
    "passive": ("passive", {}),
    "sea-paper": ("sea", BACKBONE),
    "sea": (
        "sea",
        {**BACKBONE, "agent.gamma_burn_in": 300, "agent.gamma_after": 0.5, "agent.synthetic_pairs": "extremes"},
    ),
}
TARGETS = (0.5, 0.55, 0.6, 0.65)


def one_run(name: str, world: int, budget: int, out: Path) -> Result:
    """The finished run of `name` in `world`, from disk if it is there."""
    folder = out / f"{name}-world{world}"
    if (folder / "result.json").exists():
        return Result.load(folder)
    if (folder / "config.yaml").exists():
        return rayalign.resume(folder)
    agent, settings = AGENTS[name]
    return rayalign.run(
        agent,
        "rayalign/TinyWorld-v0",
        budget=budget,
        seed=world,
        run_dir=folder,
        **{"env.seed": world, "evaluation.every": 128, "logging.progress": "off", **settings},
    )


def main() -> None:
    """Run what is missing, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/tinyworld-labels"))
    options = parser.parse_args()

    ray.init(include_dashboard=False, log_to_driver=False)
    results: dict[str, list[Result]] = {name: [] for name in options.agents}
    for world in options.worlds:
        for name in options.agents:
            result = one_run(name, world, options.budget, options.out)
            results[name].append(result)
            print(
                f"{name} world {world}: {result.initial_win_rate:.3f} -> {result.win_rate:.3f}",
                file=sys.stderr,
                flush=True,
            )
    ray.shutdown()

    print(f"{len(options.worlds)} worlds, {options.budget} labels; mean ± standard error over worlds")
    print("| agent | win rate before | after | " + " | ".join(f"labels to {t:.2f}" for t in TARGETS) + " |")
    print("|---" * (3 + len(TARGETS)) + "|")
    for name, runs in results.items():
        before, after = (
            over_seeds(rates) for rates in zip(*[(r.initial_win_rate, r.win_rate) for r in runs], strict=True)
        )
        cells = [name, f"{before.value:.3f} ± {before.stderr:.3f}", f"{after.value:.3f} ± {after.stderr:.3f}"]
        for target in TARGETS:
            labels = [run.labels_to(target) for run in runs]
            reached = [value for value in labels if value is not None]
            median = f"{np.median(reached):.0f}" if 2 * len(reached) > len(labels) else "-"
            cells.append(f"{median} ({len(reached)} of {len(labels)} reached it)")
        print("| " + " | ".join(cells) + " |")
    if "passive" in results:
        for name in results:
            for target in TARGETS if name != "passive" else ():
                pairs = [
                    (p.labels_to(target), r.labels_to(target))
                    for p, r in zip(results["passive"], results[name], strict=True)
                ]
                both = [(p, r) for p, r in pairs if p and r]
                if len(both) > 1:
                    passive, other = map(list, zip(*both, strict=True))
                    ratio = paired_ratio(passive, other)
                    print(
                        f"labels of passive / labels of {name} at {target:.2f}: {ratio.value:.2f} "
                        f"[{ratio.low:.2f}, {ratio.high:.2f}] over the {len(both)} worlds in which both reached it"
                    )
    page = write_report([run.path for runs in results.values() for run in runs], options.out / "comparison.html")
    print(f"report: {page}")


if __name__ == "__main__":
    main()
