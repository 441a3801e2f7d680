"""Log-probabilities of responses without float32 logits for the whole batch.

The decoder runs once over all rows; the language-model head runs over response positions only, a chunk of tokens
at a time, and again in the backward pass (checkpointed), so that `chunk x V` logits exist rather than `R x T x V`.

Shapes: R rows (responses), T tokens, N response tokens of all rows, D features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

_IDENTITY_TOLERANCE = 1e-3  # relative, of the largest logit; another formula is off by far more


class _TokenLogProbs(torch.autograd.Function):
    """`logits_NV[n, targets_N[n]] - logsumexp(logits_NV[n])`, with one float32 `N x V` buffer in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        logz_N = logits_NV.to(wide).logsumexp(-1)
        ctx.save_for_backward(logits_NV, targets_N, logz_N)
        return logits_NV.gather(-1, targets_N[:, None]).squeeze(-1).to(wide) - logz_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, logz_N = ctx.saved_tensors
        grad_N = grads[0]
        grad_NV = torch.sub(logits_NV, logz_N[:, None]).exp_().mul_(-grad_N[:, None])
        grad_NV.scatter_add_(-1, targets_N[:, None], grad_N[:, None].to(grad_NV.dtype))
        return grad_NV.to(logits_NV.dtype), None


def token_logprobs(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Log-probability of each target, nats, `N`, in float32 (float64 if the logits are).

    >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2])).exp()
    tensor([0.2500])
    """
    return _TokenLogProbs.apply(logits_NV, targets_N)


def chunked_logprobs(
    hidden_ND: Tensor, targets_N: Tensor, logits_of: Callable[[Tensor], Tensor], chunk_tokens: int
) -> Tensor:
    """Log-probability of each target, `N`: `logits_of` maps at most `chunk_tokens` hidden states at a time to logits,
    in the forward and again in the backward pass.
    """

    def one_chunk(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return token_logprobs(logits_of(hidden_CD), targets_C)

    if len(targets_N) == 0:
        return hidden_ND.sum(-1).float()  # of no rows; keeps the graph
    pieces = [
        checkpoint(one_chunk, hidden_CD, targets_C, use_reentrant=False)
        for hidden_CD, targets_C in zip(hidden_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    ]
    return torch.cat(pieces)


class PolicyModule(nn.Module):
    """A causal language model whose forward gives summed response log-probabilities; what DDP and DeepSpeed wrap.

    Models that change the head's output get the same treatment here: `logit_scale` (Cohere), `logits_scaling`
    (Granite) and `final_logit_softcapping` (Gemma). Whether that gives the model's own logits is tried once on a few
    tokens; where it does not, `own_forward` is set and the model computes all its logits itself, without chunks.
    """

    def __init__(self, model: nn.Module, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.own_forward = False
        self.own_forward = not self._head_gives_the_logits()

    @property
    def base(self) -> Any:
        """The Hugging Face model, adapters injected into it or not, without PEFT's wrapper."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(self, input_ids_RT: Tensor, attention_mask_RT: Tensor, response_mask_RT: Tensor) -> Tensor:
        """Summed log-probability of each row's response tokens, `R`, nats, float32.

        Args:
            input_ids_RT: prompt, response, right padding.
            attention_mask_RT: 1 on prompt and response, 0 on padding.
            response_mask_RT: True on response tokens, end-of-sequence included; never on the first token.
        """
        with set_checkpoint_early_stop(False):  # ZeRO-3's release hooks sit behind the last saved tensor
            wanted_RT = response_mask_RT[:, 1:]  # position t predicts token t + 1
            row_N = wanted_RT.nonzero()[:, 0]
            targets_N = input_ids_RT[:, 1:][wanted_RT]
            if self.own_forward:
                logits_RTV = self.base(input_ids=input_ids_RT, attention_mask=attention_mask_RT, use_cache=False).logits
                logprob_N = token_logprobs(logits_RTV[:, :-1][wanted_RT], targets_N)
            else:
                hidden_ND = self.hidden(input_ids_RT, attention_mask_RT)[:, :-1][wanted_RT]
                logprob_N = self._head_logprobs(hidden_ND, targets_N)
            return logprob_N.new_zeros(len(input_ids_RT)).index_add(0, row_N, logprob_N)

    def hidden(self, input_ids_RT: Tensor, attention_mask_RT: Tensor) -> Tensor:
        """The decoder's last hidden states, `R x T x D`: what the head reads, unless `own_forward`."""
        output = self.base.get_decoder()(input_ids=input_ids_RT, attention_mask=attention_mask_RT, use_cache=False)
        return output.last_hidden_state

    def _head_logprobs(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """All chunks in ONE call of the head module, whose forward is exchanged for the time of the call.

        ZeRO-3 gathers and releases weights in hooks around module calls, in forward and backward: one call costs one
        gather, and every worker makes one, although workers have different numbers of chunks.
        """
        head = self.base.get_output_embeddings()
        plain_forward = head.forward

        def chunks(hidden_ND: Tensor) -> Tensor:
            return chunked_logprobs(hidden_ND, targets_N, lambda h: self.scaled(plain_forward(h)), self.chunk_tokens)

        head.forward = chunks
        try:
            return head(hidden_ND)
        finally:
            del head.forward  # the class's own is back

    def scaled(self, logits_NV: Tensor) -> Tensor:
        """What model families put behind their heads."""
        config = self.base.config
        if scale := getattr(config, "logit_scale", None):
            logits_NV = logits_NV * scale
        if scaling := getattr(config, "logits_scaling", None):
            logits_NV = logits_NV / scaling
        if cap := getattr(config, "final_logit_softcapping", None):
            logits_NV = cap * torch.tanh(logits_NV / cap)
        return logits_NV

    @torch.no_grad()
    def _head_gives_the_logits(self) -> bool:
        """Whether decoder, head and known scalings give what the model's own forward gives, on three tokens."""
        base = self.base
        if base.get_output_embeddings() is None or not hasattr(base, "get_decoder"):
            return False
        training = self.model.training
        self.model.eval()
        ids_RT = (
            torch.arange(1, 4, device=next(self.parameters()).device)[None] % base.config.get_text_config().vocab_size
        )
        own_TV = base(input_ids=ids_RT, use_cache=False).logits[0].float()
        try:
            hidden_TD = self.hidden(ids_RT, torch.ones_like(ids_RT))[0]
            ours_TV = self.scaled(base.get_output_embeddings()(hidden_TD)).float()
        except (AttributeError, TypeError, RuntimeError):
            return False  # a decoder with another interface
        finally:
            self.model.train(training)
        return bool((ours_TV - own_TV).abs().max() <= _IDENTITY_TOLERANCE * (1 + own_TV.abs().max()))
