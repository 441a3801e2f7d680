"""The model that is trained: loading it, adapters on it, and its weights under their Hugging Face names."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayalign.errors import ConfigError, DataError
from rayalign.learner.config import LearnerConfig, LoraSettings
from rayalign.learner.logprobs import PolicyModule

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded parameters whole while it is entered; every worker enters."""


def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of parameters that are not sharded."""
    return contextlib.nullcontext()


def load_policy(path: str | Path, config: LearnerConfig, seed: int) -> PolicyModule:
    """The initial policy in training mode, without dropout of its own; with adapters where the config asks for them."""
    from rayalign.system.hf import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=getattr(torch, config.dtype))
    except (OSError, ValueError) as error:
        raise DataError(f"policy={str(path)!r} can't be loaded as a causal language model: {error}") from error
    _without_dropout(model)
    if config.gradient_checkpointing:
        # ZeRO-3 releases a layer's weights behind each forward, a recomputed one too; only a reentrant recomputation
        # has a backward of its own that gathers them again.
        model.gradient_checkpointing_enable({"use_reentrant": config.strategy == "zero3"})
    if config.lora.rank:
        model = _with_adapters(model, config, seed)
    policy = PolicyModule(model, config.logprob_chunk_tokens)
    return policy.train()


def _without_dropout(model: nn.Module) -> None:
    """Policy and reference must be the same function where their weights are: no noise beside the adapters' own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def lora_targets(settings: LoraSettings) -> str | list[str]:
    """PEFT's `target_modules`."""
    if settings.target_modules == "all-linear":
        return settings.target_modules
    return [name.strip() for name in settings.target_modules.split(",") if name.strip()]


def _with_adapters(model: Any, config: LearnerConfig, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # every worker draws the same adapters
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=lora_targets(config.lora),
        task_type="CAUSAL_LM",
    )
    # DeepSpeed keeps float32 masters itself and wants parameters of one type; elsewhere adapters are float32.
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=not config.strategy.startswith("zero"))
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    return wrapped


def trainable(policy: PolicyModule) -> dict[str, nn.Parameter]:
    """Name -> parameter of what the optimizer changes; a tied parameter once."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


# ==== weights for the engines and for disk ==================================================================
def merged_state(policy: PolicyModule, gather: Gather = whole, keep: bool = True) -> dict[str, Tensor]:
    """Hugging Face name -> value, adapters added in, tied weights once. Empty where `keep` is False.

    Every worker calls it; only those that keep the result pay its memory.
    """
    base = policy.base
    state: dict[str, Tensor] = {}
    adapted = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    for name, module in adapted.items():
        with gather(list(module.parameters())), torch.no_grad():
            if keep:
                layer = module.get_base_layer()
                delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
                state[f"{name}.weight"] = _cpu(layer.weight + delta.to(layer.weight.dtype))
                if getattr(layer, "bias", None) is not None:
                    state[f"{name}.bias"] = _cpu(layer.bias)
    inside = tuple(f"{name}." for name in adapted)
    for name, parameter in base.named_parameters():
        if not name.startswith(inside):
            with gather([parameter]):
                if keep:
                    state[name] = _cpu(parameter)
    if keep:
        known = base.state_dict().keys()
        state |= {
            name: _cpu(buffer) for name, buffer in base.named_buffers() if name in known and not name.startswith(inside)
        }
    return state


def adapter_state(policy: PolicyModule, gather: Gather = whole, keep: bool = True) -> dict[str, Tensor]:
    """PEFT name -> value of the adapters alone."""
    from peft import get_peft_model_state_dict

    model: Any = policy.model
    with gather(list(trainable(policy).values())):
        return (
            {name: _cpu(value) for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
            if keep
            else {}
        )


def adapter_config(policy: PolicyModule) -> dict[str, object]:
    """PEFT's config of the adapters, JSON-able."""
    config: Any = policy.model.peft_config["default"].to_dict()  # type: ignore[index,union-attr]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _cpu(value: Tensor) -> Tensor:
    """A copy that stays as it is while training goes on."""
    return value.detach().to("cpu", copy=True)


def write_final(source: str | Path, state: Mapping[str, Tensor], folder: Path) -> None:
    """A Hugging Face directory of `state`: weights, config, generation config and the tokenizer of `source`."""
    from rayalign.rollout.encode import load_tokenizer
    from rayalign.system.hf import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(str(source))
    dtype = next(iter(state.values())).dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, unexpected = model.load_state_dict(dict(state), strict=False, assign=True)
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left and not unexpected, f"exported weights don't fit the model: {missing=} {unexpected=}"
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


# ==== checks before anything starts ============================================================================
def validate(config: LearnerConfig, policy_dir: str | Path) -> None:
    """Raise `ConfigError` for what can be known to be wrong before a process is started or a label bought."""
    if config.strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"learner.strategy={config.strategy!r} needs DeepSpeed, which is not installed. "
            "Run: pip install 'rayalign[deepspeed]', or use learner.strategy=ddp."
        )
    if config.lora.rank < 0:
        raise ConfigError(f"learner.lora.rank={config.lora.rank} must not be negative; 0 trains all weights.")
    if config.lora.rank:
        _validate_adapters(config, policy_dir)


def _validate_adapters(config: LearnerConfig, policy_dir: str | Path) -> None:
    settings = config.lora
    if settings.alpha <= 0 or not 0 <= settings.dropout < 1:
        raise ConfigError(
            f"learner.lora.alpha={settings.alpha} must be positive, learner.lora.dropout={settings.dropout} in [0, 1)."
        )
    targets = lora_targets(settings)
    if targets == "all-linear":
        return
    from rayalign.system.hf import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # names only, no memory
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(policy_dir)))
    modules = dict(model.named_modules())
    fitting = {
        name.rsplit(".", 1)[-1] for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Embedding))
    }
    for target in targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found:
            raise ConfigError(
                f"learner.lora.target_modules names {target!r}, which {str(policy_dir)!r} does not have. "
                f"It has: {', '.join(sorted(fitting))}; or use 'all-linear'."
            )
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if config.strategy == "zero3" and any(modules[name] is head for name in found):
            raise ConfigError(
                f"learner.lora.target_modules names the head {target!r}, whose adapter ZeRO-3 can't gather chunk by "
                "chunk. Name other modules, or use learner.strategy=zero2."
            )
        tied = model.config.get_text_config().tie_word_embeddings
        if tied and any(modules[name] in (head, embedding) for name in found):
            raise ConfigError(
                f"learner.lora.target_modules names {target!r}, whose weights input and output embeddings share: "
                "an adapter on one can't be merged. Name other modules, or use 'all-linear', which leaves it out."
            )
