"""Copies of runs: a snapshot of one that is held or at rest, and a branch that goes on from it with other settings.

    run A  --256 labels--> snapshot --> A goes on
                               +------> branch B: A's ledger, weights and posterior, another learning rate

Labels up to the snapshot were bought by A and are inherited by B (`rayalign.ledger.shared_budget`). What A's learner
and agent did since their last checkpoints is done again in B from the ledger, with B's settings.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from rayalign import config as settings
from rayalign.agents import make_agent
from rayalign.errors import ConfigError, DataError
from rayalign.ledger.ledger import Ledger
from rayalign.ledger.shared_budget import INHERITED
from rayalign.runs.config import RunConfig
from rayalign.runs.record import CONFIG
from rayalign.runs.resumable import FREE_TO_CHANGE

IDENTITY, FACTS = "identity.json", "snapshot.json"
LEARNER_STATE = "checkpoint_manager_snapshot.json"
NOT_COPIED = (
    "allowed_evaluations", "checkpoint", "tensorboard", "plots", "report.html", "preferences", "result.json", "learner",
    "wandb*", "mlflow*", "*.partial", IDENTITY, INHERITED,
)  # fmt: skip
"""What a run writes for others, or for its own end; the learner's folder is copied with more care."""
BRANCH_MAY_CHANGE = (
    *FREE_TO_CHANGE, "agent.", "learner.learning_rate", "learner.schedule", "learner.warmup_batches",
    "learner.max_grad_norm", "learner.updates_per_batch", "rollout.temperature", "rollout.top_p",
)  # fmt: skip
"""Settings in which a branch may differ from the run it is a copy of. AdamW's betas and weight decay are not among
them: they come back with the optimizer's state."""
BRANCH_KEEPS = ("agent.posterior.", "agent.features.", "agent.dropout.")
"""Of the agent's settings those that its stored state was made with."""


def identity(run_dir: Path) -> str:
    """The run's own name among its copies, made when it is first asked for."""
    file = run_dir / IDENTITY
    if not file.exists():
        file.write_text(json.dumps({"id": uuid.uuid4().hex}))
    return str(json.loads(file.read_text())["id"])


def snapshot(run_dir: Path, folder: Path, evaluations: int) -> None:
    """Copy what a run needs to go on into the empty `folder`. Nobody may be collecting meanwhile.

    `evaluations`: how many of them whoever will ask for the copy knows of.
    """
    for path in run_dir.iterdir():
        if any(path.match(pattern) for pattern in NOT_COPIED):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("*.partial"))
        else:
            shutil.copy2(path, folder / path.name)
    _copy_learner(run_dir / "learner", folder / "learner")
    with Ledger(folder / "ledger.arrow", read_only=True) as ledger:
        facts = {"id": identity(run_dir), "labels": ledger.committed, "open": ledger.num_outstanding}
    (folder / FACTS).write_text(json.dumps({**facts, "evaluations": evaluations}))


def _copy_learner(source: Path, target: Path, attempts: int = 5) -> None:
    """Ray Train's checkpoints and its list of them, of one and the same moment: it may just be adding one."""
    if not (source / LEARNER_STATE).exists():
        return
    for _ in range(attempts):
        text = (source / LEARNER_STATE).read_text()
        try:
            names = {row["checkpoint_dir_name"] for row in json.loads(text)["checkpoint_results"]}
            for name in names:
                shutil.copytree(source / name, target / name)
            (target / LEARNER_STATE).write_text(text)
            return
        except (FileNotFoundError, shutil.Error, ValueError):  # one was deleted, or the list half written
            shutil.rmtree(target, ignore_errors=True)
            time.sleep(0.5)
    raise DataError(f"the learner's checkpoints in {str(source)!r} could not be copied: they keep changing.")


def facts_of(folder: Path) -> dict[str, Any]:
    """What `snapshot` wrote down: the run's `id`, its `labels` (`open` ones unanswered), and `evaluations`."""
    return json.loads((folder / FACTS).read_text())


def branch(folder: Path, config: RunConfig) -> None:
    """Make `config.run_dir` a run that goes on from the snapshot in `folder`; it appears whole or not at all.

    Raises `ConfigError` where `config` differs from the run's in what a branch can't change, or where the run waits for
    answers: both would wait for them, and pay.
    """
    facts = facts_of(folder)
    if facts["open"]:
        raise ConfigError(
            f"the run that was copied to {folder} waits for {facts['open']} answers, as with people who label: a copy "
            "that goes on would ask for them again. Use a scheduler that copies no trials (ASHA, HyperBand)."
        )
    stored = settings.read_yaml((folder / CONFIG).read_text())
    before = settings.apply(RunConfig(agent=make_agent(stored["agent_name"]).config), stored, yaml_text=False)
    forbidden = [
        line
        for line in settings.diff(before, config)
        if not line.startswith(BRANCH_MAY_CHANGE) or line.startswith(BRANCH_KEEPS)
    ]
    if forbidden:
        raise ConfigError(
            f"a run that goes on from a copy of another can't change {'; '.join(forbidden)}. Mutate other settings: "
            f"{', '.join(BRANCH_MAY_CHANGE[len(FREE_TO_CHANGE) :])} (not {', '.join(BRANCH_KEEPS)})."
        )
    run_dir = Path(config.run_dir)
    building = run_dir.with_name(f".{run_dir.name}-{uuid.uuid4().hex[:8]}")
    shutil.copytree(folder, building)
    (building / FACTS).unlink()
    inherited = {"labels": facts["labels"], "evaluation_labels": _evaluation_labels(folder), "from": facts["id"]}
    (building / INHERITED).write_text(json.dumps(inherited))
    (building / CONFIG).write_text(settings.to_yaml(config))
    building.rename(run_dir)


def _evaluation_labels(folder: Path) -> int:
    if not (folder / "evaluation.arrow").exists():
        return 0
    with Ledger(folder / "evaluation.arrow", read_only=True) as ledger:
        return ledger.spent


def branched_from(run_dir: Path) -> tuple[str, int] | None:
    """Id of the run that this one is a copy of, and the labels of that moment; None for a run of its own."""
    file = run_dir / INHERITED
    if not file.exists():
        return None
    row = json.loads(file.read_text())
    return str(row["from"]), int(row["labels"])
