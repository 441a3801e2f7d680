"""Searches over settings with Ray Tune: `trainable(...)` goes into `tune.Tuner` with any space, scheduler and searcher.

    Tuner  --config-->  RunTrainable                      a run in the trial's placement group
           <--result--  step()   lets the run go on to its next evaluation, and holds it there
                        save_checkpoint / load_checkpoint copies of the run, for pausing, restoring, PBT

Labels are what a search costs, so they are its clock (`time_attr="labels"`) and its limit (`max_labels`): every batch
of every trial is set aside in one file before it is bought. A trial that is stopped, paused or killed keeps its run
directory, and goes on from it: no label is bought twice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import tune
from ray.tune.execution.placement_groups import PlacementGroupFactory

from rayalign import storage
from rayalign.config import diff, flatten
from rayalign.errors import ConfigError, RayalignError
from rayalign.example import load_example, merged
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.shared_budget import create, inherited_labels
from rayalign.loop import preparation
from rayalign.loop.branch import branch, branched_from, facts_of, identity, snapshot
from rayalign.loop.guided import GuidedRun
from rayalign.runs.logs import read_evaluations
from rayalign.runs.record import CONFIG
from rayalign.runs.result import Result
from rayalign.runs.resumable import FREE_TO_CHANGE
from rayalign.studies.many import group_of, how_many_fit

CAP_FILE = "labels.jsonl"
NOTHING = "nothing"
"""In the checkpoint of a trial that has not begun."""
DEFAULT_ENV = "rayalign/TinyWorld-v0"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What all trials have in common."""

    agent: str
    env: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """By dotted names."""
    policy: str | None = None
    oracle: Any = None
    max_labels: int | None = None
    parallel: int | None = None
    folder: str | None = None

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a trial, by dotted names; the search space wins."""
        return {"logging.progress": "off", **self.fixed, **merged({}, flatten(config).items())}

    def plan(self, config: Mapping[str, Any], run_dir: Path) -> preparation.Plan:
        """The plan of a trial's run; nothing is written."""
        return preparation.prepare(self.agent, self.env, self.policy, run_dir, self.oracle, self.settings(config))

    def bundles(self, config: Mapping[str, Any]) -> list[dict[str, float]]:
        """The trial's placement group on the cluster that there is."""
        cluster = ray.cluster_resources()
        plan = self.plan(config, Path("unused"))
        return group_of(plan, cluster, self.parallel or how_many_fit(plan, cluster))


def trainable(
    agent: str,
    env: str | None = None,
    *,
    max_labels: int | None = None,
    parallel: int | None = None,
    policy: str | Path | None = None,
    oracle: Any = None,
    folder: str | Path | None = None,
    **fixed: Any,
) -> type[tune.Trainable]:
    """A run as Ray Tune's trials, for `tune.Tuner(rayalign.trainable("sea", budget=1000), param_space={...})`.

    A trial's config is settings by dotted or nested names, e.g. `{"agent.num_candidates": tune.choice([10, 20])}`. Each
    result is an evaluation: `win_rate`, `win_rate_stderr`, `regret` (where it is known), `labels` (that its weights
    were trained on), `labels_bought` (by this trial; one of PBT inherits others'), `evaluations`, `evaluation_labels`
    (bought to judge this trial's policies, counted apart), `run_dir`.

    Args:
        agent: a registered name, or the file of a tuned example.
        env: registered id; default: the example's, else TinyWorld.
        max_labels: cap on the labels of all trials together, restored and failed ones included; None: each trial has
            its `budget`, and nothing else limits them. Can be raised when a search is restored, not lowered. Labels
            of evaluation are not among them, as in a run.
        parallel: trials that shall fit the cluster at the same time: each gets its part. None: a trial gets all that a
            single run asks for.
        policy: as in `rayalign.run`.
        oracle: as in `rayalign.run`.
        folder: of the run directories and the labels' file, on a disk that all nodes see; default: Tune's own
            experiment directory.
        **fixed: settings of all trials, as in `rayalign.run`.

    Raises `ConfigError` for what is wrong in `fixed`. Tell `Tuner.restore` the same arguments.
    """
    storage.local_only(folder, "folder")
    base = load_example(agent) if agent.endswith(".py") else {"agent": agent}
    given = merged({**merged(base), **merged(fixed)})
    name, example_env = given.pop("agent"), given.pop("env", None)
    given.pop("run_dir", None)
    own_oracle = given.pop("oracle", None)
    search = Search(
        agent=name,
        env=env or example_env or DEFAULT_ENV,
        fixed=given,
        policy=None if policy is None else str(policy),
        oracle=own_oracle if oracle is None else oracle,
        max_labels=max_labels,
        parallel=parallel,
        folder=None if folder is None else storage.absolute(folder),
    )
    for key, value in (("max_labels", max_labels), ("parallel", parallel)):
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be at least 1.")
    preparation.validate(search.plan({}, Path("unused")))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # the Tuner starts Ray where nobody has
    return type(f"rayalign_{name}", (RunTrainable,), {"search": search})


class RunTrainable(tune.Trainable):
    """One trial. Use `trainable`, which knows what to run."""

    search: ClassVar[Search]

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory | None:
        """A placement group for all processes of the run; Tune starts as many trials as have one."""
        return PlacementGroupFactory(cls.search.bundles(config))

    def setup(self, config: dict[str, Any]) -> None:
        """Find the trial's folder; the run itself starts with the first step, when it is known what to go on from."""
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))  # relative paths in settings are the driver's
        root = self._root()
        self._trial = root / Path(self._storage.trial_fs_path).name
        self._trial.mkdir(parents=True, exist_ok=True)
        self._cap = root / CAP_FILE
        if self.search.max_labels is not None:
            create(self._cap, self.search.max_labels)
        self._guided: GuidedRun | None = None
        self._reported = 0
        """Evaluations that Tune knows of."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The process goes on with another trial (`reuse_actors`)."""
        self.cleanup()
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Let the run go on to its next evaluation, and hold it there."""
        run_dir = self._start()
        ended = True
        if self._guided is not None:
            self._guided.allow(self._reported + 1)
            ended = self._guided.wait_until_held()
        rows = read_evaluations(run_dir)
        if not rows:
            raise RayalignError(f"the run in {run_dir} ended without an evaluation.")
        self._reported = min(self._reported + 1, len(rows))
        return self._report(run_dir, rows[self._reported - 1], done=ended and self._reported == len(rows))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A copy of the run as it is held."""
        run_dir = self._current()
        if run_dir is None:
            (Path(checkpoint_dir) / NOTHING).touch()
        else:
            snapshot(run_dir, Path(checkpoint_dir), self._reported)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on with the trial's own run, or branch off another trial's.

        The own run directory may be further than the checkpoint: what was bought since is kept, and told again.
        """
        self.cleanup()
        folder = Path(checkpoint)
        if (folder / NOTHING).exists():
            return
        facts = facts_of(folder)
        self._reported = int(facts["evaluations"])
        current = self._current()
        if current is not None and self._is_continued_by(current, facts):
            return
        branch(folder, self._plan(self._trial / f"run-{self._count()}").config)

    def cleanup(self) -> None:
        """Break the run off; its directory stays and can be resumed."""
        if self._guided is not None:
            self._guided.stop("stopped by Ray Tune; its directory can be resumed")
            self._guided = None

    # -- inside ---------------------------------------------------------------------------------------------------
    def _root(self) -> Path:
        if self.search.folder is not None:
            return Path(self.search.folder)
        path = Path(self._storage.experiment_fs_path)
        if type(self._storage.storage_filesystem).__name__ != "LocalFileSystem" or not path.is_absolute():
            raise ConfigError(
                f"Ray Tune's storage {self._storage.experiment_fs_path!r} is no directory that runs can write to; name "
                "one with rayalign.trainable(folder=...), on a disk that all nodes see."
            )
        return path

    def _settings(self) -> dict[str, Any]:
        shared = {"loop.shared_budget": str(self._cap)} if self.search.max_labels is not None else {}
        return {**self.config, **shared}

    def _plan(self, run_dir: Path) -> preparation.Plan:
        return self.search.plan(self._settings(), run_dir)

    def _count(self) -> int:
        return len(list(self._trial.glob("run-*")))

    def _current(self) -> Path | None:
        """The newest run directory of the trial."""
        found = self._trial / f"run-{self._count() - 1}"
        return found if found.exists() else None

    def _is_continued_by(self, run_dir: Path, facts: Mapping[str, Any]) -> bool:
        """Whether `run_dir` is the run of the checkpoint, or already the branch of it, with the settings of now."""
        same = identity(run_dir) == facts["id"] or branched_from(run_dir) == (facts["id"], facts["labels"])
        if not same:
            return False
        found = preparation.old_run(run_dir)
        if isinstance(found, Result):
            return True
        changes = diff(found.config, self._plan(run_dir).config)
        return all(line.startswith(FREE_TO_CHANGE) for line in changes)

    def _start(self) -> Path:
        """The run directory, with the run going on in it unless it is finished."""
        run_dir = self._current() or self._trial / "run-0"
        if self._guided is not None:
            return run_dir
        if (run_dir / CONFIG).exists():
            found = preparation.old_run(run_dir)
        else:
            what = self.search
            found = preparation.new_run(
                what.agent,
                what.env,
                policy=what.policy,
                run_dir=run_dir,
                oracle=what.oracle,
                given=what.settings(self._settings()),
            )
        identity(run_dir)
        if isinstance(found, preparation.Plan):
            self._guided = GuidedRun(found, allowed=self._reported + 1)
        return run_dir

    def _bought(self, ledger: str, kind: str) -> int:
        """Labels that the trial has paid for: by its run, and by those it gave up for a copy of another trial's."""
        total = 0
        for file in self._trial.glob(f"run-*/{ledger}"):
            with Ledger(file, read_only=True) as opened:
                total += opened.spent - inherited_labels(file.parent, kind)
        return total

    def _report(self, run_dir: Path, row: Mapping[str, Any], done: bool) -> dict[str, Any]:
        values = {
            "win_rate": row.get("win_rate"),
            "win_rate_stderr": row.get("stderr"),
            "regret": row.get("regret_mean"),
            "best_of_n_win_rate": row.get("best_of_n_win_rate"),
        }
        return {
            "labels": int(row["labels"]),
            "labels_bought": self._bought("ledger.arrow", "labels"),
            "evaluation_labels": self._bought("evaluation.arrow", "evaluation_labels"),
            "evaluations": self._reported,
            "run_dir": str(run_dir),
            **{name: float(value) for name, value in values.items() if value is not None},
            "done": done,
        }
