"""Weights on their way from the learner to the engines: named CPU arrays, a version and a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_STORED_AS = {torch.bfloat16: torch.int16}  # numpy has no bfloat16: its bits travel as int16


@dataclass(frozen=True, slots=True)
class Weights:
    """A version of the policy as it travels through the object store, which shares numpy arrays without copies."""

    version: int
    arrays: Mapping[str, np.ndarray]
    """Hugging Face parameter name -> values (bfloat16 as its bits in int16)."""
    dtypes: Mapping[str, str]
    """Hugging Face parameter name -> torch dtype, e.g. `bfloat16`."""
    checksum: str
    """Of names, types, shapes and values."""
    adapter: Mapping[str, object] | None = None
    """PEFT's adapter config where `arrays` are a LoRA adapter rather than whole weights."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, sharing memory with the arrays: read only."""
        for name, array in self.arrays.items():
            tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
            dtype = getattr(torch, self.dtypes[name])
            yield name, tensor.view(dtype) if dtype in _STORED_AS else tensor

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


def pack(version: int, state: Mapping[str, Tensor], adapter: Mapping[str, object] | None = None) -> Weights:
    """Copy a state dict to numpy and take its checksum."""
    arrays, dtypes = {}, {}
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu").contiguous()
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        arrays[name] = tensor.view(_STORED_AS.get(tensor.dtype, tensor.dtype)).numpy().copy()
    return Weights(version, arrays, dtypes, checksum(state), adapter)


def checksum(state: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values, in any order; equal if and (practically) only if the weights are."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy() if tensor.ndim else tensor.reshape(1).view(torch.uint8).numpy())
    return digest.hexdigest()
