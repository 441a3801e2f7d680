"""Is exploration worth it here? The same prompts, budget, batch and evaluation for several agents, seed by seed.

rows: agents, tuned examples, agents with settings      checked: what has to be equal is equal
  -> a run per row and seed, side by side on the cluster, finished ones kept, interrupted ones resumed
  -> table, plot, ratio to the baseline with its interval, one sentence a row: console, JSON, Markdown, HTML
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rayalign import storage
from rayalign.agents import agent_class
from rayalign.config import flatten
from rayalign.errors import ConfigError, RayalignError
from rayalign.evaluation.evaluate import shown_targets
from rayalign.example import load_example, merged
from rayalign.loop import preparation
from rayalign.report.page import Table, render
from rayalign.report.several_runs import comparison_figures
from rayalign.report.standings import (
    RunCurve,
    Verdict,
    default_marks,
    markdown,
    ratio_cell,
    rows_to_plain,
    table,
    verdicts,
)
from rayalign.runs.recipe import settings_of, split_choices
from rayalign.runs.record import RunRecord
from rayalign.studies.bill import bill
from rayalign.studies.many import Job, Tell, run_many

FAIR = (
    "env", "env_kwargs.", "policy", "loop.budget", "loop.batch_size", "loop.epochs", "loop.max_staleness",
    "rollout.max_tokens", "rollout.max_prompt_tokens", "rollout.chat", "evaluation.", "oracle.",
)  # fmt: skip
"""What has to be equal in all rows. The agent's settings, the learner's and the sampling temperature are the row's."""
DEFAULT_ENV = "rayalign/TinyWorld-v0"


@dataclass(frozen=True, kw_only=True)
class Row:
    """An agent with its settings."""

    name: str
    agent: str
    settings: Mapping[str, Any]
    """By dotted names, without seed."""
    oracle: Any = None
    """The example's own, where it has one: a function, or the name of a kind."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came out; `Comparison.path` holds it as `comparison.json`, `.md` and `.html`, and the runs."""

    path: Path
    baseline: str
    budget: int
    runs: Mapping[str, Sequence[RunCurve]]
    """Row -> its finished runs."""
    verdicts: Sequence[Verdict]
    """One for each row but the baseline."""
    failed: Mapping[Path, str]
    """Run directory -> why it failed; calling again resumes it."""

    @property
    def sentences(self) -> list[str]:
        """The answers."""
        return [verdict.sentence for verdict in self.verdicts]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and cells: win rates, labels to targets, and the ratio to the baseline."""
        head, lines = table(self.runs, default_marks(self.budget), self.targets())
        ratios = {v.row: ratio_cell(v.saving) if v.saving else "–" for v in self.verdicts}
        return [*head, f"labels / {self.baseline}'s"], [[*cells, ratios.get(cells[0], "1")] for cells in lines]

    def targets(self) -> list[float]:
        """The last two targets that anybody reached, or those that were not."""
        rates = [rate for runs in self.runs.values() for run in runs for rate in run.win_rate if rate is not None]
        start = [run.win_rate[0] for runs in self.runs.values() for run in runs if run.win_rate and run.win_rate[0]]
        found = shown_targets(max((x for x in start if x is not None), default=0.0), max(rates, default=0.0))[:-1]
        used = [v.target for v in self.verdicts if v.target is not None]
        return sorted({*found[-1:], *used})


def compare(
    agents: Sequence[str] | Mapping[str, str | Mapping[str, Any]],
    env: str | None = None,
    *,
    seeds: int | Sequence[int] = 5,
    budget: int | None = None,
    baseline: str | None = None,
    target: float | None = None,
    world_per_seed: bool = False,
    policy: str | Path | None = None,
    oracle: Any = None,
    out: str | Path | None = None,
    parallel: int | None = None,
    announce: Callable[[str], None] | None = None,
    show: Tell | None = None,
    **overrides: Any,
) -> Comparison:
    """Run every row with every seed, and say what each is worth against the baseline.

    Args:
        agents: rows as `read_rows` takes them (`["passive", "sea=tuned_examples/sea_tinyworld.py"]`), or name -> agent,
            example file, or dict of settings with `agent` among them.
        env: registered id; default: that of the examples, else TinyWorld.
        seeds: how many (0, 1, ...), or which.
        budget: labels of each run.
        baseline: name of a row; default: the first.
        target: win rate at which labels are compared; default: the highest that the baseline reached with most seeds.
        world_per_seed: each seed is another world, too (`env.seed`), where the environment has such.
        policy: as in `rayalign.run`, for all rows.
        oracle: as in `rayalign.run`, for all rows.
        out: directory; the same call with the same directory keeps what is finished and resumes the rest.
        parallel: runs at the same time; default: as many as fit the cluster with all that they ask for.
        announce: is told in one line, before the first run starts, what all of them buy and what of it is paid.
        show: is told how the runs go; see `rayalign.studies.many.run_many`.
        **overrides: settings of all rows; they win over a row's own.

    Raises `ConfigError` before anything is bought: unknown names, rows that differ in what a fair comparison shares.
    """
    rows = read_rows(agents) if not isinstance(agents, Mapping) else [_row(k, v) for k, v in agents.items()]
    if not rows:
        raise ConfigError("agents is empty: name at least one, e.g. ['passive', 'sea'].")
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise ConfigError(f"agents={names} has a name twice: name rows apart, e.g. 'tuned=sea:agent.beta=0.2'.")
    first = baseline or names[0]
    if first not in names:
        raise ConfigError(f"baseline={first!r} is none of the rows: {', '.join(names)}.")
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"seeds={seeds!r} must be a number of at least 1, or seeds that differ.")
    common = {**merged(overrides), "logging.progress": "off"} | ({} if budget is None else {"loop.budget": budget})
    rows, env = _with_env(rows, env)
    oracle = _one_oracle(rows, oracle)
    plans = {row.name: _plan(row, env, policy, oracle, common, chosen[0], world_per_seed) for row in rows}
    _check_fair(plans)
    spent = plans[first].config.loop.budget
    storage.local_only(out, "out")
    folder = Path(storage.absolute(out or f"runs/compare-{env.rpartition('/')[2]}-{spent}"))
    jobs = {
        row.name: [_job(row, env, policy, oracle, common, seed, world_per_seed, folder) for seed in chosen]
        for row in rows
    }
    if announce is not None:
        announce(bill(jobs, plans))
    folder.mkdir(parents=True, exist_ok=True)
    failed = run_many([job for own in jobs.values() for job in own], parallel, show)
    found = {
        name: [RunCurve.of(RunRecord.read(job.folder)) for job in own if job.finished] for name, own in jobs.items()
    }
    done = {name: runs for name, runs in found.items() if runs}
    if first not in done:
        why = next(iter(failed.values()), "nothing was run")
        raise RayalignError(f"no run of the baseline {first!r} came to its end, so that nothing compares: {why}")
    comparison = Comparison(
        path=folder,
        baseline=first,
        budget=spent,
        runs=done,
        verdicts=verdicts(done, first, target),
        failed=failed,
    )
    write(comparison, {name: plan.config for name, plan in plans.items()})
    return comparison


# -- rows -----------------------------------------------------------------------------------------------------------
def read_rows(texts: Sequence[str] | str) -> list[Row]:
    """Rows as they are typed: `passive`, `sea=tuned_examples/sea_tinyworld.py`, `sea:agent.beta=0.2,agent.loss=ipo`,
    `strong=sea:agent.beta=0.2`; several in one text are parted by commas.

    >>> [(row.name, row.agent, row.settings) for row in read_rows("passive,strong=sea:agent.beta=0.2,agent.loss=ipo")]
    [('passive', 'passive', {}), ('strong', 'sea', {'agent.beta': '0.2', 'agent.loss': 'ipo'})]
    """
    rows: list[tuple[str, str, list[tuple[str, str]]]] = []
    for text in [texts] if isinstance(texts, str) else texts:
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, equals, value = part.partition("=")
            if rows and equals and re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", name):  # one more setting of the last row
                rows[-1][2].append((name, value))
                continue
            labelled = bool(equals) and ":" not in name
            what = value if labelled else part
            agent, colon, change = what.partition(":")
            setting, _, text_value = change.partition("=")
            label = name if labelled else (Path(agent).stem if agent.endswith(".py") else what)
            rows.append((label, agent, [(setting, text_value)] if colon else []))
    return [_row(name, what, changes) for name, what, changes in rows]


def _row(name: str, what: str | Mapping[str, Any], changes: Sequence[tuple[str, Any]] = ()) -> Row:
    """A row of an agent's name, an example file, or a dict of settings."""
    for setting, value in changes:
        if not setting or value == "":
            raise ConfigError(f"agents: the row {name!r} has {setting!r}={value!r}; write NAME:SETTING=VALUE,...")
    choices, others = split_choices(changes)
    if isinstance(what, str) and what.endswith(".py"):
        base = load_example(what, choices)
    else:
        base = settings_of({"agent": what} if isinstance(what, str) else what, choices)
    settings = merged(base, others)
    agent = settings.pop("agent", None)
    if not isinstance(agent, str):
        raise ConfigError(f"agents: the row {name!r} does not say which agent it is; set 'agent' to a registered name.")
    agent_class(agent)
    settings.pop("loop.seed", None)
    settings.pop("run_dir", None)
    return Row(name=name, agent=agent, oracle=settings.pop("oracle", None), settings=settings)


def _with_env(rows: Sequence[Row], env: str | None) -> tuple[list[Row], str]:
    """The rows without their env, which is one for all."""
    named = {row.name: row.settings["env"] for row in rows if "env" in row.settings}
    chosen = env or next(iter(named.values()), DEFAULT_ENV)
    for name, other in named.items():
        if other != chosen:
            raise ConfigError(f"agents: the row {name!r} is set for env={other!r}, the others for {chosen!r}.")
    return [replace(r, settings={k: v for k, v in r.settings.items() if k != "env"}) for r in rows], chosen


def _one_oracle(rows: Sequence[Row], oracle: Any) -> Any:
    """Who labels for all rows: what is asked for, else what an example names."""
    named = {row.name: row.oracle for row in rows if row.oracle is not None}
    chosen = next(iter(named.values()), None) if oracle is None else oracle
    for name, other in named.items():
        if _name_of(other) != _name_of(chosen):
            raise ConfigError(
                f"agents: the row {name!r} has an oracle of its own, {_name_of(other)}, and the others "
                f"{_name_of(chosen)}: whoever labels is one for all."
            )
    return chosen


def _read(text: str) -> Any:
    """What a text on the command line means."""
    try:
        value = yaml.safe_load(text)
        return float(value) if isinstance(value, str) else value  # YAML takes 1e-4 for a text
    except (yaml.YAMLError, ValueError):
        return text


def _name_of(oracle: Any) -> str:
    """Says which oracle it is, the same in every process: of a function its name and source, not what it closes over.

    Not its pickle, which depends on the process where the code has a set in it: a resumed comparison would buy anew.
    """
    if oracle is None or isinstance(oracle, str):
        return repr(oracle)
    name = f"{getattr(oracle, '__module__', '')}.{getattr(oracle, '__qualname__', type(oracle).__qualname__)}"
    try:
        source = inspect.getsource(oracle if callable(oracle) and hasattr(oracle, "__qualname__") else type(oracle))
    except (OSError, TypeError):  # built in, or typed at a prompt
        return name
    return f"{name}#{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _settings(row: Row, common: Mapping[str, Any], seed: int, world_per_seed: bool) -> dict[str, Any]:
    settings = {**row.settings, **common, "loop.seed": seed}
    return settings | ({"env.seed": seed} if world_per_seed else {})


def _job(
    row: Row, env: str, policy: Any, oracle: Any, common: Mapping[str, Any], seed: int, per_seed: bool, folder: Path
) -> Job:
    settings = _settings(row, common, seed, per_seed)
    policy = settings.pop("policy", None) if policy is None else str(policy)
    # Typed or in Python, 0.2 is 0.2.
    values = {k: _read(v) if isinstance(v, str) else v for k, v in sorted(settings.items())}
    meant = {k: repr(v) for k, v in values.items() if k not in ("loop.seed", "env.seed", "logging.progress")}
    told = [row.agent, env, policy, per_seed, meant, _name_of(oracle)]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]
    run_dir = folder / "runs" / f"{row.agent}-{digest}-seed{seed}"  # equal settings are one run, whatever the name
    return Job(folder=run_dir, agent=row.agent, env=env, policy=policy, oracle=oracle, settings=settings)


def _plan(
    row: Row, env: str, policy: Any, oracle: Any, common: Mapping[str, Any], seed: int, per_seed: bool
) -> preparation.Plan:
    """The checked plan of a row's first run."""
    try:
        plan = _job(row, env, policy, oracle, common, seed, per_seed, Path()).prepare()
        preparation.validate(plan)
    except RayalignError as error:
        raise type(error)(f"row {row.name!r}: {error}") from error
    return plan


def _check_fair(plans: Mapping[str, preparation.Plan]) -> None:
    """Raise `ConfigError` where rows differ in what has to be equal."""
    flat = {name: flatten(plan.config) for name, plan in plans.items()}
    (first, one), *others = flat.items()
    shared = [key for key in dict.fromkeys(k for values in flat.values() for k in values) if key.startswith(FAIR)]
    for name, values in others:
        for key in shared:
            if key.startswith("env_kwargs"):
                key = "env_kwargs"
            if one.get(key) != values.get(key):
                raise ConfigError(
                    f"rows {first!r} and {name!r} differ in {key}: {one.get(key)!r} and {values.get(key)!r}. A fair "
                    f"comparison shares it: give it to all rows, e.g. --set {key}={values.get(key)}."
                )


# -- what is written --------------------------------------------------------------------------------------------------
def write(comparison: Comparison, configs: Mapping[str, Any]) -> None:
    """`comparison.json`, `.md`, `.html` and the plot, in the comparison's directory."""
    from rayalign.report.plots import compare_win_rate, png  # matplotlib takes its time to load

    folder = comparison.path
    head, lines = comparison.table()
    differences = _differences(configs)
    plain = {
        "baseline": comparison.baseline,
        "budget": comparison.budget,
        "answers": {v.row: _answer(v) for v in comparison.verdicts},
        "settings_that_differ": differences,
        "failed": {path.name: why for path, why in comparison.failed.items()},
        "rows": rows_to_plain(comparison.runs, default_marks(comparison.budget)),
    }
    (folder / "comparison.json").write_text(json.dumps(plain, indent=1) + "\n")
    if (figure := compare_win_rate(comparison.runs)) is not None:
        (folder / "comparison_win_rate.png").write_bytes(png(figure))
    notes = _notes(comparison)
    others = ", ".join(name for name in comparison.runs if name != comparison.baseline)
    text = [f"# {others} against {comparison.baseline}", "", *(f"- {s}" for s in comparison.sentences), ""]
    text += [*markdown(head, lines), "", "![win rate over labels](comparison_win_rate.png)", "", NOTE, ""]
    text += ["What the rows differ in:", "", *markdown(["setting", *configs], _cells(differences, configs)), ""]
    (folder / "comparison.md").write_text("\n".join([*text, *(f"- {note}" for note in notes)]).rstrip() + "\n")
    _write_page(comparison, head, lines, differences, configs, notes)


NOTE = (
    "Means over runs with 95% bootstrap intervals over runs. Labels to a win rate: median over the runs that reached "
    "it, linear between evaluations. Ratios: geometric mean over pairs of runs with the same seed and world, with the "
    "wider of a bootstrap and a t interval, because few seeds make bootstrap intervals too narrow."
)


def _write_page(
    comparison: Comparison,
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    differences: Mapping[str, Mapping[str, Any]],
    configs: Mapping[str, Any],
    notes: Sequence[str],
) -> None:
    baseline = comparison.baseline
    answers = [(v.row, v.sentence) for v in comparison.verdicts]
    name = ", ".join(comparison.runs)
    tables = [
        Table("Answers", (), answers, f"Against {baseline}, in pairs of runs with the same seed."),
        Table("Numbers", tuple(head), [tuple(cells) for cells in lines], NOTE),
        Table("What the rows differ in", ("setting", *configs), [tuple(c) for c in _cells(differences, configs)]),
    ]
    first = comparison.runs[baseline][0].settings
    context = {
        "title": f"{name} on {first.get('env', '?')}",
        "subtitle": f"{comparison.budget:,} labels a run; the same prompts, batch and evaluation for all rows.",
        "warnings": notes,
        "cards": [],
        "tables": tables,
        "figures": comparison_figures(comparison.runs, comparison.path / "comparison-plots"),
        "samples": [],
        "settings": [(k, str(v)) for k, v in first.items() if k.startswith(FAIR)],
    }
    render(context, comparison.path / "comparison.html")


def _answer(verdict: Verdict) -> dict[str, Any]:
    saved = verdict.saving
    return {
        "sentence": verdict.sentence,
        "target": verdict.target,
        "told_apart": verdict.told_apart,
        "labels_ratio": _json_estimate(saved.ratio) if saved else None,
        "bound": saved.bound if saved else None,
        "reached": [saved.row_reached, saved.baseline_reached, saved.pairs] if saved else None,
        "win_rate_gain": _json_estimate(verdict.gain),
    }


def _json_estimate(values: Sequence[float]) -> list[float | None]:
    return [None if value != value else value for value in values]


def _differences(configs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Setting -> row -> value, of settings that are not the same in all rows."""
    flat = {name: flatten(config) for name, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    varied = {key: {name: values.get(key) for name, values in flat.items()} for key in keys if key != "run_dir"}
    return {key: found for key, found in varied.items() if len({repr(value) for value in found.values()}) > 1}


def _cells(differences: Mapping[str, Mapping[str, Any]], configs: Mapping[str, Any]) -> list[list[str]]:
    return [[key, *("–" if v[n] is None else str(v[n]) for n in configs)] for key, v in differences.items()]


def _notes(comparison: Comparison) -> list[str]:
    notes = [f"{path.name} failed: {why}" for path, why in comparison.failed.items()]
    code = {tuple(run.code) for runs in comparison.runs.values() for run in runs}
    if len(code) > 1:
        notes.append(
            f"The runs were made by different code: {', '.join(sorted(' then '.join(c) or '?' for c in code))}."
        )
    short = [name for name, runs in comparison.runs.items() if any(run.labels_spent < run.budget for run in runs)]
    if short:
        notes.append(f"Runs of {', '.join(short)} stopped before their budget was spent.")
    return notes
