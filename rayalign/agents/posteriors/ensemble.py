"""The epistemic reward model: an ensemble of small heads on frozen features (SEA, Liu et al. 2024, section 3.2).

    rewards   features -> standardised -> K heads at once, one batched product -> K rewards
    add       labelled duels join the data; each member sees them with its own weights (bootstrap)
    update    m steps of Adam, each on an independent minibatch per member, regularised towards the member's start

Picking a member at random is a sample of the posterior. Never retrained from scratch: heads and optimizer go on.

Shapes: E ensemble members    B duels    D features    H hidden units    S a pair's two sides (first, second).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayalign.errors import ConfigError, NonFiniteLossError

Heads = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Size of the ensemble and how it learns."""

    members: int = 20
    """K: heads, each with its own initialisation and its own data."""
    hidden: int = 128
    """Units in each of a head's two hidden layers."""
    updates: int = 5
    """m: optimizer steps per batch; 0 learns nothing, so no posterior is built."""
    batch_size: int = 128
    """Duels per member and step, drawn with replacement from all that were labelled by the oracle."""
    learning_rate: float = 1e-3
    """Adam's, constant."""
    regularization: float = 1e-2
    """lambda of eq. 4: weight of the squared distance of a member's parameters from their start, summed over all its
    parameters; 0 lets go of the start. Up to 0.001 does next to nothing; 0.1 makes the mean better and the single
    members, which Thompson sampling uses, worse (benchmarks/posterior_offline.py)."""
    bootstrap: bool = True
    """Each member counts each duel Poisson(1) times (online bootstrap), so that 37% of the duels are unknown to it;
    off: members differ by start and minibatches alone."""
    prior_scale: float = 0.0
    """Weight of a fixed random head added to each member (a prior function, Osband et al. 2018); 0 adds none."""
    calibration_responses: int = 256
    """Features are standardised by the statistics of the first so many responses, then the statistics stay fixed."""

    def __post_init__(self) -> None:
        for name in ("members", "hidden", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"agent.posterior.{name}={getattr(self, name)} must be at least 1.")
        for name in ("updates", "regularization", "prior_scale"):
            if getattr(self, name) < 0:
                raise ConfigError(f"agent.posterior.{name}={getattr(self, name)} must not be negative.")
        if self.learning_rate <= 0:
            raise ConfigError(
                f"agent.posterior.learning_rate={self.learning_rate} must be positive; "
                "set agent.posterior.updates=0 for an agent without a posterior."
            )
        if self.calibration_responses < 2:
            raise ConfigError(
                f"agent.posterior.calibration_responses={self.calibration_responses} must be at least 2: "
                "one response has no spread."
            )


def init_heads(members: int, dim: int, hidden: int, rng: np.random.Generator) -> Heads:
    """Independent heads whose rewards have a standard deviation of about 1 on standardised features."""

    def normal(*shape: int, gain: float) -> Tensor:
        return torch.from_numpy(rng.normal(0.0, gain / math.sqrt(shape[-2]), shape).astype(np.float32))

    return {
        "w1_EDH": normal(members, dim, hidden, gain=math.sqrt(2)),
        "b1_EH": torch.zeros(members, hidden),
        "w2_EHH": normal(members, hidden, hidden, gain=math.sqrt(2)),
        "b2_EH": torch.zeros(members, hidden),
        "w3_EH1": normal(members, hidden, 1, gain=1.0),  # a last bias would cancel in every margin
    }


def head_rewards(heads: Heads, x: Tensor) -> Tensor:
    """`E x R` rewards of `R x D` features that all members share, or of `E x R x D`, each member its own."""
    members, dim, hidden = heads["w1_EDH"].shape
    if x.ndim == 2:  # one product for all members: their first layers side by side
        wide_DK = heads["w1_EDH"].permute(1, 0, 2).reshape(dim, members * hidden)
        first_ERH = (x @ wide_DK).view(len(x), members, hidden).transpose(0, 1)
    else:
        first_ERH = torch.bmm(x, heads["w1_EDH"])
    a_ERH = torch.relu(first_ERH + heads["b1_EH"].unsqueeze(1))
    b_ERH = torch.relu(torch.baddbmm(heads["b2_EH"].unsqueeze(1), a_ERH, heads["w2_EHH"]))
    return torch.bmm(b_ERH, heads["w3_EH1"]).squeeze(-1)


def distance_from(heads: Heads, start: Heads) -> Tensor:
    """`||phi_k - phi_k^0||^2` of each member, `E`: summed, not averaged, over all its parameters."""
    return torch.stack([((heads[n] - start[n]) ** 2).flatten(1).sum(dim=1) for n in heads]).sum(dim=0)


def regularised_nll(
    margins_EB: Tensor, labels_EB: Tensor, weights_EB: Tensor, distance_E: Tensor, regularization: float
) -> Tensor:
    r"""`sum_k [mean_b w_kb NLL_kb + lambda ||phi_k - phi_k^0||^2]`, a scalar (SEA, eq. 4, with a plus and a
    square: the print has a minus and none).

    `NLL = -[z log sigmoid(margin) + (1 - z) log sigmoid(-margin)]` with label z: 1 first wins, 0.5 a tie.

    >>> one = torch.ones(1, 1)
    >>> round(regularised_nll(0 * one, one, one, torch.tensor([2.0]), 0.5).item(), 4)  # log 2 + 0.5 * 2
    1.6931
    """
    nll_EB = F.binary_cross_entropy_with_logits(margins_EB, labels_EB, weight=weights_EB, reduction="none")
    return (nll_EB.mean(dim=1) + regularization * distance_E).sum()


class Standardizer:
    """Mean and spread per feature of the first responses seen; fixed once enough were counted."""

    def __init__(self, dim: int, enough: int) -> None:
        self.enough = enough
        self.count = 0
        self.mean_D = torch.zeros(dim, dtype=torch.float64)
        self.squares_D = torch.zeros(dim, dtype=torch.float64)
        """Sum of squared deviations from the mean."""

    @property
    def done(self) -> bool:
        """Whether the statistics are fixed."""
        return self.count >= self.enough

    def add(self, features_RD: Tensor) -> None:
        """Count responses in, unless the statistics are fixed."""
        if self.done or not len(features_RD):
            return
        x, n, m = features_RD.detach().cpu().double(), self.count, len(features_RD)
        mean_D = x.mean(dim=0)
        shift_D = mean_D - self.mean_D
        self.squares_D = self.squares_D + ((x - mean_D) ** 2).sum(dim=0) + shift_D**2 * (n * m / (n + m))
        self.mean_D = self.mean_D + shift_D * (m / (n + m))
        self.count = n + m

    def __call__(self, features: Tensor) -> Tensor:
        """Zero mean and unit spread; a feature that never varied becomes 0.

        Before anything was counted the statistics of `features` themselves are used, and not kept.
        """
        if self.count < 2:
            own = Standardizer(features.shape[-1], enough=2)
            own.add(features.reshape(-1, features.shape[-1]))
            return own(features) if own.count > 1 else torch.zeros_like(features)
        spread_D = (self.squares_D / self.count).sqrt()
        varies_D = spread_D > 1e-6 * (1 + self.mean_D.abs())
        scale_D = torch.where(varies_D, 1 / spread_D.clamp_min(1e-30), 0.0)
        mean_D, scale_D = (t.to(device=features.device, dtype=features.dtype) for t in (self.mean_D, scale_D))
        return (features - mean_D) * scale_D

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`."""
        return {"count": self.count, "mean_D": self.mean_D, "squares_D": self.squares_D}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo everything since `state_dict`."""
        self.count, self.mean_D, self.squares_D = state["count"], state["mean_D"], state["squares_D"]


class LabelledDuels:
    """The oracle's labels so far: `2 x D` features a duel, its label, its bootstrap weight per member."""

    def __init__(self, dim: int, members: int, device: str) -> None:
        self.size = 0
        self._columns = {
            "features_BSD": torch.empty(0, 2, dim, device=device),
            "labels_B": torch.empty(0, device=device),
            "weights_BE": torch.empty(0, members, dtype=torch.uint8, device=device),
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name][: self.size]

    def add(self, **rows: Tensor) -> None:
        """Append rows; room is doubled when it runs out, so that a run copies each row a bounded number of times."""
        end = self.size + len(rows["labels_B"])
        for name, column in self._columns.items():
            if end > len(column):
                roomy = column.new_empty(max(end, 2 * len(column)), *column.shape[1:])
                roomy[: self.size] = column[: self.size]
                self._columns[name] = column = roomy
            column[self.size : end] = rows[name].to(column)
        self.size = end


class RewardEnsemble:
    """K reward heads that learn from duels. Features go in raw; standardising them is part of the state."""

    def __init__(self, config: EnsembleConfig, dim: int, seed: int, device: str = "cpu") -> None:
        self.config, self.dim, self.device = config, dim, device
        start, prior = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
        self.start = {n: t.to(device) for n, t in init_heads(config.members, dim, config.hidden, start).items()}
        """phi^0: where each member began."""
        self._prior = {n: t.to(device) for n, t in init_heads(config.members, dim, config.hidden, prior).items()}
        self.heads = {name: t.clone().requires_grad_() for name, t in self.start.items()}
        self.optimizer = torch.optim.Adam(self.heads.values(), lr=config.learning_rate)
        self.standardize = Standardizer(dim, config.calibration_responses)
        self.duels = LabelledDuels(dim, config.members, device)
        self.steps = 0
        """Optimizer steps taken; 0: the rewards are random numbers."""

    @property
    def num_labels(self) -> int:
        """Duels in the data."""
        return self.duels.size

    @torch.inference_mode()
    def rewards(self, features_RD: Tensor) -> Tensor:
        """`E x R` rewards."""
        return self._rewards(self.heads, self.standardize(features_RD))

    def add(self, features_BSD: Tensor, labels_B: Tensor, rng: np.random.Generator) -> None:
        """Oracle-labelled duels: features of first and second, and who won (1 first, 0 second, 0.5 a tie)."""
        shape = (len(labels_B), self.config.members)
        weights = rng.poisson(1.0, shape).clip(0, 255) if self.config.bootstrap else np.ones(shape)
        self.duels.add(
            features_BSD=features_BSD, labels_B=labels_B, weights_BE=torch.from_numpy(weights.astype(np.uint8))
        )

    def update(self, rng: np.random.Generator) -> float | None:
        """Take m steps. Returns the last step's mean negative log-likelihood, nats a duel; None without any data.

        Raises `NonFiniteLossError`.
        """
        if not self.num_labels:
            return None
        nll = math.nan
        for _ in range(self.config.updates):
            nll = self._step(rng.integers(self.num_labels, size=(self.config.members, self.config.batch_size)))
        return nll

    def _step(self, index: np.ndarray) -> float:
        index_EB = torch.from_numpy(index).to(self.device)
        members, size = index_EB.shape
        features = self.standardize(self.duels["features_BSD"][index_EB.flatten()])
        rewards = self._rewards(self.heads, features.view(members, size * 2, self.dim)).view(members, size, 2)
        margins_EB = rewards[..., 0] - rewards[..., 1]
        labels_EB = self.duels["labels_B"][index_EB]
        weights_EB = self.duels["weights_BE"].gather(0, index_EB.T).T.to(labels_EB)
        distance_E = distance_from(self.heads, self.start)
        loss = regularised_nll(margins_EB, labels_EB, weights_EB, distance_E, self.config.regularization)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the reward posterior's loss is {loss.item()} after {self.steps} steps. Lower agent.posterior."
                f"learning_rate={self.config.learning_rate}, or check the backbone for non-finite features."
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            return float(F.binary_cross_entropy_with_logits(margins_EB, labels_EB))

    def _rewards(self, heads: Heads, x: Tensor) -> Tensor:
        rewards = head_rewards(heads, x)
        return rewards + self.config.prior_scale * head_rewards(self._prior, x) if self.config.prior_scale else rewards

    @torch.inference_mode()
    def margins(self, features_BSD: Tensor, *, at_start: bool = False) -> Tensor:
        """`E x B`: reward of the first response minus the second's, now or as the members began."""
        x = self.standardize(features_BSD.reshape(-1, self.dim))
        rewards = self._rewards(self.start if at_start else self.heads, x).view(self.config.members, -1, 2)
        return rewards[..., 0] - rewards[..., 1]

    def state_dict(self) -> dict[str, Any]:
        """All that `add`, `update` and the standardiser change, as tensors and numbers."""
        duels = {name: self.duels[name] for name in ("features_BSD", "labels_B", "weights_BE")}
        return copy.deepcopy(
            {
                "heads": {name: tensor.detach() for name, tensor in self.heads.items()},
                "optimizer": self.optimizer.state_dict(),
                "standardize": self.standardize.state_dict(),
                "duels": {name: tensor.clone() for name, tensor in duels.items()},  # not the room behind them
                "steps": self.steps,
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit. The start and the prior come from the seed."""
        with torch.no_grad():
            for name, tensor in self.heads.items():
                tensor.copy_(state["heads"][name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.standardize.load_state_dict(state["standardize"])
        self.duels = LabelledDuels(self.dim, self.config.members, self.device)
        self.duels.add(**state["duels"])
        self.steps = state["steps"]


def agreement(margins_EB: Tensor, labels_B: Tensor) -> float:
    """Share of labels that the ensemble's mean predicts, undecided ones counted half, ties left out; NaN if none."""
    decided_B = labels_B != 0.5
    right_B = torch.sign(margins_EB.mean(dim=0)) * torch.sign(labels_B - 0.5)
    return float(((right_B[decided_B] + 1) / 2).mean())


def disagreement(margins_EB: Tensor) -> float:
    """Mean chance that two different members name different winners, in [0, 1/2 E/(E-1)]; 0 for a single member.

    >>> round(disagreement(torch.tensor([[1.0], [1.0], [-1.0]])), 4)  # two of the three pairs differ
    0.6667
    """
    members = len(margins_EB)
    if members < 2:
        return 0.0
    share_B = (margins_EB > 0).double().mean(dim=0)
    return float((2 * share_B * (1 - share_B)).mean() * members / (members - 1))


def spread(margins_EB: Tensor) -> float:
    """Root mean square over duels of the members' standard deviation of the margin, reward units."""
    return float(margins_EB.var(dim=0, correction=0).mean().sqrt())
