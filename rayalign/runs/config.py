"""All settings of a run, by section; each section is defined beside the class that it configures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayalign.agents.agent import AgentConfig
from rayalign.errors import ConfigError
from rayalign.evaluation.evaluate import EvaluationConfig
from rayalign.learner.config import LearnerConfig
from rayalign.runs.logs import LoggingConfig
from rayalign.system.nodes import check_selector
from rayalign.rollout.config import RolloutConfig
from rayalign.scoring.config import ScorerConfig
from rayalign.serve.config import OracleConfig


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What is bought, how much at a time, and how far generation may run ahead of learning."""

    budget: int = 1000
    """Labels to buy from the oracle; never exceeded."""
    shared_budget: str = ""
    """File of a cap on the labels of several runs (`rayalign.ledger.shared_budget`): each batch is set aside there before it
    is bought. Empty: no cap but this run's budget."""
    batch_size: int = 32
    """Duels per batch, hence per gradient step; the last batch of the budget may be smaller."""
    max_staleness: int = 0
    """Batches that generation may be ahead of learning. 0: strictly on-policy, reproducible. 1: both at once."""
    seed: int = 0
    """Of prompts' order, sampling, selection and Bernoulli labels."""
    epochs: int = 1
    """Passes over the bought labels; more than 1 trains on, without new labels, after the budget is spent."""
    max_stalled_batches: int = 20
    """Batches in a row without a single new label before the run stops."""
    gate_timeout_s: float = 1800.0
    """Longest wait for the learner's next weights, and for the evaluation at the end."""
    agent_checkpoint_every: int = 10
    """Batches between checkpoints of the agent's own state; what came after is replayed from the ledger."""
    agent_device: str = "cpu"
    """Where the agent's own models (a reward posterior) run: cpu or cuda."""
    agent_threads: int = 0
    """Threads the agent's own models compute with on a CPU; 0 takes the whole CPUs that the collector reserves, at
    least 1."""
    sleep_engines: bool = False
    """Engines give their GPU memory back while the learner works (collocated placement); needs max_staleness=0."""
    collector_cpus: float = 0.5
    """Ray CPUs the collector reserves."""
    collector_gpus: float = 0.0
    """Ray GPUs the collector reserves, for `agent_device=cuda`; a fraction collocates it with others."""
    collector_nodes: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that the collector may run on, e.g. {"role": "cpu"} (see `rayalign.system.nodes`); empty: any."""

    def __post_init__(self) -> None:
        for name in ("budget", "batch_size", "epochs", "max_stalled_batches", "agent_checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name}={getattr(self, name)} must be at least 1.")
        if self.max_staleness < 0:
            raise ConfigError(f"loop.max_staleness={self.max_staleness} must not be negative; 0 is synchronous.")
        if self.sleep_engines and self.max_staleness:
            raise ConfigError(
                f"loop.sleep_engines=true needs engines and learner to take turns, but loop.max_staleness="
                f"{self.max_staleness} has them work at the same time. Set it to 0, or leave the engines awake."
            )
        if self.agent_threads < 0:
            raise ConfigError(
                f"loop.agent_threads={self.agent_threads} must not be negative; 0 follows collector_cpus."
            )
        if self.seed < 0:
            raise ConfigError(f"loop.seed={self.seed} must not be negative.")
        check_selector("loop.collector_nodes", self.collector_nodes)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a run; `config.yaml` in the run directory is one of these."""

    agent_name: str = "passive"
    """Registered name of the agent."""
    env: str = "rayalign/TinyWorld-v0"
    """Registered id of the environment."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment's world, e.g. {"seed": 3}."""
    policy: str = ""
    """Hugging Face directory (or id) of the initial policy, tokenizer included; empty: the world's own."""
    run_dir: str = ""
    """Where everything of this run is; empty: a new folder under runs/."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """The agent's settings; its class depends on `agent_name`."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Budget, batches, staleness."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Engines that generate."""
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    """The model as agents ask it; only for agents that do."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Preferences to weights."""
    oracle: OracleConfig = field(default_factory=OracleConfig)
    """Who labels."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out win rate."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Where numbers go, and the progress display."""

    @property
    def identity(self) -> str:
        """Part of every duel's id: the same comparison in the same batch of equal runs has the same id."""
        return f"{self.env}/{self.loop.seed}"

    @property
    def name(self) -> str:
        """Short name for actors and logs."""
        return f"{self.agent_name}-{self.loop.seed}"
