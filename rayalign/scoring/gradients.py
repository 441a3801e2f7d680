"""Gradients of each response's log-probability with respect to LoRA parameters, projected, a batch in one backward.

For a linear layer y = W x and L_r, the summed log-probability of response r, the gradient is a sum over tokens,

    dL_r / dW = sum_t g_rt x_rt^T        g_rt = dL_r / dy_rt

so one backward of sum_r L_r, which mixes no rows, yields all of them: hooks keep x on the way forward and meet g on
the way back. The reference does not depend on the weights: up to beta this is the gradient of the implicit reward.

    adapters loaded    W is each of the adapter's own matrices A and B, as trained so far
    none loaded        adapters as LoRA initialises them, A random and B = 0, on every linear layer but the head.
                       They change nothing and need not be attached: dL/dB = sum_t g_t (A x_t)^T, and dL/dA = 0.

A layer's gradient is projected as soon as it is known; gradients of all layers never exist together.

Shapes: R rows (responses)    T tokens    O, I a layer's output and input features    K parameters    D projected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayalign.errors import ConfigError
from rayalign.learner.logprobs import PolicyModule

NONZEROS = 4
"""Nonzero entries in each column of the projection: each parameter is added to so many of the D sums."""
_ADAPTER, _PROJECTION = range(2)  # purposes of a layer's random streams


# -- the projection ----------------------------------------------------------------------------------------------
def project(values_RK: Tensor, dim: int, *stream: int) -> Tensor:
    r"""`S v` of each row, `R x D` float32, for the random sparse matrix `S` that the numbers `stream` name.

    The sparse Johnson-Lindenstrauss transform (Kane and Nelson 2014, the block construction): the D rows are cut into
    s = `NONZEROS` blocks, and each column of S has one entry per block, +-1/sqrt(s), in a random row of it. As with a
    dense Gaussian matrix `E <Su, Sv> = <u, v>`, and `Var |Sv|^2 <= 2 |v|^4 / D` for every v (D a multiple of s); with
    D = O(log(n) / eps^2) and s = O(log(n) / eps) all distances among n vectors are kept within 1 +- eps with high
    probability. S has K s entries, not K D.

    >>> project(torch.tensor([[2.0]]), 4, 0).abs()  # a column has NONZEROS = 4 entries of size 1/2
    tensor([[1., 1., 1., 1.]])
    """
    blocks = min(NONZEROS, dim)
    bounds = torch.arange(blocks + 1) * dim // blocks
    rng = _generator(*stream)
    uniform_KS = torch.rand(values_RK.shape[1], blocks, generator=rng, dtype=torch.float64)
    row_KS = (bounds[:-1] + (uniform_KS * bounds.diff()).long()).flatten()
    sign_KS = (torch.randint(2, row_KS.shape, generator=rng) * 2 - 1).float() / blocks**0.5
    # Sorted by row, each of the D sums is one bag: the same order of additions every time, on any device.
    order = row_KS.argsort(stable=True)
    starts_D = torch.searchsorted(row_KS[order], torch.arange(dim))
    device = values_RK.device
    return F.embedding_bag(
        (order // blocks).to(device),
        values_RK.float().T.contiguous(),
        starts_D.to(device),
        mode="sum",
        per_sample_weights=sign_KS[order].to(device),
    ).T


def _generator(*stream: int) -> torch.Generator:
    (seed,) = np.random.SeedSequence(stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


# -- the layers ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Site:
    """A linear layer, and the matrix on it whose gradient is taken."""

    name: str
    module: nn.Module
    down: Tensor | None
    """A, `rank x I`, of an adapter that is not attached: the matrix is its B. None: it is the layer's own weight."""

    def inner(self, x_RTI: Tensor) -> Tensor:
        """What the matrix is multiplied by in the forward pass."""
        x_RTI = x_RTI.detach()
        return x_RTI if self.down is None else x_RTI.float() @ self.down.T


def sites(model: nn.Module, rank: int, seed: int) -> list[Site]:
    """Matrices A and B of the adapters that `model` has; where it has none, those of LoRA's initialisation.

    Adapters on embeddings are left out.
    """
    attached = [
        Site(f"{name}.{part}.{adapter}", matrices[adapter], None)
        for name, module in model.named_modules()
        for part in ("lora_A", "lora_B")
        if isinstance(matrices := getattr(module, part, None), nn.ModuleDict)
        for adapter in getattr(module, "active_adapters", ())
        if adapter in matrices
    ]
    return attached or [
        Site(name, module, initial_down(module, rank, seed, number))
        for number, (name, module) in enumerate(_linear_layers(model))
    ]


def initial_down(module: nn.Module, rank: int, seed: int, number: int) -> Tensor:
    """A as PEFT initialises it, `rank x I`, uniform in +- 1/sqrt(I): that of the layer `number`."""
    weight: Any = module.weight
    width = weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0]  # GPT-2's Conv1D is transposed
    down = torch.rand(rank, width, generator=_generator(seed, number, _ADAPTER)) * 2 - 1
    return (down / width**0.5).to(weight.device)


def _linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer but the language-model head, as PEFT's `all-linear`."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


# -- the pass --------------------------------------------------------------------------------------------------------
class LoraGradients:
    """Called with a padded batch, it gives `R x D` float32: projected gradients of the rows' log-probabilities.

    The model is the same afterwards: no hook, no gradient and no changed flag is left in it.
    """

    def __init__(self, model: Any, *, rank: int, dim: int, seed: int, chunk_tokens: int) -> None:
        if dim < 1:
            raise ConfigError(f"dim={dim} must be at least 1: gradients are projected to so many dimensions.")
        self.policy = PolicyModule(model, chunk_tokens)
        self.sites, self.dim, self.seed = sites(self.policy.base, rank, seed), dim, seed
        if not self.sites:
            raise ConfigError(
                f"{type(model).__name__} has no linear layer beside its head, so there is no LoRA gradient to take."
            )

    def __call__(self, input_ids_RT: Tensor, attention_mask_RT: Tensor, response_mask_RT: Tensor) -> Tensor:
        """See the class."""
        total_RD = torch.zeros(len(input_ids_RT), self.dim, device=input_ids_RT.device)

        def add(number: int, gradient_RK: Tensor) -> None:
            total_RD.add_(project(gradient_RK, self.dim, self.seed, number, _PROJECTION))

        with self._hooks(add) as inputs, torch.enable_grad():
            logprob_R = self.policy(input_ids_RT, attention_mask_RT, response_mask_RT)
            # With respect to the embedded tokens: on the way to them g passes every layer, and no `.grad` is touched.
            torch.autograd.grad(logprob_R.sum(), inputs)
        return total_RD

    @contextmanager
    def _hooks(self, add: Callable[[int, Tensor], None]) -> Iterator[list[Tensor]]:
        """Between enter and exit a backward calls `add(number of the site, its gradients)`; yields where it ends."""
        inputs: list[Tensor] = []

        def embedded(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
            inputs.append(output.requires_grad_())

        def forward(number: int, site: Site, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.ndim != 3:
                raise ConfigError(
                    f"layer {site.name!r} gets the tokens of all responses in one list (mixtures of experts do), so "
                    "their gradients can't be told apart. Train adapters (learner.lora.rank) on other layers, by "
                    "learner.lora.target_modules."
                )
            output.register_hook(partial(backward, number, site.inner(arguments[0])))

        def backward(number: int, inner_RTI: Tensor, g_RTO: Tensor) -> None:
            gradient_ROI = g_RTO.float().transpose(1, 2) @ inner_RTI.float()
            add(number, gradient_ROI.flatten(1))

        with ExitStack() as stack:
            handles = [self.policy.base.get_input_embeddings().register_forward_hook(embedded)]
            handles += [
                site.module.register_forward_hook(partial(forward, number, site))
                for number, site in enumerate(self.sites)
            ]
            for handle in handles:
                stack.callback(handle.remove)
            yield inputs
