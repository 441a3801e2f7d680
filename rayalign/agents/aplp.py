"""APLP: active preference learning as ActiveDPO's baseline (Muldrew et al. 2024; ActiveDPO, section 4).

    propose  y_1..y_3 ~ pi_t(.|x) for each x of a large batch
    select   the prompts with the highest predictive entropy, and of each the pair with the largest |implicit margin|
    loss     DPO

It is `apl` with the numbers of ActiveDPO's comparison, where all methods share responses, labels and training: 3
responses per prompt, 20 prompts drawn per label.

Differs from the paper: as `apl` does. One prompt has one duel, where ActiveDPO may ask about several of its pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayalign.agents.apl import APL, APLConfig


@dataclass(frozen=True, kw_only=True)
class APLPConfig(APLConfig):
    """Settings of `APLP`."""

    prompts_per_duel: int = 20
    """Prompts drawn for each that is kept: 1,000 for a batch of 50 in the paper."""
    num_candidates: int = 3
    """Responses sampled for each prompt drawn."""


class APLP(APL):
    """Uncertain prompts, and of each the pair whose winner the policy is most certain of; 3 responses."""

    name = "aplp"
    Config = APLPConfig
