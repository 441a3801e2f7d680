"""What runs inside vLLM's worker: loading weights, and reading back what the model holds afterwards.

vLLM calls these by name (`collective_rpc`) on its own worker class, to which `WorkerExtension` is added.

What is read back of whole weights (`find_difference`):
    embeddings, norms, biases, and on GPUs the linear layers: every value
    linear layers on a CPU: vLLM repacks them and drops the originals, so a few columns, others at each version, are
    read through the layer itself: a one-hot input gives a column of the weights exactly
    layers of kinds unknown here, and shards of tensor parallelism: only what went into vLLM's loader
Of an adapter: every value in the slots that vLLM computes with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rayalign.rollout.weights import Weights, checksum

log = logging.getLogger(__name__)

PROBED_COLUMNS = 8
"""Columns of each repacked linear layer that are read back after a sync."""


class WorkerExtension:
    """Methods added to vLLM's worker. The prefix keeps them apart from vLLM's own."""

    model_runner: Any

    def rayalign_load(self, weights: Weights) -> str:
        """Load whole weights; returns their checksum as read back, or the name of what differs."""
        self.model_runner.reload_weights(weights_iterator=weights.tensors())
        repack_tied(self.model_runner.get_model())
        return self.rayalign_read_back(weights)

    def rayalign_read_back(self, weights: Weights) -> str:
        """The checksum of what arrived, if the model holds it; else what it does not hold."""
        difference = find_difference(self.model_runner.get_model(), weights)
        return difference or checksum(dict(weights.tensors()))

    def rayalign_read_back_adapter(self, weights: Weights, adapter_id: int) -> str:
        """The same for the adapter that vLLM knows as `adapter_id`."""
        manager = self.model_runner.lora_manager._adapter_manager
        difference = find_adapter_difference(manager, weights, adapter_id)
        return difference or checksum(dict(weights.tensors()))


def repack_tied(model: torch.nn.Module) -> None:
    """Renew what vLLM 0.32 forgets on a CPU: an output matrix tied to the embeddings keeps its old repacked copy."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel():
            module.quant_method.process_weights_after_loading(module)


def find_difference(model: torch.nn.Module, weights: Weights) -> str | None:
    """The first tensor of `weights` that vLLM's `model` does not hold, or None."""
    sent = dict(weights.tensors())
    used: set[str] = set()
    unchecked: list[str] = []
    owners: dict[int, list[str]] = {}
    for name, module, parameter_name, parameter in _parameters(model):
        sources = _sources(name, parameter_name, sent, getattr(model, "packed_modules_mapping", {}))
        if sources is None:  # tied to one that was sent, and still to be looked at: its repacked copy is its own
            sources = owners.get(parameter.data_ptr()) if parameter.numel() else None
        if sources is None:
            return f"{name}.{parameter_name} was not sent"
        owners[parameter.data_ptr()] = sources
        expected = torch.cat([sent[source] for source in sources])
        used.update(sources)
        held, checked = parameter.detach(), False
        if held.ndim == expected.ndim and held.shape[1:] == expected.shape[1:] and len(held) >= len(expected):
            # vLLM pads vocabularies at the end
            if not torch.equal(held[: len(expected)].cpu(), expected.to(held.dtype)):
                return f"{name}.{parameter_name} is not what was sent"
            checked = True
        if parameter_name == "weight" and hasattr(module, "cpu_linear") and expected.ndim == 2:
            if not _columns_agree(module, expected.to(held.dtype), seed=weights.version):
                return f"{name}.{parameter_name} (as repacked for the CPU) is not what was sent"
            checked = True
        if not checked:
            unchecked.append(f"{name}.{parameter_name}")
    # A tied output matrix may be sent beside the embeddings that it is.
    unknown = set(sent) - used - {"lm_head.weight"}
    if unknown:
        return f"{min(unknown)} is unknown to the engine"
    if unchecked:
        log.warning("weights version %d: %d tensors can't be read back from vLLM", weights.version, len(unchecked))
    return None


def find_adapter_difference(manager: Any, weights: Weights, adapter_id: int) -> str | None:
    """The first tensor of an adapter that is not in the slot that vLLM computes with, or None."""
    if adapter_id not in manager.lora_index_to_id:
        return f"adapter {adapter_id} is not active"
    slot = manager.lora_index_to_id.index(adapter_id)
    config: dict[str, Any] = dict(weights.adapter or {})
    rank = int(config["r"])
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    sent = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.tensors()}
    used = set()
    for name, module in manager.modules.items():
        parent = name.rpartition(".")[0]
        for i, part in enumerate(manager.packed_modules.get(name, [name])):
            part = part if "." in part else f"{parent}.{part}".lstrip(".")
            for letter, stacked, factor in (("A", module.lora_a_stacked, 1.0), ("B", module.lora_b_stacked, scaling)):
                key = f"{part}.lora_{letter}.weight"
                held = stacked[i][slot, 0]
                if key not in sent:
                    if held.any():
                        return f"{key} was not sent, but is not zero"
                    continue
                used.add(key)
                expected = sent[key].to(held.dtype)
                rows, columns = expected.shape
                if not torch.equal(held[:rows, :columns].cpu(), expected * factor):
                    return f"{key} is not what was sent"
    unknown = set(sent) - used
    return f"{min(unknown)} is unknown to the engine" if unknown else None


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, Tensor]]:
    """Module name as a checkpoint has it, module, parameter name, parameter."""
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            yield name.replace(".base_layer", ""), module, parameter_name, parameter


def _sources(
    name: str, parameter_name: str, sent: Mapping[str, Tensor], packed: Mapping[str, list[str]]
) -> list[str] | None:
    """Names of the sent tensors of which vLLM made one parameter: itself, or the parts of a fused layer."""
    if f"{name}.{parameter_name}" in sent:
        return [f"{name}.{parameter_name}"]
    parent, _, leaf = name.rpartition(".")
    parts = [f"{parent}.{part}.{parameter_name}".lstrip(".") for part in packed.get(leaf, [])]
    return parts if parts and all(part in sent for part in parts) else None


def _columns_agree(module: Any, expected: Tensor, seed: int) -> bool:
    """Whether a few columns of a repacked linear layer are those of `expected`, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randperm(expected.shape[1], generator=generator)[:PROBED_COLUMNS]
    one_hot = torch.zeros(len(columns), expected.shape[1], dtype=expected.dtype)
    one_hot[torch.arange(len(columns)), columns] = 1
    found = module.cpu_linear(one_hot, module.weight, None)[:, : len(expected)]
    return torch.equal(found, expected[:, columns].T)
