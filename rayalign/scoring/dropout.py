"""MC dropout before the last linear layer: how sure a policy is of each token (Mehta et al. 2023, section 5.1).

    trunk       once: hidden states where response tokens are predicted, N x D
    per mask j  log pi(t | ., d_j): the language-model head on masked features, a chunk of tokens at a time
    moments     per token over the masks, then summed over a response's tokens

A mask d_j is a set of features, the same for every token, prompt and batch (the paper writes pi(t_i | x, .., d_j), and
a mask has no other index). Moments are taken token by token, so a new mask at every position would give moments of
the same distribution. What is drawn depends on (seed, masks, D, rate) alone.

At a time there are `C x V` logits, of one mask. Dropping features of a linear layer subtracts their columns,

    W (h * d) / (1 - p) = (W h - W_dropped h_dropped) / (1 - p),

so that the full product is computed once per chunk, and per mask only a product over the p D dropped features.

Shapes: R rows (responses)    T tokens    N response tokens of all rows, C of a chunk    D features    V vocabulary
        M masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayalign.errors import ConfigError
from rayalign.learner.logprobs import PolicyModule, token_logprobs


def feature_masks(masks: int, dim: int, rate: float, seed: int) -> Tensor:
    """`M x D` bool on the CPU, True where a feature is kept; each is dropped with probability `rate`.

    >>> feature_masks(2, 4, rate=0.0, seed=0).all()
    tensor(True)
    """
    return torch.rand(masks, dim, generator=torch.Generator().manual_seed(seed)) >= rate


class HeadDropout:
    """Moments of response log-probabilities under dropout before the head. Nothing else is random: use an eval model.

    Where `PolicyModule` can't get the model's logits from its hidden states (`own_forward`), or with `plain=True`, the
    whole model runs once per mask: the same numbers, for more time and memory.
    """

    def __init__(self, policy: PolicyModule, *, rate: float, masks: int, seed: int, plain: bool = False) -> None:
        if not 0 <= rate < 1:
            raise ConfigError(f"rate={rate} must be in [0, 1): it is the share of features that dropout drops.")
        if masks < 2:
            raise ConfigError(f"masks={masks} must be at least 2: the spread over one dropout mask is not defined.")
        self.policy, self.rate, self.masks, self.seed = policy, rate, masks, seed
        self.head: Any = policy.base.get_output_embeddings()
        if self.head is None:
            raise ConfigError(
                f"{type(policy.base).__name__} has no output embeddings: no last layer that dropout could come before. "
                "Use a causal language model with a head, or an agent that does without dropout."
            )
        self.plain = plain or policy.own_forward

    @torch.no_grad()
    def __call__(self, input_ids_RT: Tensor, attention_mask_RT: Tensor, response_mask_RT: Tensor) -> Tensor:
        """`R x 3`: mean, standard deviation and variance (ddof 1) of each token's log-probability, summed over the
        row's response tokens; nats, nats, squared nats, float64. Arguments as in `PolicyModule.forward`.
        """
        wanted_RT = response_mask_RT[:, 1:]  # position t predicts token t + 1
        targets_N = input_ids_RT[:, 1:][wanted_RT]
        if self.plain:
            rows = (input_ids_RT, attention_mask_RT)
            moments_N3 = token_moments(
                torch.stack([token_logprobs(v[:, :-1][wanted_RT], targets_N) for v in self._whole_model(*rows)])
            )
        else:
            hidden_ND = self.policy.hidden(input_ids_RT, attention_mask_RT)[:, :-1][wanted_RT]
            chunk = self.policy.chunk_tokens
            pieces = [
                token_moments(torch.stack([token_logprobs(logits_CV, targets_C) for logits_CV in self._logits(h_CD)]))
                for h_CD, targets_C in zip(hidden_ND.split(chunk), targets_N.split(chunk), strict=True)
            ]
            moments_N3 = torch.cat(pieces) if pieces else hidden_ND.new_zeros(0, 3, dtype=torch.float64)
        row_N = wanted_RT.nonzero()[:, 0]
        return moments_N3.new_zeros(len(input_ids_RT), 3).index_add(0, row_N, moments_N3)

    def _kept(self, like: Tensor) -> Tensor:
        """The masks for features `like`, `M x D`, on their device."""
        return feature_masks(self.masks, like.shape[-1], self.rate, self.seed).to(like.device)

    def _logits(self, hidden_CD: Tensor) -> Iterator[Tensor]:
        """`C x V` logits under each mask in turn; an iterator, so that no two need to exist at the same time."""
        keep = 1 - self.rate
        kept_MD = self._kept(hidden_CD)
        if type(self.head) is not nn.Linear:  # adapters on the head, quantised heads, ...
            for kept_D in kept_MD:
                yield self.policy.scaled(self.head(hidden_CD * kept_D / keep))
            return
        weight_VD, bias_V = self.head.weight, self.head.bias
        wide = torch.promote_types(hidden_CD.dtype, torch.float32)  # rounding to bfloat16 would look like uncertainty
        whole_CV = F.linear(hidden_CD, weight_VD).to(wide)
        buffer_CV = torch.empty_like(whole_CV)
        for kept_D in kept_MD:
            dropped = (~kept_D).nonzero()[:, 0]
            lost_CK, lost_KV = hidden_CD[:, dropped].to(wide), weight_VD[:, dropped].to(wide).T
            torch.addmm(whole_CV, lost_CK, lost_KV, beta=1 / keep, alpha=-1 / keep, out=buffer_CV)
            if bias_V is not None:
                buffer_CV += bias_V
            yield self.policy.scaled(buffer_CV)

    def _whole_model(self, input_ids_RT: Tensor, attention_mask_RT: Tensor) -> Iterator[Tensor]:
        """`R x T x V` logits under each mask in turn, from the model's own forward."""
        for mask in range(self.masks):

            def drop(head: nn.Module, inputs: tuple[Tensor, ...], mask: int = mask) -> tuple[Tensor, ...]:
                return inputs[0] * self._kept(inputs[0])[mask] / (1 - self.rate), *inputs[1:]

            hook = self.head.register_forward_pre_hook(drop)
            try:
                yield self.policy.base(input_ids=input_ids_RT, attention_mask=attention_mask_RT, use_cache=False).logits
            finally:
                hook.remove()


def token_moments(logprob_MN: Tensor) -> Tensor:
    """Mean, centred sample standard deviation and variance (ddof 1) over masks, `N x 3`, float64.

    >>> token_moments(torch.tensor([[-1.0], [-3.0]]))
    tensor([[-2.0000,  1.4142,  2.0000]], dtype=torch.float64)
    """
    variance_N, mean_N = torch.var_mean(logprob_MN.double(), dim=0, correction=1)
    return torch.stack([mean_N, variance_N.sqrt(), variance_N], dim=-1)
