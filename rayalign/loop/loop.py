"""`run` and `resume`: put the parts of a run in their places, wait, and hand over what came out.

            prompts (World)                                          labels are bought here
                  |                                                      |
   +--------------v-----------+   candidates   +-----------+   duels  +--v-----------------+
   | rollout pool             | -------------> | collector | -------> | oracle             |
   | Ray actors, vLLM         |                | + agent   |          | Ray Serve          |
   +--------------^-----------+                +-----^-----+          +--+-----------------+
                  | weights, version v               | observe           | preferences
   +--------------+-----------+   window             |                   |
   | learner                  | <---------------- ledger <---------------+
   | Ray Train, agent.loss    |   batch b: b - v <= max_staleness
   +--------------------------+

Who waits for whom: the collector waits at the window for weights that are fresh enough, the learner waits at
the window for batch b, the driver waits for the learner, and everybody's wait has a timeout and a message.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import ray

from rayalign import config as settings
from rayalign import storage
from rayalign.agents.agent import Agent
from rayalign.errors import WaitError
from rayalign.learner.train import LearnerSetup, make_trainer
from rayalign.loop.collector import Collector
from rayalign.loop.collector_client import CollectorClient
from rayalign.loop.online import OnlineCollector
from rayalign.loop.preparation import Asked, Plan, new_run, old_run, oracles
from rayalign.report.progress import Progress
from rayalign.report.report import write_report
from rayalign.rollout.replica import engine_name
from rayalign.runs.config import RunConfig
from rayalign.runs.dirs import (
    note_failed_start,
)
from rayalign.runs.preference_export import export_preferences
from rayalign.runs.resources import beside_group, check_nodes, plan, shares
from rayalign.runs.result import Result
from rayalign.runs.stored import StoredRun
from rayalign.serve import OracleClient, start_oracle, stop_oracle
from rayalign.serve.kinds import COLLECTORS, oracle_kind
from rayalign.system import share


def run(
    agent: str | Agent,
    env: str | gymnasium.Env = "rayalign/TinyWorld-v0",
    *,
    policy: str | Path | None = None,
    budget: int | None = None,
    seed: int | None = None,
    max_staleness: int | None = None,
    run_dir: str | Path | None = None,
    oracle: Any = None,
    **overrides: Any,
) -> Result:
    """Spend `budget` labels on aligning `policy` in `env` with `agent`.

    Args:
        agent: a registered name (`rayalign.list_agents()`) or an `Agent`.
        env: a registered id (`rayalign.list_envs()`) or a Gymnasium env made of one.
        policy: Hugging Face directory or id of the initial policy; default: the world's own.
        budget: labels to buy; never exceeded.
        seed: of everything random; with `max_staleness=0` on CPU the same seed writes the same ledger.
        max_staleness: batches that generation may run ahead of learning; 0 is the synchronous loop.
        run_dir: where the run is kept: a folder, or `s3://` or `gs://` with a bucket and a folder in it (see
            docs/clusters.md); default: a new folder under `runs/`.
        oracle: a function of yours (see `rayalign.serve.oracles`), a kind of oracle by name (`"human"`, `"users"`), or
            None for the `oracle.*` settings.
        **overrides: settings by section (`learner={"learning_rate": 1e-4}`) or by dotted name
            (`**{"learner.learning_rate": 1e-4}`); `rayalign settings` lists them.

    Returns:
        What came out: win rate, labels spent, preferences, checkpoint, and where everything is.

    Raises:
        ConfigError, DataError, ResourceError: before anything is bought.
        RayalignError: what stopped the run later; nothing bought is lost, `rayalign.resume(run_dir)` goes on.
    """
    top = {"loop.budget": budget, "loop.seed": seed, "loop.max_staleness": max_staleness}
    given = settings.flatten(overrides) | {name: value for name, value in top.items() if value is not None}
    return execute(new_run(agent, env, policy=policy, run_dir=run_dir, oracle=oracle, given=given))


def resume(run_dir: str | Path, **overrides: Any) -> Result:
    """Go on with an interrupted run, or with a finished one that got a larger `budget`.

    Raises:
        ConfigError: `run_dir` holds no run, or `overrides` change something that would make the bought labels
            mean something else.
    """
    found = old_run(run_dir, **overrides)
    if not isinstance(found, Result):
        return execute(found)
    config = StoredRun.read(found.path).config
    title = f"{config.agent_name} on {config.env} is finished; a larger budget goes on with it"
    Progress(config.logging, title=title, run_dir=storage.plain(run_dir)).summary(found)
    return found


# ==== the run ====================================================================================================
def execute(plan_: Plan, on_start: Callable[[CollectorClient], None] | None = None) -> Result:
    """Start the parts, wait for the learner, stop them in reverse.

    The collector starts its engines while the oracle is made here, and Ray Train after it: on their first label they
    meet. With GPUs the oracle comes first, as the shares of collocated roles are placed in order.
    `on_start` is handed the collector as soon as there is one: to look at the run, to hold it or to break it off.
    """
    run_dir = plan_.config.run_dir
    apps = [f"{kind}-{os.getpid()}-{time.time_ns()}" for kind in ("oracle", "evaluation")]
    with ExitStack() as stack:
        stack.callback(storage.release, run_dir)
        stack.enter_context(_explained(run_dir))
        title = f"{plan_.config.agent_name} on {plan_.config.env}"
        progress = Progress(plan_.config.logging, title=title, run_dir=storage.plain(run_dir))
        stack.callback(progress.close)
        progress.update({"phase": "starting Ray and the oracle", "budget": plan_.config.loop.budget})
        own_cluster = stack.enter_context(cluster())
        lent = share.in_group()  # others' runs may be beside this one
        config = placed(plan_.config, plan_.agent, plan_.set_by_user)
        for app in apps:
            # Our own cluster takes Serve with it; runs beside this one may be about to use it.
            stack.callback(stop_oracle, app, stop_serve=not own_cluster and not lent)
        asked, judging = oracles(plan_, config)
        oracle = judge = OracleClient(apps[0], asked[0])
        if judging is not None:
            judge = OracleClient(apps[1], judging[0])
        oracle_first = any(role.processes and role.gpus for role in shares(config, plan_.agent))
        if oracle_first:
            _start_oracles(asked, judging, apps, run_dir)
        online = oracle_kind(config.oracle.kind).online
        collector = CollectorClient.start(
            config,
            plan_.world,
            plan_.agent,
            oracle,
            judge,
            kind=OnlineCollector if online else Collector,
            name={"name": apps[0], "namespace": COLLECTORS} if online else None,
        )
        stack.callback(collector.close)
        if not oracle_first:
            _start_oracles(asked, judging, apps, run_dir)
        if on_start is not None:
            on_start(collector)
        setup = LearnerSetup(
            agent=plan_.agent,
            config=config.learner,
            policy=config.policy,
            source=collector,
            final_dir=storage.join(run_dir, "checkpoint"),
            publish="adapter" if takes_adapters(config) else "merged",
            seed=config.loop.seed,
        )
        with progress.following(lambda: collector.status(timeout_s=5.0)):
            fit(setup, config, run_dir, collector)
            status = wait_until_done(collector, config.loop.gate_timeout_s)
            collector.save()
        result = _finish(config, status)
        progress.summary(result)
        if storage.in_bucket(run_dir):
            print(f"everything is in {storage.plain(run_dir)}, and here a copy", file=sys.stderr, flush=True)
        return result


@contextmanager
def _explained(run_dir: str) -> Iterator[None]:
    """Whoever breaks the run off learns how it goes on; where there is nothing to go on with, its name is free."""
    try:
        yield
    except KeyboardInterrupt:
        where = storage.plain(run_dir)
        print(f"nothing bought is lost: `rayalign resume {where}` goes on", file=sys.stderr, flush=True)
        raise
    except Exception as error:
        note_failed_start(run_dir, error)
        raise


def _start_oracles(asked: Asked, judging: Asked | None, apps: Sequence[str], run_dir: str) -> None:
    start_oracle(*asked, name=apps[0], journal_dir=storage.join(run_dir, "oracle"))
    if notice := oracle_kind(asked[0].kind).notice(asked[0]):
        print(notice, file=sys.stderr, flush=True)
    if judging is not None:
        start_oracle(*judging, name=apps[1], journal_dir=storage.join(run_dir, "oracle-evaluation"))


def placed(config: RunConfig, agent: Agent, set_by_user: Collection[str]) -> RunConfig:
    """`config` with shares that fit what this process may use: the cluster, or its placement group."""
    config = plan(config, agent, share.resources(), set_by_user)
    if share.in_group():
        return beside_group(config)
    check_nodes(config, agent, ray.nodes())
    return config


def takes_adapters(config: RunConfig) -> bool:
    """Adapters alone travel to the engines where there are any and the engines can add them."""
    can = engine_name(config.rollout) == "transformers" or config.rollout.vllm.enable_lora
    return config.learner.lora.rank > 0 and can


@contextmanager
def cluster() -> Iterator[bool]:
    """Inside there is a Ray: the job's or the caller's, or one that is started here (True) and ends with the block."""
    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # our actors' environments are not those workers'
    joins = bool(os.environ.get("RAY_ADDRESS"))
    local: Mapping[str, Any] = {} if joins else {"include_dashboard": False}
    ray.init(log_to_driver=False, configure_logging=False, **local)
    try:
        yield not joins
    finally:
        ray.shutdown()


def fit(setup: LearnerSetup, config: RunConfig, run_dir: str | Path, collector: CollectorClient) -> None:
    """Run the learner to its end. The collector's error, if there is one, is the one to tell."""
    try:
        make_trainer(setup, config.learner, storage_path=str(run_dir), name="learner").fit()
    except Exception:
        collector.raise_failure()
        raise
    collector.raise_failure()


def wait_until_done(collector: CollectorClient, timeout_s: float) -> dict[str, Any]:
    """The learner is through; the collector still evaluates the final weights."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        status = collector.status()
        if status["phase"] in ("done", "failed"):
            collector.raise_failure()
            return status
        time.sleep(0.2)
    raise WaitError(f"waited {timeout_s:.0f} s for the final evaluation; raise loop.gate_timeout_s, then resume.")


def _finish(config: RunConfig, status: Mapping[str, Any]) -> Result:
    """Write what a run leaves behind: preferences, result, report."""
    folder = storage.gathered(config.run_dir)
    export_preferences(folder / "ledger.arrow", folder / "preferences", config.policy, config.rollout.chat)
    result = Result.of(
        folder,
        labels_spent=int(status["labels"]),
        warning=status.get("warning"),
        online=dict(status.get("online", {})),
    )
    if config.logging.report:
        write_report([folder])
    storage.publish_all(config.run_dir)
    return result
