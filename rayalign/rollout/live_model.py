"""A Hugging Face model whose weights are exchanged while it is in use: whole ones, or adapters over the first."""

from __future__ import annotations

from typing import Any

import torch

from rayalign.errors import WeightSyncError
from rayalign.rollout.weights import Weights, copy_into, read_back


class LiveModel:
    """Holds a model on a device; `load` gives it other weights in place."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.version = 0
        self._peft: Any = None
        self._on_initial_policy = True

    @property
    def peft(self) -> Any:
        """PEFT's wrapper around the model, once an adapter was loaded; else None."""
        return self._peft

    def load(self, weights: Weights) -> str:
        """Copy into the live parameters in place; returns the checksum read back from them."""
        if weights.adapter is not None:
            found = self._load_adapter(weights)
        else:
            if self._peft is not None:  # merged weights after adapters: the adapters' part is in them
                self.model, self._peft = self._peft.unload(), None
            live = self.model.state_dict()
            self._on_initial_policy = False
            copy_into(weights, live)
            found = read_back(weights, live)
        self.version = weights.version
        return found

    def _load_adapter(self, weights: Weights) -> str:
        """Put a LoRA adapter over the base weights (created at the first one), and read its values back."""
        import peft

        if not self._on_initial_policy:
            raise WeightSyncError(
                f"weights version {weights.version} are an adapter, which sits on the initial policy, but the model "
                f"was given whole weights (version {self.version}) since. Publish one kind only."
            )
        config = peft.PeftConfig.from_peft_type(**dict(weights.adapter or {}))
        if self._peft is None:
            self._peft = peft.get_peft_model(self.model, config).eval()
        state = {name: tensor.to(self.device) for name, tensor in weights.tensors()}
        result = peft.set_peft_model_state_dict(self._peft, state)
        live = peft.get_peft_model_state_dict(self._peft)
        if result.unexpected_keys or set(live) != set(state):
            odd = sorted(set(live) ^ set(state))
            raise WeightSyncError(
                f"weights version {weights.version}: the adapter's tensors do not fit its config: {', '.join(odd[:3])}"
            )
        return read_back(weights, live)

    def sleep(self) -> None:
        """Move the weights to the CPU and free the device's memory; nothing happens on a CPU."""
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Move the weights back."""
        if self.device.type == "cuda":
            self.model.to(self.device)
