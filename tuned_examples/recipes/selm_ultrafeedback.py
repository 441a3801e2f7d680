"""SELM on UltraFeedback for Zephyr-7B and Llama-3-8B-Instruct, as in "Self-Exploring Language Models".

Command     rayalign run tuned_examples/recipes/selm_ultrafeedback.py
            rayalign run tuned_examples/recipes/selm_ultrafeedback.py --set recipe.model=zephyr --set recipe.stage=dpo
            rayalign run tuned_examples/recipes/selm_ultrafeedback.py --set recipe.model=zephyr --policy DIR
            ray job submit --working-dir . -- python tuned_examples/recipes/selm_ultrafeedback.py
Choices     recipe.model llama3 | zephyr      recipe.placement split | collocated | laptop, recipe.gpus
            recipe.stage selm | dpo: Zephyr starts from Zephyr-7B-SFT after one iteration of DPO on the first portion
            (section 6.1), the second command; DIR of the third is the checkpoint that it leaves.
Hardware    one machine with 8 GPUs of 80 GB. The paper: 8 A100 (section 6.1).
Placement   4 GPUs for the learner, engines and ranker on the other 4.
Result      NOT RUN at this size here. The wiring ran on CPUs with a random model: docs/recipes.md.
Ranker      The paper's is PairRM (0.4B), which compares pairs and is no scalar reward model. Here a scalar one made of
            the same transformer stands in for it; name another with --set oracle.target=...
Source      Zhang et al. 2024, appendix D, where nothing else is said; "code" is that paper's repository
            (shenao-zhang/SELM). alpha is that of Algorithm 1, not of eq. 4.2.
"""

from typing import Any, Literal

from rayalign.errors import ConfigError
from rayalign.runs.placement import place

GPU_GB = 80
"""Memory of the GPUs that it fits, as rayalign estimates it."""
LABELS_A_PROMPT = 3
"""Duels that rank the fresh response and the data's two."""
RANKER = "OpenAssistant/reward-model-deberta-v3-large-v2"
PROMPTS = 61_135
"""Of train_prefs; "61k preference pairs"."""

MODELS: dict[str, dict[str, Any]] = {
    "llama3": {
        "policy": "meta-llama/Meta-Llama-3-8B-Instruct",
        "prompts": 128,
        "agent.alpha": 1e-4,
        "agent.decay": "linear",  # 5e-7, 3e-7, 1e-7
    },
    "zephyr": {
        "policy": "HuggingFaceH4/mistral-7b-sft-beta",
        "prompts": 256,
        "agent.alpha": 1e-3,
        "agent.decay": "last",  # 5e-7, 5e-7, 1e-7
    },
}


def recipe(
    model: Literal["llama3", "zephyr"] = "llama3",
    stage: Literal["selm", "dpo"] = "selm",
    placement: Literal["split", "collocated", "laptop"] = "split",
    gpus: int = 8,
) -> dict[str, Any]:
    if stage == "dpo" and model != "zephyr":
        raise ConfigError(
            "recipe.stage='dpo' is what Zephyr starts with; Llama-3-8B-Instruct starts with SELM at once."
        )
    chosen = dict(MODELS[model])
    prompts = chosen.pop("prompts")  # a gradient step
    batches = PROMPTS // 3 // prompts  # an iteration: "three portions with equal sizes"
    settings: dict[str, Any] = {
        "policy": chosen.pop("policy"),
        "agent.loss": "dpo",
        "agent.beta": 0.01,  # not in the paper; the code's, for both models
        "env": "rayalign/Prompts-v0",
        "env.path": "HuggingFaceH4/ultrafeedback_binarized",
        "env.split": "train_prefs",
        "env.heldout_split": "test_prefs",
        "seed": 0,
        "rollout.temperature": 0.0,  # not in the paper; the code decodes greedily
        "rollout.max_tokens": 1024,  # not in the paper; the code's
        "rollout.max_prompt_tokens": 2048,
        "rollout.chat": "always",
        "learner.learning_rate": 5e-7,
        "learner.schedule": "constant",  # agent.cycle has it, iteration by iteration
        "learner.gradient_checkpointing": True,
        "evaluation.num_prompts": 500,  # the paper evaluates on AlpacaEval 2.0 and MT-Bench
        "evaluation.against": "initial",
    }
    settings["env.tokenizer"] = settings["policy"]
    settings["env.max_prompt_tokens"] = 1900  # the code cuts prompts at 512 tokens; here they are whole or left out
    if stage == "dpo":  # the data's own pairs and its own labels, all of them: a pool of as many pairs as are asked for
        settings |= {
            "agent": "ae_dpo",
            "agent.prompts_per_duel": 1,
            "oracle.kind": "data",
            "learner.warmup_batches": round(0.1 * batches),
            "learner.schedule": "cosine",
            "evaluation.every": 0,
            "evaluation.oracle.kind": "reward_model",
            "evaluation.oracle.target": RANKER,
            "loop.batch_size": prompts,
            "budget": prompts * batches,
        }
    else:
        settings |= {
            **chosen,
            "agent": "selm",
            "agent.fresh": 1,
            "agent.iterations": 3,
            "agent.batches_per_iteration": batches,
            "agent.final_learning_rate": 0.2,
            "agent.warmup": 0.1,
            "agent.cycle": "cosine",  # "cyclic"; cosine in the code
            "oracle.kind": "reward_model",
            "oracle.target": RANKER,
            "oracle.labels": "deterministic",
            "evaluation.every": LABELS_A_PROMPT * prompts * batches,  # once an iteration
            "loop.batch_size": LABELS_A_PROMPT * prompts,
            "budget": 3 * LABELS_A_PROMPT * prompts * batches,
        }
    settings |= place(placement, gpus, settings)
    if placement != "laptop":
        settings["learner.strategy"] = "zero3"  # as the code
    return settings


CONFIG = recipe

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
