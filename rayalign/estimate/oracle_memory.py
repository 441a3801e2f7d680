"""Memory of a model in the oracle's own replicas: a reward model, a pairwise one, or a local judge.

    per replica:  weights, perhaps in fewer bits + activations of a micro-batch                 reward_model, pairwise
                  weights + KV cache + activations of the questions + logits of the answers     judge

The other kinds have no model: an endpoint, people and data need next to nothing here.
"""

from __future__ import annotations

from rayalign.estimate.role import RoleMemory, Unknown
from rayalign.estimate.shape import BYTES, ModelShape
from rayalign.serve.classifier import MICRO_BATCH_TOKENS
from rayalign.serve.config import OracleConfig, has_model
from rayalign.serve.judge_config import LOCAL
from rayalign.serve.judge_prompts import TEMPLATES

CHARACTERS_PER_TOKEN = 4
"""Of a judge's rules, in English."""


def is_local_judge(config: OracleConfig) -> bool:
    """Whether the judge's model is in the replicas."""
    return config.kind == "judge" and config.judge.base_url == LOCAL


def oracle_memory(
    role: str, config: OracleConfig, prompt_tokens: int, response_tokens: int
) -> RoleMemory | Unknown | None:
    """One replica of the oracle called `role`; None where it has no model. The model's config is all that is fetched.

    Args:
        role: `oracle`, or `evaluation.oracle`.
        prompt_tokens, response_tokens: the longest; the policy's tokens stand for the judge's.
    """
    if not has_model(config.kind, config.judge.base_url):
        return None
    judges = is_local_judge(config)
    try:
        shape = _shape(config, "AutoModelForCausalLM" if judges else "AutoModelForSequenceClassification")
    except Exception as error:  # whatever a hub, a config or its code says: the rest of the estimate holds
        return Unknown(role=role, why=f"{role}.target={config.target!r}: {' '.join(str(error).split())[:200]}")
    on_gpu = config.device == "cuda" or (config.device == "auto" and config.gpus_per_replica > 0)
    spread = max(1, int(config.gpus_per_replica)) if on_gpu and config.device == "auto" else 1
    # Whole layers go to one GPU after the other; what they compute is on one of them at a time.
    parts = {"weights": shape.weights(config.dtype, config.quantization) // spread}
    if judges:
        parts |= _judging(config, shape, prompt_tokens, response_tokens, spread)
    else:
        tokens = config.micro_batch_tokens or MICRO_BATCH_TOKENS["cuda" if on_gpu else "cpu"]
        parts["activations"] = tokens * shape.forward_values * BYTES[config.dtype]
    return RoleMemory(
        role=role,
        processes=config.most_replicas,
        device="gpu" if on_gpu else "cpu",
        parts=parts,
        gpus=config.gpus_per_replica,
        spread=spread,
    )


def _shape(config: OracleConfig, kind: str) -> ModelShape:
    from rayalign.system.hf import AutoConfig

    described = AutoConfig.from_pretrained(config.target, trust_remote_code=config.trust_remote_code)
    return ModelShape.counted(described, kind, trust_remote_code=config.trust_remote_code)


def _judging(
    config: OracleConfig, shape: ModelShape, prompt_tokens: int, response_tokens: int, spread: int
) -> dict[str, int]:
    """As many questions as may be asked at the same time are answered as one batch."""
    rules = len(TEMPLATES.get(config.judge.template, config.judge.template)) // CHARACTERS_PER_TOKEN
    question, answer = rules + prompt_tokens + 2 * response_tokens, config.judge.answer_tokens
    rows = config.judge.concurrency
    return {
        "KV cache": rows * (question + answer) * shape.kv_bytes(config.dtype) // spread,
        "activations": rows * question * shape.forward_values * BYTES[config.dtype],
        "logits": rows * answer * shape.vocabulary * 4,  # those of every token of the answer are kept, in float32
    }
