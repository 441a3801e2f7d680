"""Weights on their way from the learner to the engines: named CPU arrays, a version and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rayalign.errors import DataError, WeightSyncError

_HEADER = "rayalign"
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
            with warnings.catch_warnings():  # arrays of the object store are read-only, and so is what we do with them
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                tensor = torch.from_numpy(array)
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
        digest.update((tensor if tensor.ndim else tensor.reshape(1)).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_back(weights: Weights, live: Mapping[str, Tensor]) -> str:
    """The checksum of what an engine holds under the names it was sent, for comparison with `weights.checksum`.

    `live` has the engine's own tensors, under the same names. Where the engine computes in another type, equality
    is checked value by value after the cast, and the answer is the checksum of what arrived; it differs from
    `weights.checksum` if either check fails.
    """
    held = {name: live[name] for name in weights.arrays}
    if all(str(tensor.dtype).removeprefix("torch.") == weights.dtypes[name] for name, tensor in held.items()):
        return checksum(held)
    for name, sent in weights.tensors():
        if not torch.equal(held[name].detach().cpu(), sent.to(held[name].dtype)):
            return f"{name} is not what was sent"
    return checksum(dict(weights.tensors()))


def copy_into(weights: Weights, live: Mapping[str, Tensor]) -> None:
    """Overwrite an engine's own tensors in place, after checking that every name and shape fits.

    Raises `WeightSyncError`, before anything is written, if a name is unknown, a shape differs, or a tensor of
    `live` would keep old values (tensors that share memory, such as tied embeddings, need only one name).
    """
    unknown = sorted(set(weights.arrays) - set(live))
    covered = {live[name].data_ptr() for name in weights.arrays if name in live}
    missing = sorted(name for name, tensor in live.items() if tensor.numel() and tensor.data_ptr() not in covered)
    wrong = [
        f"{name} {tuple(array.shape)} instead of {tuple(live[name].shape)}"
        for name, array in weights.arrays.items()
        if name in live and tuple(array.shape) != tuple(live[name].shape)
    ]
    for problem, names in (("unknown to the engine", unknown), ("missing", missing), ("of another shape", wrong)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise WeightSyncError(
                f"weights version {weights.version}: {len(names)} tensors are {problem}: {shown}. "
                "Publish the state dict of the same Hugging Face model that the engines loaded."
            )
    with torch.no_grad():
        for name, tensor in weights.tensors():
            live[name].copy_(tensor)


def save_weights(weights: Weights, path: str | Path) -> None:
    """Write them as one safetensors file, replacing what is there in one step: a crash leaves the old or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"version": weights.version, "checksum": weights.checksum, "adapter": weights.adapter}
    partial = path.with_name(path.name + ".partial")
    save_file(dict(weights.tensors()), partial, metadata={_HEADER: _json(header)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_adapter(weights: Weights, folder: str | Path) -> None:
    """Write a LoRA adapter the way PEFT does, for whoever reads adapters from a directory."""
    save_file(dict(weights.tensors()), Path(folder) / "adapter_model.safetensors")
    (Path(folder) / "adapter_config.json").write_text(_json(weights.adapter))


def load_weights(path: str | Path) -> Weights:
    """Read what `save_weights` wrote. `DataError` if it is not there or its checksum is not the one written."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[_HEADER])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:
        raise DataError(f"{str(path)!r} does not hold saved weights: {error}") from error
    weights = pack(header["version"], state, header["adapter"])
    if weights.checksum != header["checksum"]:
        raise DataError(
            f"{str(path)!r}: the weights' checksum is not the one they were saved with; the file is damaged."
        )
    return weights


def _json(value: object) -> str:
    """An adapter's config holds sets (target modules) and enums, which JSON knows as lists and strings."""
    return json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set) else str(getattr(v, "value", v)))
