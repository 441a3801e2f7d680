"""`replay`: the labels that a run bought teach any other agent, offline. It can't buy any: nobody is there to ask.

    ledger of a run, read only --> feed --> learner (Ray Train, agent.loss) --> weights --> feed: held-out evaluation

The learner is the one of every run. The same agent with the same settings, in the ledger's own batches, makes the
weights of the run over again: bit by bit on a CPU, if the run was synchronous.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch

from rayalign import config as settings
from rayalign import storage
from rayalign.after.replay_feed import LedgerBatches, ReplayConfig, ReplayFeed
from rayalign.agents import agent_class
from rayalign.agents.agent import Agent
from rayalign.agents.losses import PairLogProbs
from rayalign.env import make_world, read_keywords
from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError
from rayalign.learner.train import LearnerSetup
from rayalign.learner.train import validate as validate_learner
from rayalign.ledger.ledger import Ledger
from rayalign.loop.collector_client import CollectorClient, actor_options
from rayalign.loop.heldout import against
from rayalign.loop.loop import cluster, fit, placed, takes_adapters, wait_until_done
from rayalign.models import resolve_policy
from rayalign.report.progress import Progress
from rayalign.report.report import write_report
from rayalign.rollout.encode import PromptEncoder, load_tokenizer
from rayalign.runs.agent_state import has_opinion
from rayalign.runs.config import RunConfig
from rayalign.runs.logs import validate as validate_logging
from rayalign.runs.preference_export import export_preferences
from rayalign.runs.record import CONFIG, REPLAY
from rayalign.runs.result import Result
from rayalign.runs.stored import StoredRun
from rayalign.serve import OracleConfig, start_oracle, stop_oracle
from rayalign.serve.kinds import oracle_kind
from rayalign.serve.oracles import oracle_factory
from rayalign.system import code_version, share
from rayalign.types import Preference

LEDGER = "ledger.arrow"
WITHOUT_MEANING = ("oracle.", "loop.budget", "loop.max_staleness", "loop.max_stalled_batches", "scorer.")
"""Settings of a run that a replay has no use for: it buys nothing, and generates only to evaluate."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A replay that was checked and not yet started."""

    config: RunConfig
    replay: ReplayConfig
    ledger: Path
    """Its ledger as this process reads it: the file itself, or a copy of one in a bucket."""
    agent: Agent
    world: World | None
    oracle: Any = None
    """A callable of the user's, for evaluation, or None for what `config.evaluation.oracle` says."""
    set_by_user: frozenset[str] = field(default_factory=frozenset)

    @property
    def evaluates(self) -> bool:
        return self.world is not None and (self.oracle is not None or self.config.evaluation.oracle is not None)


def replay(
    source: str | Path,
    agent: str | Agent | None = None,
    *,
    env: str | None = None,
    policy: str | Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    synthetic: bool = True,
    oracle: Any = None,
    seed: int | None = None,
    run_dir: str | Path | None = None,
    **overrides: Any,
) -> Result:
    """Train `agent` on the labels of a finished or running run, without buying any.

    Args:
        source: a run directory, or the file of a ledger; what lies beside it is the run that it belongs to. Either may
            be in a bucket.
        agent: a registered name or an `Agent`. Default: the run's own, with its settings; another one starts with its
            own defaults and what suits the environment. Everything that is not `agent.*` is the run's.
        env: registered id of the environment to evaluate in, where `source` is a ledger alone.
        policy: initial policy; default: the run's. Its tokenizer must be that of the ledger's tokens.
        epochs: passes over the labels, the first in their order; default: the run's.
        batch_size: duels per training batch; default: the ledger's own batches.
        synthetic: train on the pairs that the ledger's agent labelled itself, too.
        oracle: who judges held-out answers: a function of yours, a kind of oracle by name (`"world"`), or None for the
            `evaluation.oracle.*` settings. Where none is named nothing is evaluated, and no label is bought at all;
            those of evaluation are counted apart, as in a run.
        seed: of evaluation, of the order of later epochs and of adapters; default: the run's.
        run_dir: where the replay is kept; default: a new folder under `runs/`. A replay that was interrupted goes on
            when it is called again with the same arguments.
        **overrides: settings as `rayalign.run` takes them.

    Returns:
        What came out; `labels_spent` is 0, and `labels_replayed` says how many labels were trained on.

    Raises:
        ConfigError, DataError, ResourceError: before anything is started.
    """
    top = {"loop.epochs": epochs, "loop.batch_size": batch_size, "loop.seed": seed}
    given = settings.flatten(overrides) | {name: value for name, value in top.items() if value is not None}
    storage.local_only(run_dir, "run_dir")
    plan_ = _prepare(source, agent, env, policy, run_dir, oracle, synthetic, given)
    _validate(plan_)
    folder = Path(plan_.config.run_dir)
    facts = {CONFIG: settings.to_yaml(plan_.config), REPLAY: settings.to_yaml(plan_.replay)}
    if (folder / CONFIG).exists():
        if any(not (folder / name).exists() or (folder / name).read_text() != text for name, text in facts.items()):
            raise ConfigError(
                f"run_dir={str(folder)!r} holds another run, or a replay with other settings or other labels. Choose "
                "another run_dir."
            )
        if (folder / "result.json").exists():
            return Result.load(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (REPLAY, CONFIG):  # in this order: no directory is ever taken for a run that may buy
        (folder / name).write_text(facts[name])
    code_version.record(folder)
    return _execute(plan_)


# ==== before anything is started ===============================================================================
def _prepare(
    source: str | Path,
    agent: str | Agent | None,
    env: str | None,
    policy: str | Path | None,
    run_dir: str | Path | None,
    oracle: Any,
    synthetic: bool,
    given: dict[str, Any],
) -> _Plan:
    """Settings from the run that the ledger belongs to, then the agent's and the world's, then the user's."""
    ledger, file, stored = _find(source)
    for name in given:
        if name.startswith(WITHOUT_MEANING):
            hint = " Who judges the evaluation is evaluation.oracle.*." if name.startswith("oracle.") else ""
            raise ConfigError(f"{name} has no meaning in a replay, which buys no label.{hint}")
    env_kwargs = {name.removeprefix("env."): given.pop(name) for name in list(given) if name.startswith("env.")}
    if env is None and env_kwargs:
        raise ConfigError(f"env.{next(iter(env_kwargs))} is set, but env is not: name the environment, too.")
    config, made = _with_agent(None if stored is None else stored.config, stored, agent)
    world = None
    if env is not None:
        env_kwargs = read_keywords(env, env_kwargs)
        world = make_world(env, **env_kwargs)
        config = replace(config, env=env, env_kwargs=env_kwargs)
    elif stored is not None:  # what is not evaluated needs no prompts but the ledger's
        judged = oracle is not None or any(name.startswith("evaluation.oracle") for name in given)
        world = stored.world() if judged else stored.world_if_there()
    if world is not None:
        own = stored is not None and made is stored.agent
        suits = _suiting(world, config, of_agent=isinstance(agent, str) and not own, of_run=stored is None)
        config = settings.apply(config, suits)
    named, custom = _judge(oracle)
    given = named | given
    config = settings.apply(config, given)
    chunk = config.loop.batch_size if "loop.batch_size" in given else 0
    with Ledger(file, read_only=True) as opened:
        batches = opened.num_streamed
    if run_dir is not None and (begun := Path(storage.absolute(run_dir)) / REPLAY).exists():
        # It may have grown since: what was begun goes on with as many.
        batches = min(batches, int(settings.read_yaml(begun.read_text()).get("batches", batches)))
    replayed = ReplayConfig(ledger=ledger, batches=batches, batch_size=chunk, synthetic=synthetic)
    labels = LedgerBatches(replayed, file).num_labels
    if not labels:
        raise DataError(f"{ledger!r} holds no label of an oracle to train on.")
    policy = str(policy or config.policy or (world and world.default_policy()) or "")
    if not policy:
        raise ConfigError("policy is not set, and no config.yaml lies beside the ledger; name the initial policy.")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(storage.absolute(run_dir or f"runs/{config.agent_name}-replay-seed{config.loop.seed}-{stamp}"))
    config = replace(
        config,
        policy=str(resolve_policy(policy)),
        run_dir=str(folder),
        loop=replace(config.loop, budget=labels),
    )
    return _Plan(
        config=config,
        replay=replayed,
        ledger=file,
        agent=type(made)(config.agent),
        world=world,
        oracle=custom,
        set_by_user=frozenset(given),
    )


def _find(source: str | Path) -> tuple[str, Path, StoredRun | None]:
    """The ledger as it is named everywhere, its file to read, and the run that it belongs to if that lies beside it."""
    if storage.in_bucket(source):
        named = storage.plain(source)
        ledger = named if storage.last_name(named).endswith(".arrow") else storage.join(named, LEDGER)
        file = storage.fetched_ledger(ledger, run=True)
    else:
        path = storage.fetched(source)
        file = (path / LEDGER if path.is_dir() else path).absolute()
        ledger = str(file)
    if not file.exists():
        shown = storage.plain(source)
        raise DataError(f"{shown!r} is neither a run directory with a {LEDGER} nor the file of a ledger.")
    stored = StoredRun.read(file.parent) if (file.parent / CONFIG).exists() else None
    return ledger, file, stored


def _with_agent(base: RunConfig | None, stored: StoredRun | None, agent: str | Agent | None) -> tuple[RunConfig, Agent]:
    """The run's settings, those of another agent in the place of its own, and nobody who judges."""
    if stored is not None and agent in (None, stored.config.agent_name):
        name, made = stored.config.agent_name, stored.agent
    elif agent is None:
        raise ConfigError("agent is not set, and no config.yaml lies beside the ledger; name one: `--agent passive`.")
    elif isinstance(agent, str):
        name, made = agent, agent_class(agent)()
    else:
        name, made = agent.name or type(agent).__name__, agent
    config = RunConfig(env="") if base is None else base
    config = replace(
        config,
        agent_name=name,
        agent=made.config,
        oracle=OracleConfig(),
        evaluation=replace(config.evaluation, oracle=None),
    )
    return config, made


def _suiting(world: World, config: RunConfig, *, of_agent: bool, of_run: bool) -> dict[str, Any]:
    """The world's own defaults that are wanted and fit."""
    known = {setting.name for setting in settings.describe(config)}
    return {
        name: value
        for name, value in world.defaults().items()
        if name in known and (of_agent if name.startswith("agent.") else of_run)
    }


def _judge(oracle: Any) -> tuple[dict[str, Any], Any]:
    """`oracle` as settings of the evaluation's oracle, or as a function of the user's."""
    if not isinstance(oracle, str):
        return {}, oracle
    if ":" in oracle:
        return {"evaluation.oracle.kind": "function", "evaluation.oracle.target": oracle}, None
    oracle_kind(oracle)
    return {"evaluation.oracle.kind": oracle}, None


def _validate(plan_: _Plan) -> None:
    """Everything that can be known to be wrong before Ray is started."""
    config, world = plan_.config, plan_.world
    validate_learner(config.learner, config.policy)
    validate_logging(config.logging)
    encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)
    if plan_.evaluates:
        assert world is not None
        _evaluation_oracle(plan_)
        heldout = world.heldout(config.evaluation.num_prompts)
        encoder.check(heldout, max_tokens=config.rollout.max_tokens)
        against(config.evaluation, heldout)
    elif plan_.oracle is not None or config.evaluation.oracle is not None:
        raise ConfigError("an oracle is named for evaluation, but no environment with held-out prompts: set env.")
    batches = LedgerBatches(plan_.replay, plan_.ledger)
    first = next(found for i in range(len(batches)) if (found := batches.preferences(i)))
    _check_tokens(first, config.policy, plan_.replay.ledger)
    _check_agent(plan_, first)


def _evaluation_oracle(plan_: _Plan) -> tuple[OracleConfig, Callable[[], Oracle]]:
    config = plan_.config.evaluation.oracle or OracleConfig()
    config = oracle_kind(config.kind).complete(config, Path(plan_.config.run_dir) / "evaluation")
    if oracle_kind(config.kind).http(config) is not None:
        raise ConfigError(f"evaluation.oracle.kind={config.kind!r} needs a page of its own, which evaluation has not.")
    return config, oracle_factory(config, plan_.world, plan_.oracle)


def _check_tokens(preferences: list[Preference], policy: str, ledger: str) -> None:
    """The ledger's tokens mean to this policy what they meant to the one that sampled them."""
    tokenizer = load_tokenizer(policy)
    sampled = [side for p in preferences for side in (p.duel.first, p.duel.second) if side.policy_version >= 0]
    for candidate in sampled[:8]:
        ids = [i for i in candidate.token_ids if i < len(tokenizer)]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(ids) < len(candidate.token_ids) or text != candidate.text:
            raise DataError(
                f"policy={policy!r} has another tokenizer than the one that sampled {ledger}: it reads {text[:60]!r} "
                f"where {candidate.text[:60]!r} was judged. Replay with a policy of the same family."
            )


def _check_agent(plan_: _Plan, preferences: list[Preference]) -> None:
    """Agents that add something to their duels when they select them can only be trained on their own."""
    agent, name = plan_.agent, plan_.config.agent_name
    if plan_.replay.batch_size and type(agent).training_duels is not Agent.training_duels:
        raise ConfigError(
            f"batch_size={plan_.replay.batch_size} would cut through what agent {name!r} makes of a whole batch; leave "
            "it out, and the ledger's batches stay as they are."
        )
    try:
        duels = agent.training_duels(preferences)
        zeros_B, ones_B = torch.zeros(len(duels)), torch.ones(len(duels))
        reference_B = zeros_B if agent.needs_reference() else None
        agent.loss(
            PairLogProbs(
                winner_B=zeros_B,
                loser_B=zeros_B,
                winner_length_B=ones_B,
                loser_length_B=ones_B,
                preferences=duels,
                reference_winner_B=reference_B,
                reference_loser_B=reference_B,
            )
        )
    except KeyError as error:
        raise ConfigError(
            f"agent {name!r} trains on {error.args[0]!r}, which it adds to the duels that it selects itself, and those "
            f"of {plan_.replay.ledger} don't have it. Replay it over a ledger of its own, or take another agent."
        ) from error


# ==== the replay =================================================================================================
def _execute(plan_: _Plan) -> Result:
    """Start the feed, and an oracle if one was named for evaluation; wait for the learner; write what came out."""
    folder = Path(plan_.config.run_dir)
    app = f"evaluation-{os.getpid()}-{time.time_ns()}"
    with ExitStack() as stack:
        title = f"{plan_.config.agent_name}, replay of {plan_.config.loop.budget:,} labels"
        progress = Progress(plan_.config.logging, title=title, run_dir=folder)
        stack.callback(progress.close)
        progress.update({"phase": "starting Ray", "budget": plan_.config.loop.budget})
        own_cluster = stack.enter_context(cluster())
        config = plan_.config
        if not plan_.evaluates:
            config = replace(config, rollout=replace(config.rollout, num_replicas=0))
        # A replay selects nothing, so it is placed as the simplest agent is: no scorers, no engines of a reference.
        config = placed(config, Agent(), plan_.set_by_user)
        judge = None
        if plan_.evaluates:
            stack.callback(stop_oracle, app, stop_serve=not own_cluster and not share.in_group())
            judge = start_oracle(*_evaluation_oracle(plan_), name=app, journal_dir=folder / "oracle-evaluation")
        feed = _start_feed(plan_, config, judge)
        stack.callback(feed.close)
        setup = LearnerSetup(
            agent=plan_.agent,
            config=config.learner,
            policy=config.policy,
            source=feed,
            final_dir=str(folder / "checkpoint"),
            publish="adapter" if takes_adapters(config) else "merged",
            seed=config.loop.seed,
        )
        with progress.following(lambda: feed.status(timeout_s=5.0)):
            fit(setup, config, folder, feed)
            wait_until_done(feed, config.loop.gate_timeout_s)
        result = _finish(plan_)
        progress.summary(result)
        return result


def _start_feed(plan_: _Plan, config: RunConfig, judge: Oracle | None) -> CollectorClient:
    actor = ray.remote(ReplayFeed).options(**actor_options(config))
    world = plan_.world if plan_.evaluates or has_opinion(plan_.agent) else None
    return CollectorClient(actor.remote(config, plan_.replay, plan_.agent, world, judge))


def _finish(plan_: _Plan) -> Result:
    folder = Path(plan_.config.run_dir)
    policy, chat = plan_.config.policy, plan_.config.rollout.chat
    used = plan_.replay  # what was trained on: the ledger may have grown since
    export_preferences(
        plan_.ledger, folder / "preferences", policy, chat, batches=used.batches, synthetic=used.synthetic
    )
    result = Result.of(folder, labels_spent=0, labels_replayed=plan_.config.loop.budget)
    if plan_.config.logging.report:
        write_report([folder])
    return result
