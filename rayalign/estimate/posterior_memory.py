"""Memory of an agent's own reward posterior, in the collector: a frozen backbone, and what is learned on its features.

weights + activations + features of responses that are remembered      on `loop.agent_device`
heads: now, at their start, the prior's, gradients, two moments        an ensemble (SEA and its kin)
labels: two feature vectors of each                                    an ensemble's, APO's
a triangular factor, labels x labels                                   a kernel (AE-Borda), on the CPU
"""

from __future__ import annotations

from typing import Any

from rayalign.agents.agent import Agent
from rayalign.agents.posteriors.ensemble import EnsembleConfig
from rayalign.agents.posteriors.features import FeatureConfig, first_layers
from rayalign.agents.posteriors.kernel import KernelConfig
from rayalign.errors import ConfigError
from rayalign.estimate.role import RoleMemory, Unknown
from rayalign.estimate.shape import BYTES, ModelShape
from rayalign.runs.config import RunConfig

COPIES = 6
"""Of an ensemble's heads: now, at their start, the prior's, gradients, and Adam's two moments."""


def posterior_memory(config: RunConfig, agent: Agent) -> RoleMemory | Unknown | None:
    """The collector's own model; None where the agent has none. The backbone's config is all that is fetched."""
    features: Any = getattr(agent.config, "features", None)
    posterior: Any = getattr(agent.config, "posterior", None)
    if not isinstance(features, FeatureConfig):
        return None
    if isinstance(posterior, EnsembleConfig) and not posterior.updates:
        return None  # nothing learns, so nothing is built
    try:
        shape = backbone_shape(features, config.policy)
    except ConfigError:
        raise
    except Exception as error:  # whatever a hub, a config or its code says: the rest of the estimate holds
        why = f"agent.features.backbone={features.backbone!r}: {' '.join(str(error).split())[:200]}"
        return Unknown(role="posterior", why=why)
    labels = config.loop.budget
    parts = {
        "weights": shape.weights(features.dtype),
        "activations": features.max_batch_tokens * shape.forward_values * BYTES[features.dtype],
        "prompts' KV cache": features.max_batch_tokens * shape.kv_bytes(features.dtype),
        "features": features.cache_responses * shape.hidden * 4,
    }
    host: dict[str, int] = {}
    if isinstance(posterior, EnsembleConfig):
        parts["ensemble"] = COPIES * 4 * head_parameters(posterior, shape.hidden)
        parts["labels"] = labels * (2 * shape.hidden * 4 + posterior.members)
    elif isinstance(getattr(agent.config, "kernel", None), KernelConfig):
        host["kernel"] = 8 * labels * (labels + shape.hidden)
    else:
        host["labels"] = 4 * labels * shape.hidden
    on_gpu = config.loop.agent_device != "cpu"
    return RoleMemory(
        role="posterior",
        processes=1,
        device="gpu" if on_gpu else "cpu",
        parts=parts if on_gpu else parts | host,
        host=host if on_gpu else {},
        gpus=config.loop.collector_gpus if on_gpu else 0.0,
    )


def backbone_shape(features: FeatureConfig, policy: str) -> ModelShape:
    """Of the transformer under the posterior, its upper layers left out where the settings say so."""
    from rayalign.system.hf import AutoConfig

    described = AutoConfig.from_pretrained(policy if features.backbone == "policy" else features.backbone)
    return ModelShape.counted(first_layers(described, features), "AutoModel")


def head_parameters(config: EnsembleConfig, dim: int) -> int:
    """Of all members: two hidden layers with biases, and a last one without."""
    one = dim * config.hidden + config.hidden + config.hidden**2 + config.hidden + config.hidden
    return config.members * one
