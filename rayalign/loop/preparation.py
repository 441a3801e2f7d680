"""Before anything is started: settings -> a checked `Plan`, and its directory.

    run      prepare (settings of classes, world, user) -> validate -> a new directory     new_run
    resume   a directory -> settings, what may be changed -> validate                      old_run

Everything that can be known to be wrong is found here: no Ray runs yet, and nothing was bought.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
from ray import cloudpickle

from rayalign import config as settings
from rayalign import storage
from rayalign.agents import agent_class
from rayalign.agents.agent import Agent
from rayalign.env import make_world, read_keywords
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, did_you_mean
from rayalign.learner.train import validate as validate_learner
from rayalign.ledger.ledger import Ledger
from rayalign.loop.collector import ALLOWED
from rayalign.loop.heldout import against
from rayalign.loop.online import check_online
from rayalign.models import resolve_policy
from rayalign.rollout.encode import PromptEncoder
from rayalign.runs.config import RunConfig
from rayalign.runs.dirs import (
    FAILED_START,
    default_name,
    new_folder,
    refuse_old,
    released_on_error,
    set_aside,
    write_config,
)
from rayalign.runs.logs import validate as validate_logging
from rayalign.runs.record import CONFIG
from rayalign.runs.result import Result
from rayalign.runs.resumable import check_budget, check_changes
from rayalign.runs.stored import CUSTOM_INPUTS, POLICY_NAME, StoredRun
from rayalign.serve import OracleConfig
from rayalign.serve.kinds import ORACLES, oracle_kind
from rayalign.serve.oracles import oracle_factory
from rayalign.system import code_version


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that was checked and not yet started."""

    config: RunConfig
    world: World
    agent: Agent
    oracle: Any = None
    """A callable of the user's, or None for what `config.oracle` says."""
    set_by_user: frozenset[str] = field(default_factory=frozenset)


Asked = tuple[OracleConfig, Callable[[], Oracle]]
"""An oracle's settings, and what makes it in a replica."""


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


def oracles(plan_: Plan, config: RunConfig) -> tuple[Asked, Asked | None]:
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
    oracles(plan_, config)


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
