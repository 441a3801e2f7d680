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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import ray
from ray import cloudpickle

from rayalign import config as settings
from rayalign import storage
from rayalign.agents import agent_class
from rayalign.agents.agent import Agent
from rayalign.env import make_world, read_keywords
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, WaitError, did_you_mean
from rayalign.learner.train import LearnerSetup, make_trainer
from rayalign.learner.train import validate as validate_learner
from rayalign.ledger.ledger import Ledger
from rayalign.loop.collector import ALLOWED, Collector
from rayalign.loop.collector_client import CollectorClient
from rayalign.loop.heldout import against
from rayalign.loop.online import OnlineCollector, check_online
from rayalign.models import resolve_policy
from rayalign.report.progress import Progress
from rayalign.report.report import write_report
from rayalign.rollout.encode import PromptEncoder
from rayalign.rollout.replica import engine_name
from rayalign.runs.config import RunConfig
from rayalign.runs.dirs import (
    FAILED_START,
    default_name,
    new_folder,
    note_failed_start,
    refuse_old,
    released_on_error,
    set_aside,
    write_config,
)
from rayalign.runs.logs import read_evaluations
from rayalign.runs.logs import validate as validate_logging
from rayalign.runs.preference_export import export_preferences
from rayalign.runs.record import CONFIG
from rayalign.runs.resources import beside_group, check_nodes, plan, shares
from rayalign.runs.result import Result
from rayalign.runs.resumable import check_budget, check_changes
from rayalign.runs.stored import CUSTOM_INPUTS, POLICY_NAME, StoredRun
from rayalign.serve import OracleClient, OracleConfig, start_oracle, stop_oracle
from rayalign.serve.kinds import COLLECTORS, ORACLES, oracle_kind
from rayalign.serve.oracles import oracle_factory
from rayalign.system import code_version, share


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that was checked and not yet started."""

    config: RunConfig
    world: World
    agent: Agent
    oracle: Any = None
    """A callable of the user's, or None for what `config.oracle` says."""
    set_by_user: frozenset[str] = field(default_factory=frozenset)


_Asked = tuple[OracleConfig, Callable[[], Oracle]]


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


# ==== before anything is started ===============================================================================
def new_run(
    agent: str | Agent,
    env: str | gymnasium.Env,
    *,
    policy: str | Path | None = None,
    run_dir: str | Path | None = None,
    oracle: Any = None,
    given: Mapping[str, Any],
) -> Plan:
    """The checked plan of `run`, written to its directory; `given` are settings by dotted names."""
    plan_ = prepare(agent, env, policy, run_dir, oracle, dict(given))
    named = bool(run_dir or given.get("run_dir"))
    if named:
        refuse_old(plan_.config.run_dir)
    validate(plan_)
    if named:
        set_aside(plan_.config.run_dir)
    mine = storage.take(plan_.config.run_dir) if named else new_folder(plan_.config.run_dir)
    plan_ = replace(plan_, config=replace(plan_.config, run_dir=mine))
    custom = {
        "world": None if isinstance(env, str) else plan_.world,
        "agent": None if isinstance(agent, str) else plan_.agent,
        "oracle": plan_.oracle,
    }
    with released_on_error(mine):
        if storage.in_bucket(mine):
            refuse_old(mine)  # somebody may have been faster
        folder = storage.folder_of(mine)
        folder.mkdir(parents=True, exist_ok=True)
        if any(value is not None for value in custom.values()):
            (folder / CUSTOM_INPUTS).write_bytes(cloudpickle.dumps(custom))
        (folder / POLICY_NAME).write_text(str(policy or given.get("policy") or ""))
        write_config(plan_.config)
        storage.publish_all(mine)
    return plan_


def old_run(run_dir: str | Path, **overrides: Any) -> Plan | Result:
    """The checked plan of `resume`, or the result where nothing is left to do."""
    mine = storage.resume(run_dir, CONFIG)
    with released_on_error(mine):
        found = _old_run(mine, **overrides)
    if isinstance(found, Result):
        storage.release(mine)
    return found


def _old_run(run_dir: str, **overrides: Any) -> Plan | Result:
    stored = StoredRun.read(storage.folder_of(run_dir))
    folder, config, where = stored.path, stored.config, storage.plain(run_dir)
    if stored.is_replay:
        raise ConfigError(
            f"run_dir={where!r} holds a replay, which buys nothing. `rayalign replay` with the same arguments "
            "and the same run_dir goes on with it."
        )
    given = settings.flatten(overrides)
    changed = settings.apply(config, {"loop.budget" if k == "budget" else k: v for k, v in given.items()})
    check_changes(config, changed, where)
    if (folder / "ledger.arrow").exists():
        with Ledger(folder / "ledger.arrow", read_only=True) as ledger:
            check_budget(config, changed, ledger, where)
    config = replace(changed, run_dir=storage.absolute(run_dir))
    if (folder / "result.json").exists():
        result = Result.load(folder)
        if config.loop.budget <= result.labels_spent:
            storage.gathered(run_dir)
            return result
    world = stored.world()
    plan_ = Plan(config=config, world=world, agent=type(stored.agent)(config.agent), oracle=stored.oracle)
    validate(plan_)
    (folder / ALLOWED).unlink(missing_ok=True)  # who guided it may be gone, and would not let it on
    for stale in ("result.json", FAILED_START):
        (folder / stale).unlink(missing_ok=True)
    write_config(config)
    storage.publish(run_dir, CONFIG, code_version.NAME, "result.json")
    return plan_


def prepare(
    agent: str | Agent,
    env: str | gymnasium.Env,
    policy: str | Path | None,
    run_dir: str | Path | None,
    oracle: Any,
    given: dict[str, Any],
    *,
    weights: bool = True,
) -> Plan:
    """Settings from the classes' defaults, then the world's, then the user's; everything checked.

    Without `weights` the policy is not going to be loaded: its config and tokenizer are all that is fetched.
    """
    env_kwargs = {name.removeprefix("env."): given.pop(name) for name in list(given) if name.startswith("env.")}
    env_kwargs = read_keywords(env, env_kwargs)
    world = make_world(env, **env_kwargs)
    name = agent if isinstance(agent, str) else agent.name or type(agent).__name__
    kind = agent_class(agent) if isinstance(agent, str) else type(agent)
    config = RunConfig(
        agent_name=name,
        env=env if isinstance(env, str) else world.id,
        env_kwargs=env_kwargs,
        agent=kind.Config() if isinstance(agent, str) else agent.config,
    )
    known = {setting.name for setting in settings.describe(config)}
    config = settings.apply(config, {k: v for k, v in world.defaults().items() if k in known})
    given, oracle = _named_oracle(given, oracle)
    asked = oracle_kind(given.get("oracle.kind", config.oracle.kind))
    config = settings.apply(config, asked.defaults)
    if asked.online and world.has_truth:
        config = settings.apply(config, {"evaluation.oracle": OracleConfig(kind="world")})
    config = settings.apply(config, given)
    policy = str(policy or config.policy or world.default_policy() or "")
    if not policy:
        raise ConfigError(
            f"policy is not set, and {config.env} has no policy of its own; name a Hugging Face directory or id."
        )
    folder = storage.absolute(run_dir or config.run_dir or default_name(config))
    config = replace(config, policy=str(resolve_policy(policy, weights=weights)), run_dir=folder)
    return Plan(config=config, world=world, agent=kind(config.agent), oracle=oracle, set_by_user=frozenset(given))


def _named_oracle(given: dict[str, Any], oracle: Any) -> tuple[dict[str, Any], Any]:
    """`oracle="human"` is `oracle.kind=human`, and `oracle="package.module:function"` a function, by their settings."""
    if not isinstance(oracle, str):
        return given, oracle
    if oracle in ORACLES:
        named = {"oracle.kind": oracle}
    elif ":" in oracle:
        named = {"oracle.kind": "function", "oracle.target": oracle}
    else:
        raise ConfigError(
            f"oracle={oracle!r} is neither a kind of oracle nor 'package.module:function'. "
            f"{did_you_mean(oracle, ORACLES)}"
        )
    for name, value in named.items():
        if given.get(name, value) != value:
            raise ConfigError(f"oracle={oracle!r} says {name}={value}, but {name}={given[name]} is set: choose one.")
    return given | named, None


def _oracles(plan_: Plan, config: RunConfig) -> tuple[_Asked, _Asked | None]:
    """Who labels, and who judges the evaluation if it is somebody else: config, and what makes it in a replica."""
    folder = storage.folder_of(config.run_dir)
    asked = _complete(config.oracle, folder)
    labels = asked, oracle_factory(asked, plan_.world, plan_.oracle)
    if config.evaluation.oracle is None:
        return labels, None
    judge = _complete(config.evaluation.oracle, folder / "evaluation")
    if oracle_kind(judge.kind).http(judge) is not None:
        raise ConfigError(
            f"evaluation.oracle.kind={judge.kind!r} needs a page of its own, which evaluation has not. People can be "
            "served apart (`rayalign oracle human`), and asked with evaluation.oracle.kind=http."
        )
    return labels, (judge, oracle_factory(judge, plan_.world))


def _complete(oracle: OracleConfig, run_dir: Path) -> OracleConfig:
    return oracle_kind(oracle.kind).complete(oracle, run_dir)


def validate(plan_: Plan) -> None:
    """Everything that can be known to be wrong before Ray is started and a label bought."""
    config, world = plan_.config, plan_.world
    if storage.in_bucket(config.run_dir):
        _check_bucket_run(config)
    if config.rollout.vllm.transport != "object_store":
        raise ConfigError(
            f"rollout.vllm.transport={config.rollout.vllm.transport!r} is for learners of your own, which send with "
            "RolloutPool.native_client; the learner of a run sends through Ray's object store. Leave it out."
        )
    validate_learner(config.learner, config.policy)
    validate_logging(config.logging)
    encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)
    heldout = world.heldout(config.evaluation.num_prompts)
    encoder.check([world.prompt(0), *world.check_prompts(), *heldout], max_tokens=config.rollout.max_tokens)
    against(config.evaluation, heldout)
    if oracle_kind(config.oracle.kind).online:
        check_online(config, plan_.agent)
    _oracles(plan_, config)


def _check_bucket_run(config: RunConfig) -> None:
    """A run in a bucket has no files that its parts share."""
    way_out = "Use a local run_dir"
    for name, oracle in (("oracle", config.oracle), ("evaluation.oracle", config.evaluation.oracle)):
        if oracle is not None and oracle_kind(oracle.kind).needs_files:
            raise ConfigError(
                f"{name}.kind={oracle.kind!r} keeps books of its own in files, which a run in a bucket "
                f"(run_dir={storage.plain(config.run_dir)!r}) has not. {way_out}, or another kind."
            )
        if oracle is not None and (oracle.num_replicas > 1 or oracle.max_replicas > 1):
            raise ConfigError(
                f"{name}.num_replicas={oracle.num_replicas} (max_replicas={oracle.max_replicas}): in a bucket replicas "
                "have no locks that keep two of them from paying for the same label. "
                f"{way_out}, or set {name}.num_replicas=1 and {name}.max_replicas=0."
            )
    if config.loop.shared_budget:
        raise ConfigError(
            f"loop.shared_budget={config.loop.shared_budget!r} is a file with a lock, and tells from local ledgers "
            f"what others bought. {way_out}, or leave it empty."
        )


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
        asked, judging = _oracles(plan_, config)
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


def _start_oracles(asked: _Asked, judging: _Asked | None, apps: Sequence[str], run_dir: str) -> None:
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
    evaluations = read_evaluations(folder)
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    result = Result(
        path=folder,
        win_rate=last.get("win_rate"),
        win_rate_stderr=last.get("stderr"),
        initial_win_rate=first.get("win_rate") if first.get("version") == 0 else None,
        labels_spent=int(status["labels"]),
        labels_spent_on_evaluation=int(last.get("labels_spent_on_evaluation", 0)),
        checkpoint=folder / "checkpoint",
        warning=status.get("warning"),
        online=dict(status.get("online", {})),
    )
    result.save()
    if config.logging.report:
        write_report([folder])
    storage.publish_all(config.run_dir)
    return result
