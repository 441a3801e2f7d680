"""AE-Borda against its baselines on random functions (Mehta et al., Figure 2), and norms of these functions (Table 1).

    python benchmarks/borda_rff.py                                  all of it, kernel ridge regression
    python benchmarks/borda_rff.py --posteriors krr theorem gp      the paper's Bernoulli GP as well (slow)

Figure 2: contexts and actions in one dimension, 500 labels, 25 of them at random, three strategies on the same ten
functions, which offer and answer with the same seeds. Regret is r*(x) - r(x, policy(x)), exact, on a net of contexts:
its median and its maximum over them. Table 1: how often the Borda function's norm is below the reward's, over 1,000
functions. What is in `--out` is not computed again; the page, the plot and the numbers go to `--results`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
from scipy.linalg import cho_factor, cho_solve

import rayalign.env  # noqa: F401  # registers the environment
from rayalign.agents.borda import PESSIMISMS, STRATEGIES, BordaBandit, BordaConfig
from rayalign.agents.posteriors.kernel import BernoulliGP, BernoulliGPConfig, KernelConfig, KernelRidge, rbf
from rayalign.env.rff import FourierReward, net

NAMES = {"ae": "AE-Borda", "ucb": "UCB-Borda", "uniform": "Uniform-Borda"}
EVERY = 25
LENGTHSCALE = 0.3  # of the functions: the theory takes the kernel as known

KERNEL = KernelConfig(kernel="rbf", lengthscale=LENGTHSCALE, regularization=0.25)
"""A label is a coin flip, whose variance is at most 1/4."""
BORDA = {
    "krr": BordaConfig(schedule="constant", width=1.0),
    "theorem": BordaConfig(schedule="theorem", norm_bound=2.0, failure_probability=0.1),
    "gp": BordaConfig(schedule="constant", width=1.0),
}
TITLES = {
    "krr": "Kernel ridge regression",
    "theorem": "Kernel ridge regression, width of Theorem 4.3",
    "gp": "Bernoulli GP",
}
GP = BernoulliGPConfig(lengthscale=0.3, steps_per_label=1)
NETS = {"krr": (50, 81), "theorem": (50, 81), "gp": (32, 51)}
"""Contexts and actions."""

TABLE = [(0, 1), (1, 1), (1, 3), (3, 1), (3, 3), (10, 10)]
PAPER = [(0.16, -6.3), (0.89, 5.1), (1, 21.4), (1, 21.5), (1, 38.7), (1, 19.6)]
REGULARIZERS = (1e-3, 1e-4, 1e-6)
POINTS, OPPONENTS, SAME_POINTS = 1000, 256, 250


# -- Figure 2 ---------------------------------------------------------------------------------------------------------
def one_run(posterior: str, strategy: str, seed: int, labels: int) -> dict[str, Any]:
    """Regret every 25 labels: median, mean and maximum over contexts."""
    start = time.process_time()
    env: Any = gym.make("rayalign/RFF-v0", lengthscale=LENGTHSCALE, seed=seed).unwrapped
    contexts_PD, actions_ND = (net(1, size) for size in NETS[posterior])
    learner = BernoulliGP(GP, 2, seed=seed) if posterior == "gp" else KernelRidge(KERNEL, 2)
    bandit = BordaBandit(replace(BORDA[posterior], strategy=strategy), learner, contexts_PD, actions_ND)
    best_P, _ = env.reward.best(contexts_PD)
    values_PN = env.reward.table(contexts_PD, actions_ND)
    rng = np.random.default_rng([seed, 1])
    context, _ = env.reset(seed=seed)
    curve: dict[str, list[float]] = {"labels": []}
    for t in range(1, labels + 1):
        action = bandit.ask(context, rng)
        context, label, *_ = env.step(action)
        bandit.tell(action, label)
        if t % EVERY == 0:
            curve["labels"].append(t)
            for pessimism in PESSIMISMS:
                regret_P = best_P - values_PN[np.arange(len(best_P)), bandit.policy(pessimism)]
                for name, of in (("median", np.median), ("mean", np.mean), ("max", np.max)):
                    curve.setdefault(f"{name}_{pessimism}", []).append(float(of(regret_P)))
    floor = float((best_P - values_PN.max(axis=1)).max())
    chance = float(np.median(best_P - values_PN.mean(axis=1)))
    return {
        **curve,
        "width": bandit.width,
        "net_floor": floor,
        "median_of_chance": chance,
        "cpu_seconds": time.process_time() - start,
    }


# -- Table 1 ----------------------------------------------------------------------------------------------------------
def norms(dims: tuple[int, int], functions: int) -> dict[str, list[list[float]]]:
    """RKHS norms of reward and Borda function, a pair a function: `sqrt(a' K a)` with `a = (K + reg I)^-1 f`."""
    context_dim, action_dim = dims
    found: dict[str, list[list[float]]] = {str(reg): [] for reg in REGULARIZERS}
    for first in range(0, functions, SAME_POINTS):
        rng = np.random.default_rng([first, *dims])
        contexts_RD, actions_RD = rng.random((POINTS, context_dim)), rng.random((POINTS, action_dim))
        opponents_ND = rng.random((OPPONENTS, action_dim))
        values = []
        for seed in range(first, min(functions, first + SAME_POINTS)):
            reward = FourierReward(context_dim, action_dim, lengthscale=LENGTHSCALE, seed=seed)
            values += [
                reward(contexts_RD, actions_RD),
                reward.borda(contexts_RD, actions_RD, opponents_ND=opponents_ND),
            ]
        values_RF = np.stack(values, axis=1)
        points_RD = np.hstack([contexts_RD, actions_RD])
        kernel_RR = rbf(points_RD, points_RD, LENGTHSCALE)
        for reg in REGULARIZERS:
            weights_RF = cho_solve(cho_factor(kernel_RR + reg * np.eye(POINTS)), values_RF)
            squares_F = np.einsum("rf,rf->f", weights_RF, kernel_RR @ weights_RF)
            found[str(reg)] += np.sqrt(np.maximum(squares_F, 0)).reshape(-1, 2).tolist()
    return found


# -- the page ---------------------------------------------------------------------------------------------------------
def spread(values: Any) -> str:
    """Mean and standard error over functions."""
    array = np.asarray(values, dtype=float)
    return f"{array.mean():.3f} ± {array.std(ddof=1) / np.sqrt(len(array)):.3f}"


def figure(runs: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Mean over functions of median and maximum regret, bands of one standard error; a row per posterior."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(len(runs), 2, figsize=(9, 3.2 * len(runs)), squeeze=False, layout="constrained")
    for row, (posterior, of_posterior) in zip(axes, runs.items(), strict=True):
        for axis, which in zip(row, ("median", "max"), strict=True):
            for color, (strategy, of_strategy) in enumerate(of_posterior.items()):
                for pessimism, style in (("ever", "-"), ("last", "--")):
                    curves = np.array([run[f"{which}_{pessimism}"] for run in of_strategy])
                    x, mean = of_strategy[0]["labels"], curves.mean(axis=0)
                    label = NAMES[strategy] if pessimism == "ever" else None
                    axis.plot(x, mean, style, color=f"C{color}", label=label)
                    if pessimism == "ever":
                        error = curves.std(axis=0, ddof=1) / np.sqrt(len(curves))
                        axis.fill_between(x, mean - error, mean + error, color=f"C{color}", alpha=0.2, linewidth=0)
            axis.set(xlabel="labels", ylabel=f"{which} regret over contexts", title=TITLES[posterior])
            axis.set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    plt.savefig(path, dpi=120)


def figure_table(of_posterior: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Regrets on the way and at the end, and paired differences at the end."""
    labels = next(iter(of_posterior.values()))[0]["labels"]
    at = sorted({labels.index(min(labels, key=lambda n, share=share: abs(n - share * labels[-1]))) for share in SHARES})
    head = [f"{which} at {labels[i]}" for which in ("median", "maximum") for i in at]
    lines = ["| strategy | policy | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
    for pessimism, policy in (("ever", "eq. 5"), ("last", "last bound")):
        for strategy, runs in of_posterior.items():
            cells = [spread([run[f"{of}_{pessimism}"][i] for run in runs]) for of in ("median", "max") for i in at]
            lines.append(f"| {NAMES[strategy]} | {policy} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "AE-Borda minus a baseline, function by function (negative: AE-Borda is better; in brackets on how many of the",
        "functions); at the end, and averaged over the run:",
        "",
        "| baseline | policy | median at the end | maximum at the end | median over the run | maximum over the run |",
        "|---" * 6 + "|",
    ]
    for pessimism, policy in (("ever", "eq. 5"), ("last", "last bound")):
        for other in ("ucb", "uniform"):
            cells = []
            for pick in (lambda curve: curve[-1], np.mean):
                for of in ("median", "max"):
                    ours, theirs = (
                        np.array([pick(run[f"{of}_{pessimism}"]) for run in of_posterior[strategy]])
                        for strategy in ("ae", other)
                    )
                    cells.append(f"{spread(ours - theirs)} ({int((ours < theirs).sum())} of {len(ours)})")
            lines.append(f"| {NAMES[other]} | {policy} | " + " | ".join(cells) + " |")
    return lines


SHARES = (0.2, 0.5, 1.0)


def norm_table(table: dict[tuple[int, int], dict[str, list[list[float]]]]) -> list[str]:
    """Table 1 beside the paper's."""
    regs = " | ".join(f"win rate, margin (reg {reg:g})" for reg in REGULARIZERS)
    lines = [f"| context dim | action dim | functions | paper | {regs} |", "|---" * (4 + len(REGULARIZERS)) + "|"]
    for (dims, found), (rate, margin) in zip(table.items(), PAPER, strict=True):
        cells = []
        for reg in REGULARIZERS:
            norms_F2 = np.array(found[str(reg)])
            difference = norms_F2[:, 0] - norms_F2[:, 1]
            cells.append(f"{(difference > 0).mean():.2f}, {difference.mean():.1f}")
        lines.append(
            f"| {dims[0]} | {dims[1]} | {len(found[str(REGULARIZERS[0])])} | {rate:.2f}, {margin} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def kept(path: Path, compute: Callable[[], Any]) -> Any:
    """What the file holds, or what is computed now and then kept in it."""
    if not path.exists():
        content = json.dumps(compute())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".partial").write_text(content)
        path.with_suffix(".partial").rename(path)
    return json.loads(path.read_text())


def main() -> None:
    """Compute what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", type=int, default=10)
    parser.add_argument("--labels", type=int, default=500)
    parser.add_argument("--posteriors", nargs="+", default=["krr", "theorem"], choices=list(TITLES))
    parser.add_argument("--table-functions", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("runs/borda-rff"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    options = parser.parse_args()

    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for posterior in options.posteriors:
        runs[posterior] = {strategy: [] for strategy in STRATEGIES}
        for seed in range(options.functions):
            for strategy in STRATEGIES:
                path = options.out / f"{posterior}-{strategy}-{seed}-{options.labels}.json"
                run = kept(path, lambda p=posterior, s=strategy, f=seed: one_run(p, s, f, options.labels))
                runs[posterior][strategy].append(run)
            print(posterior, "function", seed, {s: round(r[-1]["max_ever"][-1], 3) for s, r in runs[posterior].items()})
    table = {}
    for dims in TABLE:
        path = options.out / f"norms-{dims[0]}-{dims[1]}-{options.table_functions}.json"
        table[dims] = kept(path, lambda d=dims: norms(d, options.table_functions))
        print("norms", dims, flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    write_page(runs, table, options)


def write_page(runs: dict[str, Any], table: dict[tuple[int, int], Any], options: argparse.Namespace) -> None:
    """Markdown, plot and numbers."""
    figure(runs, options.results / "borda_rff.png")
    numbers = {"figure_2": runs, "table_1": {f"{c}+{a}": norms for (c, a), norms in summary(table).items()}}
    rounded = json.loads(json.dumps(numbers), parse_float=lambda text: round(float(text), 5))
    (options.results / "borda_rff.json").write_text(json.dumps(rounded) + "\n")
    first = next(iter(runs.values()))["ae"]
    lines = [
        *INTRODUCTION.format(
            functions=options.functions,
            last=options.functions - 1,
            labels=options.labels,
            cores=os.cpu_count(),
            machine=platform.machine(),
            floor=max(run["net_floor"] for run in first),
            chance=np.mean([run["median_of_chance"] for run in first]),
            ls=LENGTHSCALE,
        ).splitlines(),
        "",
    ]
    for posterior, of_posterior in runs.items():
        seconds = np.mean([run["cpu_seconds"] for of_one in of_posterior.values() for run in of_one])
        lines += [
            f"### {TITLES[posterior]}",
            SETTINGS[posterior] + f" A run takes {seconds:.0f} s of CPU.",
        ]
        lines += ["", *figure_table(of_posterior), ""]
    lines += [*TABLE_TEXT.splitlines(), "", *norm_table(table), ""]
    notes = options.results / "borda_rff_notes.md"
    lines += notes.read_text().splitlines() if notes.exists() else []
    (options.results / "borda_rff.md").write_text("\n".join(lines).rstrip() + "\n")


def summary(table: dict[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
    """Win rate, win margin and mean norms instead of thousands of numbers."""
    result: dict[tuple[int, int], Any] = {}
    for dims, found in table.items():
        result[dims] = {}
        for reg, values in found.items():
            array = np.array(values)
            wins = float((array[:, 0] > array[:, 1]).mean())
            reward, borda = array.mean(axis=0).tolist()
            result[dims][reg] = {"win_rate": wins, "win_margin": reward - borda, "reward": reward, "borda": borda}
    return result


INTRODUCTION = """\
# AE-Borda on random functions
What Mehta et al. (Sample Efficient Preference Alignment in LLMs via Active Exploration) show in Figure 2 and Table 1.
```
python benchmarks/borda_rff.py
```
Machine: {cores} CPU cores ({machine}), one process. Functions: `rayalign/RFF-v0`, seeds 0 to {last}.
Every strategy meets the same functions, offered contexts and random numbers.

## Figure 2: regret of the pessimistic policy
{functions} functions of a context and an action in one dimension, {labels} labels, the first 25 on random pairs.
Mean ± standard error over functions. A random action has a median regret of {chance:.2f}; the best action of the net is
at most {floor:.4f} worse than the best of all. Policies: the greatest lower bound so far (eq. 5; solid, with bands), or
that of the last posterior (dashed).

![regret over labels](borda_rff.png)
"""

SETTINGS = {
    "krr": f"Squared exponential kernel of the functions' own lengthscale ({LENGTHSCALE}), lambda "
    f"{KERNEL.regularization}, bounds of {BORDA['krr'].width} standard deviations,\n{NETS['krr'][0]} contexts and "
    f"{NETS['krr'][1]} actions.",
    "theorem": f"The same, with beta_t of Lemma B.1 for B = {BORDA['theorem'].norm_bound} and delta = "
    f"{BORDA['theorem'].failure_probability}.",
    "gp": "GPyTorch's variational classifier with a Matern 5/2 kernel whose parameters are learned, "
    f"{GP.inducing_points} inducing points,\n{GP.steps_per_label} Adam step a label, bounds of {BORDA['gp'].width} "
    f"standard deviations, {NETS['gp'][0]} contexts and {NETS['gp'][1]} actions.",
}

TABLE_TEXT = """\
## Table 1: norms of reward and Borda function
1,000 points, kernel ridge regression with three regularizers (the paper does not name its own); Borda values are means
over 256 random opponents. A win: the Borda function has the smaller norm. The margin is the mean of the reward's norm
minus the Borda function's. Lengthscale and scale of the functions, which the paper does not name either, were chosen
among eight pairs so that this table comes near to the paper's (5 to 12 functions each)."""


if __name__ == "__main__":
    main()
