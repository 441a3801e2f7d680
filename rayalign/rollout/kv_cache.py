"""Key-value caches for many samples of few prompts. The stock one is copied whole at every token, n times per prompt.

`RoomyLayer` repeats the prompts once and is then written in place: for every model with ordinary attention layers.
`SharedPrefixCache` keeps each prompt once. All samples of a prompt attend to it in one matrix product, and each row
to its own few tokens: the softmax runs over both. For the model types in `SHARED_PREFIX_MODELS`.

Shapes: P prompts, R rows (samples still decoded), M most rows of one prompt, H key-value heads, G query heads per
key-value head, L prompt tokens, T sampled tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayalign.system.hf import AttentionInterface, AttentionMaskInterface

SHARED_PREFIX_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Model types whose attention is a plain softmax(q k^T) v behind transformers' attention interface."""
ATTENTION = "rayalign_shared_prefix"
"""What transformers calls our attention function."""


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, `R x H x (L + T) x D`, repeated from the prompts' and followed by free places."""

    def __init__(self, prompts: DynamicLayer, owner: Tensor, room: int) -> None:
        super().__init__()
        keys, values = _filled(prompts)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._length = keys.shape[-2]
        self._keys, self._values = (_with_room(tensor, owner, room) for tensor in (keys, values))
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the old ones; returns views of all."""
        end = self._length + key_states.shape[-2]
        self._keys[:, :, self._length : end] = key_states
        self._values[:, :, self._length : end] = value_states
        self._length = end
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order."""
        self._keys, self._values = self._keys[beam_idx], self._values[beam_idx]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]
        return self.keys, self.values


class SharedPrefixCache(Cache):
    """Each prompt's keys and values once, and those of each row's own tokens."""

    def __init__(self, prompts: DynamicCache, mask_PL: Tensor, n: int, room: int) -> None:
        owner = torch.arange(len(mask_PL), device=mask_PL.device).repeat_interleave(n)
        self.rows = _Rows(owner, mask_PL)
        super().__init__(layers=[_SharedPrefixLayer(layer, self.rows, room) for layer in prompts.layers])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, an ascending index; prompts without rows leave too."""
        alive = self.rows.keep(beam_idx)
        for layer in self.layers:
            layer.keep(beam_idx, alive)

    def check_used(self) -> None:
        """That the model attended to the prompts in every layer: what it does with our keys is its own code."""
        unused = [i for i, layer in enumerate(self.layers) if not layer.used]
        assert not unused, f"layers {unused} did not go through {ATTENTION}: take the model out of SHARED_PREFIX_MODELS"


class _Rows:
    """Which prompt each row belongs to, and its place in a `P x M` grid of rows by prompt."""

    def __init__(self, owner: Tensor, mask_PL: Tensor) -> None:
        self.owner, self.mask_PL = owner, mask_PL
        self._arrange()

    def keep(self, index: Tensor) -> Tensor | None:
        """Drop other rows. Returns the prompts that are left, None if all are."""
        counts = torch.bincount(self.owner[index], minlength=len(self.mask_PL))
        alive = None if bool(counts.all()) else counts.nonzero()[:, 0]
        renumbered = (counts > 0).cumsum(0) - 1
        self.owner = renumbered[self.owner[index]]
        if alive is not None:
            self.mask_PL = self.mask_PL[alive]
        self._arrange()
        return alive

    def _arrange(self) -> None:
        counts = torch.bincount(self.owner, minlength=len(self.mask_PL))
        self.P, self.M = len(counts), int(counts.max())
        rank = torch.arange(len(self.owner), device=self.owner.device) - (counts.cumsum(0) - counts)[self.owner]
        # None: every prompt has M rows, the grid is the rows themselves
        self.place = None if len(self.owner) == self.P * self.M else self.owner * self.M + rank
        self.padding = None if bool(self.mask_PL.all()) else ~self.mask_PL[:, None, None, :]

    def to_grid(self, x: Tensor) -> Tensor:
        """`R x H x G x ... -> P x H x (M G) x ...`; places without a row are 0."""
        if self.place is not None:
            x = x.new_zeros(self.P * self.M, *x.shape[1:]).index_copy_(0, self.place, x)
        _, H, G, last = x.shape
        return x.view(self.P, self.M, H, G, last).transpose(1, 2).reshape(self.P, H, self.M * G, last)

    def to_rows(self, x: Tensor, G: int) -> Tensor:
        """The inverse of `to_grid`."""
        P, H, _, last = x.shape
        x = x.view(P, H, self.M, G, last).transpose(1, 2).reshape(P * self.M, H, G, last)
        return x if self.place is None else x[self.place]


class _SharedPrefixLayer(DynamicLayer):
    def __init__(self, prompts: DynamicLayer, rows: _Rows, room: int) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = _filled(prompts)  # P x H x L x D
        self.dtype, self.device, self.is_initialized = self.prompt_keys.dtype, self.prompt_keys.device, True
        self.rows, self.used, self._length = rows, False, 0
        _, heads, _, size = self.prompt_keys.shape
        self._keys = self.prompt_keys.new_empty(len(rows.owner), heads, room, size)  # R x H x T x D
        self._values = self.prompt_values.new_empty(len(rows.owner), heads, room, self.prompt_values.shape[-1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write each row's new token; returns the rows' own tokens, the keys marked as ours."""
        self._keys[:, :, self._length] = key_states[:, :, 0]
        self._values[:, :, self._length] = value_states[:, :, 0]
        self._length += 1
        self.keys, self.values = self._keys[:, :, : self._length], self._values[:, :, : self._length]
        self.keys.shared_prefix = self  # type: ignore[attr-defined]  # how `_attention` finds the way back
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of prompt and response, padding included."""
        return self.prompt_keys.shape[-2] + self._length

    def keep(self, index: Tensor, alive: Tensor | None) -> None:
        self._keys, self._values = self._keys[index], self._values[index]
        if alive is not None:
            self.prompt_keys, self.prompt_values = self.prompt_keys[alive], self.prompt_values[alive]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Attention of one new token per row, `R x (H G) x 1 x D -> R x 1 x (H G) x D`."""
        self.used = True
        R, heads, _, D = query.shape
        H = keys.shape[1]
        G = heads // H
        q = query.view(R, H, G, D) * scaling
        to_prompt = self.rows.to_grid(q) @ self.prompt_keys.transpose(-1, -2)  # P x H x MG x L
        if self.rows.padding is not None:
            to_prompt = to_prompt.masked_fill(self.rows.padding, -torch.inf)
        to_own = q @ keys.transpose(-1, -2)  # R x H x G x T
        scores = torch.cat([self.rows.to_rows(to_prompt, G), to_own], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        L = to_prompt.shape[-1]
        from_prompt = self.rows.to_rows(self.rows.to_grid(weights[..., :L]) @ self.prompt_values, G)
        return (from_prompt + weights[..., L:] @ values).view(R, 1, heads, -1)


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface: ours for keys of a shared prefix, scaled-dot-product for all others."""
    layer = getattr(key, "shared_prefix", None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    return layer.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def shares_prefix(config: Any) -> bool:
    """Whether a model with this config can use `SharedPrefixCache`: a known type, full attention in every layer."""
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return config.model_type in SHARED_PREFIX_MODELS and set(layers) == {"full_attention"} and sliding is None


def repeat_with_room(cache: DynamicCache, owner: Tensor, room: int) -> None:
    """Repeat each prompt's cache for its rows, with room for `room` more tokens where the layer allows it."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, owner, room)
        else:  # sliding windows, linear attention: they know how to repeat themselves
            layer.reorder_cache(owner)


def _filled(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    assert layer.keys is not None and layer.values is not None, "the prompts were not prefilled"
    return layer.keys, layer.values


def _with_room(tensor: Tensor, owner: Tensor, room: int) -> Tensor:
    _, heads, length, size = tensor.shape
    roomy = tensor.new_empty(len(owner), heads, length + room, size)
    roomy[:, :, :length] = tensor[owner]
    return roomy
