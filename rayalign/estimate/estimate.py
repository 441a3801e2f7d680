"""What a run will cost, before it is started: labels and money, tokens, memory per role, time.

settings -> labels, calls, price     exact, but for retries
         -> tokens                   from the prompts and the longest response, or the mean one that was measured
         -> memory                   `rayalign.estimate.memory`
a few batches here -> time           `rayalign.estimate.calibration`, if it is asked for
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayalign.agents.agent import Agent
from rayalign.estimate.calibration import Calibration, calibrate
from rayalign.estimate.memory import GIB, ModelShape, RoleMemory, memory_of, total
from rayalign.loop.loop import Plan
from rayalign.rollout.encode import PromptEncoder
from rayalign.runs.config import RunConfig
from rayalign.serve.config import OracleConfig

SAMPLED_PROMPTS = 64
START_S = 40.0
"""From the command to the first batch: Ray, Serve, Train and small models, on two cores. Large models take longer."""
CALLS_S = 0.2
"""What actors' calls, logs and files add to each batch."""


@dataclass(frozen=True, kw_only=True)
class Purchases:
    """What is asked of oracles. Evaluation counts apart from the budget."""

    labels: int
    evaluations: int
    evaluation_labels: int
    """At most: identical answers are not asked about, and nobody is asked twice about the same."""
    calls: float
    """Of LLM judges, for labels and evaluation; questions asked again after errors come on top."""
    money: float
    """For labels and evaluation, in the currency of the prices."""
    judges: tuple[JudgeCost, ...] = ()
    """Each LLM judge, by its section."""


@dataclass(frozen=True, kw_only=True)
class JudgeCost:
    """What an LLM judge is going to cost, by its own settings."""

    section: str
    """`oracle`, or `evaluation.oracle`."""
    price: float
    """Of a call; 0: nobody set it."""
    money: float
    cap: float
    """`max_spend`; 0: none."""

    def verdict(self) -> str:
        """In words."""
        if not self.price:
            return f"{self.section}.judge.price is not set: what it costs is not counted"
        if not self.cap:
            return f"no cap; {self.section}.judge.max_spend sets one"
        enough = "is enough" if self.cap >= self.money else "is LESS than that: the run will stop before its budget"
        return f"{self.section}.judge.max_spend={self.cap:g} {enough}"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Numbers of tokens."""

    batches: int
    generated: float
    """Responses, for training and evaluation."""
    trained: float
    """Prompts and responses through forward and backward."""
    referred: float
    """Prompts and responses through the reference."""
    prompt_mean: float
    prompt_longest: int
    response_mean: float
    measured: bool
    """Whether `response_mean` was measured; else it is the longest that is allowed."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """All of it."""

    purchases: Purchases
    tokens: Tokens
    shape: ModelShape
    memory: list[RoleMemory]
    calibration: Calibration | None
    seconds: float | None
    """Of the whole run; None without a calibration."""


def estimate(plan: Plan, *, with_calibration: bool = False) -> Estimate:
    """What `plan` will cost. A calibration loads the policy and runs a few batches in this process."""
    config, agent = plan.config, plan.agent
    encoder = PromptEncoder(config.policy, config.rollout.max_prompt_tokens, chat=config.rollout.chat)
    lengths = [len(encoder.encode(plan.world.prompt(i)).token_ids) for i in range(SAMPLED_PROMPTS)]
    heldout = len(plan.world.heldout(config.evaluation.num_prompts))
    shape = ModelShape.of(config.policy)
    found = calibrate(config, plan.world, agent) if with_calibration else None
    tokens = tokens_of(config, agent, lengths, heldout, found)
    batch_prompts = agent.prompts_per_batch(config.loop.batch_size)
    return Estimate(
        purchases=purchases_of(config, heldout),
        tokens=tokens,
        shape=shape,
        memory=memory_of(config, agent, shape, max(lengths), batch_prompts),
        calibration=found,
        seconds=None if found is None else seconds_of(config, tokens.batches, found),
    )


# -- labels and money -----------------------------------------------------------------------------------------------
def num_evaluations(config: RunConfig) -> int:
    """At the start if asked for, when a multiple of `evaluation.every` is passed, and at the end.

    At most: where generation runs ahead of learning, the last two can be one.
    """
    every, budget = config.evaluation.every, config.loop.budget
    between = min((budget - 1) // every, (budget - 1) // config.loop.batch_size) if every else 0
    return int(config.evaluation.at_start) + between + 1


def purchases_of(config: RunConfig, heldout: int) -> Purchases:
    """Labels are exact; calls and money leave out what is asked again after errors."""
    judge = config.evaluation.oracle or config.oracle
    evaluations = num_evaluations(config)
    evaluation_labels = evaluations * heldout * (2 if config.evaluation.best_of_n > 1 else 1)
    bought = [(config.oracle, config.loop.budget), (judge, evaluation_labels)]
    sections = {"oracle": config.oracle, "evaluation.oracle": config.evaluation.oracle}
    return Purchases(
        labels=config.loop.budget,
        evaluations=evaluations,
        evaluation_labels=evaluation_labels,
        calls=sum(labels * calls_per_label(oracle) for oracle, labels in bought),
        money=sum(labels * price_per_label(oracle) for oracle, labels in bought),
        judges=tuple(
            JudgeCost(
                section=section,
                price=asked.judge.price,
                money=sum(labels * price_per_label(oracle) for oracle, labels in bought if oracle is asked),
                cap=asked.judge.max_spend,
            )
            for section, asked in sections.items()
            if asked is not None and asked.kind == "judge"
        ),
    )


def calls_per_label(oracle: OracleConfig) -> float:
    """Of an LLM judge: one for each order, and the share that is asked again to measure self-agreement."""
    if oracle.kind != "judge":
        return 0.0
    return (2 if oracle.judge.order == "both" else 1) + oracle.judge.recheck


def price_per_label(oracle: OracleConfig) -> float:
    """Money: a judge's calls, or `oracle.price`; a verdict that brings its own price keeps that."""
    calls = calls_per_label(oracle) * oracle.judge.price
    return calls if calls else oracle.price


# -- tokens -----------------------------------------------------------------------------------------------------------
def tokens_of(
    config: RunConfig, agent: Agent, prompt_lengths: list[int], heldout: int, found: Calibration | None
) -> Tokens:
    """By the number of batches that the agent expects; responses as long as measured, else as long as allowed."""
    size, batches = config.loop.batch_size, agent.expected_batches(config.loop.budget, config.loop.batch_size)
    prompt = float(np.mean(prompt_lengths))
    response = config.rollout.max_tokens if found is None else found.response_tokens
    samples = sum(proposal.n for proposal in agent.proposals() if proposal.source != "data")
    picked_from = config.evaluation.best_of_n if config.evaluation.best_of_n > 1 else 0
    answers = num_evaluations(config) * heldout * (1 + picked_from)
    pairs = batches * (size if found is None else found.duels)
    sides = 2 * pairs * (prompt + response)
    referred = sides if agent.needs_reference() else 0.0
    return Tokens(
        batches=batches,
        generated=(batches * agent.prompts_per_batch(size) * samples + answers) * response,
        trained=sides * config.learner.updates_per_batch * config.loop.epochs,
        referred=referred,
        prompt_mean=prompt,
        prompt_longest=max(prompt_lengths),
        response_mean=response,
        measured=found is not None,
    )


# -- time -------------------------------------------------------------------------------------------------------------
def seconds_of(config: RunConfig, batches: int, found: Calibration) -> float:
    """The whole run. Engines, scorers and workers share their work evenly; what they tell each other is not counted."""
    seconds = found.seconds
    generate = seconds.get("generate", 0.0) / max(1, config.rollout.num_replicas)
    learn = seconds.get("learn", 0.0) / config.learner.num_workers
    collecting = generate + seconds.get("select", 0.0) + CALLS_S
    # The agent observes while the learner learns; weights come when both are done.
    learning = max(learn, seconds.get("observe", 0.0)) + seconds.get("sync", 0.0)
    batch = collecting + learning if config.loop.max_staleness == 0 else max(collecting, learning)
    evaluate = seconds.get("evaluate", 0.0) / max(1, config.rollout.num_replicas)
    more_epochs = batches * (config.loop.epochs - 1) * (learn + seconds.get("sync", 0.0))
    return START_S + batches * batch + more_epochs + num_evaluations(config) * evaluate


# -- tell -------------------------------------------------------------------------------------------------------------
def rows_of(found: Estimate, config: RunConfig) -> list[tuple[str, str, str]]:
    """What, how much, and how it is known."""
    bought, tokens = found.purchases, found.tokens
    length = "measured here" if tokens.measured else "the longest allowed; --calibrate measures"
    rows = [
        ("labels", f"{bought.labels:,}", "loop.budget, never exceeded"),
        ("labels for evaluation", f"at most {bought.evaluation_labels:,}", f"{bought.evaluations} evaluations"),
        *([("judge calls", f"{bought.calls:,.0f}", "questions asked again come on top")] if bought.calls else []),
        ("money", f"{bought.money:,.2f}" if bought.money else "nothing", "by the prices in the settings"),
        *((f"of it {judge.section}", f"{judge.money:,.2f}", judge.verdict()) for judge in bought.judges),
        ("batches", f"{tokens.batches:,}", "expected of this agent"),
        ("prompt tokens", f"{tokens.prompt_mean:.0f}", f"mean of {SAMPLED_PROMPTS}; longest {tokens.prompt_longest}"),
        ("response tokens", f"{tokens.response_mean:.1f}", length),
        ("tokens generated", _short(tokens.generated), ""),
        ("tokens trained on", _short(tokens.trained), "prompts and responses, forward and backward"),
        *([("tokens through the reference", _short(tokens.referred), "forward only")] if tokens.referred else []),
        ("parameters", _short(found.shape.parameters), _trained(found.shape, config)),
    ]
    for role in found.memory:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in role.parts.items())
        kept = "".join(f"; on the CPU: {name} {_gib(size)}" for name, size in role.host.items())
        what = f"memory, {role.processes} x {role.role}" if role.processes > 1 else f"memory, {role.role}"
        rows.append((what, f"{_gib(role.total)} ({role.device})", parts + kept))
    for device in ("gpu", "cpu"):
        if size := total(found.memory, device):
            rows.append((f"memory, all on {device}s", _gib(size), "without libraries, which take 0.5 GiB a process"))
    rows += _time_rows(found)
    return rows


def _trained(shape: ModelShape, config: RunConfig) -> str:
    rank = config.learner.lora.rank
    return f"of which {_short(shape.adapters(rank))} more are adapters, and trained" if rank else "all trained"


def _time_rows(found: Estimate) -> list[tuple[str, str, str]]:
    if found.calibration is None or found.seconds is None:
        return [("time", "not known", "--calibrate runs a few batches here, and buys nothing")]
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in found.calibration.seconds.items())
    minutes = f"{found.seconds / 60:.1f} min" if found.seconds < 7200 else f"{found.seconds / 3600:.1f} h"
    return [
        ("seconds by stage", stages, "one batch and one evaluation, by one process"),
        ("time", minutes, "on machines like this"),
    ]


def _short(number: float) -> str:
    """Three digits and a unit.

    >>> _short(1234), _short(2_500_000), _short(12)
    ('1.23k', '2.50M', '12')
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number / size >= 100 else f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.1f} MiB"
