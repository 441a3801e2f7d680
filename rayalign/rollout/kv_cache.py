"""A key-value cache that is allocated once: the stock one is copied whole at every token.

Shapes: R rows, H key-value heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, `R x H x T x D`, repeated from the prompts' and followed by `room` free places."""

    def __init__(self, prompts: DynamicLayer, owner: Tensor, room: int) -> None:
        super().__init__()
        keys, values = prompts.keys, prompts.values
        assert keys is not None and values is not None, "the prompts were not prefilled"
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


def _with_room(tensor: Tensor, owner: Tensor, room: int) -> Tensor:
    _, heads, length, size = tensor.shape
    roomy = tensor.new_empty(len(owner), heads, length + room, size)
    roomy[:, :, :length] = tensor[owner]
    return roomy
