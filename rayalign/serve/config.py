"""Settings of the oracle and of the service that it runs under."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rayalign.env.labels import LABEL_MODES
from rayalign.errors import ConfigError, did_you_mean
from rayalign.serve.http.config import HttpConfig
from rayalign.serve.judge_config import LOCAL, JudgeConfig
from rayalign.serve.labelling.config import HumanConfig
from rayalign.serve.pairwise_config import PairwiseConfig
from rayalign.serve.users.config import UsersConfig
from rayalign.system.nodes import check_selector


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """Who says which response is better, and how many of them work at the same time."""

    kind: str = "world"
    """`world` (the environment's own hidden reward), `data` (what preference data says of its own pairs), `function`
    (yours), `reward_model` and `pairwise` (Hugging Face), `judge` (a language model behind an OpenAI-compatible
    endpoint), `http` (an oracle that is served elsewhere), `human` (people, on a page), `users` (who chat with the
    policy), or the import path `package.module:NAME` of a kind of yours (see `rayalign.serve.kinds`)."""
    target: str = ""
    """function: import path `package.module:attribute`; reward_model, pairwise, local judge: Hugging Face id or
    directory; judge: the model's name at its endpoint; http: the service's address, like http://127.0.0.1:8710; else
    unused."""
    labels: str = "bernoulli"
    """How a probability becomes a label: `bernoulli` draws it, `deterministic` takes the likelier response."""
    scale: float = 1.0
    """Rewards r become P(first wins) = sigmoid(scale * (r_first - r_second)), and so does a pairwise model's logit in
    the place of their difference. A world brings its own scale."""
    price: float = 0.0
    """Of one label, in your currency; a verdict that brings its own price keeps it. 0 is free."""
    returns: str = "reward"
    """function only: it returns the `reward` of (prompt, response), or the `probability` of (prompt, first, second)."""
    batched: bool = False
    """function only: it takes equally long lists of each argument and returns a list."""
    num_replicas: int = 1
    """Replicas that judge at the same time; the least number of them where max_replicas is set."""
    max_replicas: int = 0
    """Autoscale up to this many replicas; 0 never scales."""
    target_ongoing: float = 1.0
    """Autoscaling only: calls per replica, running and queued, above which replicas are added. A run makes as many
    calls at a time as `max_replicas`, each of up to `max_batch_size` duels."""
    cpus_per_replica: float = 0.5
    """Ray CPUs each replica reserves; Ray gives its libraries as many threads, at least 1."""
    gpus_per_replica: float = 0.0
    """Ray GPUs each replica reserves; fractions collocate it with other roles."""
    nodes: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that replicas may run on, e.g. {"role": "oracle"} (`rayalign.system.nodes`); empty: any."""
    max_batch_size: int = 512
    """Most duels judged in one go; the answers of each go are on disk before the next one starts."""
    batch_wait_s: float = 0.002
    """How long a call waits for company, in seconds; 0 judges at once. A full batch never waits."""
    request_timeout_s: float = 600.0
    """Longest wait for the next max_batch_size verdicts, in seconds."""
    retries: int = 5
    """How often a call whose replica died is made again; 0 never."""
    start_timeout_s: float = 600.0
    """Longest wait for the first replicas, model loading included, in seconds."""
    health_check_period_s: float = 2.0
    """Seconds between health checks. A dead replica is replaced at the next; one that fails, after three in a row."""
    device: str = "auto"
    """Of a model in the replica (reward_model, pairwise, local judge): `cpu`, `cuda` (one GPU), or `auto`: cuda where
    the replica has a GPU, and with gpus_per_replica of 2 or more the model's layers are spread over them."""
    dtype: str = "float32"
    """Of a model in the replica: `float32` or `bfloat16` weights and activations; scores are always float32."""
    quantization: str = ""
    """Of a model in the replica: `int8` or `int4` (NF4) weights of linear layers, by bitsandbytes; empty: as dtype."""
    max_tokens: int = 0
    """reward_model, pairwise: longest input. 0: the model's limit. Of reward_model the prompt's beginning is cut, and
    of pairwise then the responses' ends, too."""
    micro_batch_tokens: int = 0
    """reward_model, pairwise: most tokens per forward pass, padding counted. 0: 2,048 on a CPU, 16,384 on a GPU."""
    cache_size: int = 100_000
    """reward_model, pairwise: scores that each replica remembers by content (prompt and response, or responses), so
    that equal texts are scored once; the file scores.sqlite beside its answers has those of all replicas. 0: none."""
    trust_remote_code: bool = False
    """Of a model in the replica: run the Python code that comes with it. Only for repositories that you trust."""
    pairwise: PairwiseConfig = field(default_factory=PairwiseConfig)
    """pairwise only: how the model is shown a duel, and how its answer is read."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """judge only: the endpoint, what it is asked, and what it may cost."""
    http: HttpConfig = field(default_factory=HttpConfig)
    """http only: how the service that judges is asked."""
    human: HumanConfig = field(default_factory=HumanConfig)
    """human only: who labels, and where the page is."""
    users: UsersConfig = field(default_factory=UsersConfig)
    """users only: where they chat with the policy."""

    def __post_init__(self) -> None:
        _one_of("labels", self.labels, LABEL_MODES)
        _one_of("returns", self.returns, ("reward", "probability"))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("quantization", self.quantization, ("", "int8", "int4"))
        for name in ("num_replicas", "max_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"oracle.{name}={getattr(self, name)} must be at least 1.")
        for name in ("request_timeout_s", "start_timeout_s", "health_check_period_s", "scale", "target_ongoing"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"oracle.{name}={getattr(self, name)} must be positive.")
        for name in (
            "price",
            "retries",
            "batch_wait_s",
            "max_tokens",
            "micro_batch_tokens",
            "cache_size",
            "cpus_per_replica",
            "gpus_per_replica",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"oracle.{name}={getattr(self, name)} must be a number, and not negative.")
        check_selector("oracle.nodes", self.nodes)
        if self.max_replicas and self.max_replicas < self.num_replicas:
            raise ConfigError(
                f"oracle.max_replicas={self.max_replicas} is below oracle.num_replicas={self.num_replicas}; "
                "raise it, or set it to 0 for a fixed number of replicas."
            )

    @property
    def most_replicas(self) -> int:
        """Replicas that may exist at the same time: what placement has to plan for."""
        return self.max_replicas or self.num_replicas


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"oracle.{name}={value!r} is unknown. {did_you_mean(value, known)}")


def has_model(kind: str, base_url: str = "") -> bool:
    """Whether replicas of such an oracle hold a model: an endpoint, people and data need no memory, and no GPU.

    `base_url` is that of a judge, whose model may be in the replicas, too.
    """
    return kind in ("reward_model", "pairwise") or (kind == "judge" and base_url == LOCAL)
