"""What memory depends on in a model: read off its config, and counted without memory for its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED = {"int8": 1.0, "int4": 0.5 + 4 / 64}
"""Bytes of a weight as bitsandbytes stores it; int4 (NF4) has a float32 scale for every 64 of them."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a transformer."""

    parameters: int
    """All of them, tied ones once."""
    adapted: tuple[tuple[int, int], ...]
    """Inputs and outputs of every linear layer that LoRA's `all-linear` adapts: all but the head."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str = "float32"
    """Of the checkpoint."""
    quantised: int = 0
    """Parameters that are stored in fewer bits where the settings say so: weights of linear layers but the head's."""

    @classmethod
    def of(cls, policy_dir: str | Path) -> ModelShape:
        """Of a causal language model in a Hugging Face directory; its weights need not be there."""
        from rayalign.system.hf import AutoConfig

        stored = json.loads((Path(policy_dir) / "config.json").read_text())
        dtype = str(stored.get("dtype") or stored.get("torch_dtype") or "float32")
        return cls.counted(AutoConfig.from_pretrained(str(policy_dir)), "AutoModelForCausalLM", dtype=dtype)

    @classmethod
    def counted(cls, config: Any, kind: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> ModelShape:
        """Of the `kind` of model, like `AutoModel`, that transformers makes of a `config`."""
        import torch
        from torch import nn
        from transformers.quantizers.base import get_keys_to_not_convert

        from rayalign.system import hf

        with torch.device("meta"):
            model = getattr(hf, kind).from_config(config, trust_remote_code=trust_remote_code)
        head, kept = model.get_output_embeddings(), set(get_keys_to_not_convert(model))
        linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            adapted=tuple((m.in_features, m.out_features) for m in linear.values() if m is not head),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocabulary=text.vocab_size,
            dtype=dtype,
            quantised=sum(m.weight.numel() for name, m in linear.items() if name not in kept),
        )

    def weights(self, dtype: str, quantization: str = "") -> int:
        """Bytes of all weights; with `quantization` (int8, int4) those of linear layers in fewer bits."""
        few = self.quantised if quantization else 0
        return round((self.parameters - few) * BYTES[dtype] + few * QUANTISED.get(quantization, 0.0))

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of `rank` on every adapted layer: `rank x (in + out)` each."""
        return rank * sum(inputs + outputs for inputs, outputs in self.adapted)

    def kv_bytes(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[dtype]

    @property
    def forward_values(self) -> int:
        """Numbers of one token that a layer has at the same time where nothing is kept for a backward pass.

        In attention the residual, its norm, queries, keys, values and the output; in an MLP like Llama's the residual,
        its norm and three of the MLP's width.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 2 * self.hidden + max(2 * query + 2 * key, 3 * self.intermediate)

    def activation_values(self, checkpointing: bool) -> int:
        """Numbers that the backward pass needs of one token: per layer the inputs of both norms (and their float32
        copies), of all projections, rotated queries and keys, the attention's output, and four of the MLP's width.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 6 * self.hidden + 3 * query + 3 * key + 4 * self.intermediate
        return self.layers * self.hidden + layer if checkpointing else self.layers * layer
