"""UltraFeedback with Llama-3-8B-Instruct and SimPO: SEA and online and offline SimPO ("Sample-Efficient Alignment").

Command     rayalign run tuned_examples/recipes/ultrafeedback_llama3.py
            rayalign run tuned_examples/recipes/ultrafeedback_llama3.py --set recipe.agent=passive
            ray job submit --working-dir . -- python tuned_examples/recipes/ultrafeedback_llama3.py
Choices     recipe.agent sea | passive | offline      recipe.placement split | collocated | laptop, recipe.gpus
Hardware    one machine with 8 GPUs of 80 GB. The paper: as for TL;DR, 8 A100 and 16 more for the reward model.
Placement   4 GPUs for the learner, engines and reward model on the other 4 (config 2 of app. H).
Result      NOT RUN at this size here. The wiring ran on CPUs with a random model: docs/recipes.md. The reward model
            brings code of its own, written for transformers 4.40; whether that still loads was not tried.
Source      Liu et al. 2024, appendix F.2, where nothing else is said: "configurations of SEA are kept the same as those
            in the TL;DR task", appendix F.1. Their measure, AlpacaEval 2.0 against GPT-4 Turbo, is not part of the run.
"""

from typing import Any, Literal

from rayalign.runs.placement import place

GPU_GB = 80
"""Memory of the GPUs that it fits, as rayalign estimates it."""
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"

AGENTS: dict[str, dict[str, Any]] = {
    "passive": {"agent": "passive", "agent.schedule": "online"},
    "offline": {"agent": "passive", "agent.schedule": "offline"},
    "sea": {
        "agent": "sea",
        "agent.exploration": "bai_ts",
        "agent.num_candidates": 20,
        "agent.gamma_burn_in": 1000,
        "agent.gamma_after": 0.7,
        "agent.posterior.members": 20,
        "agent.posterior.hidden": 128,
        "agent.posterior.updates": 5,
        "agent.features.backbone": "microsoft/deberta-v3-large",  # and not PairRM's weights: see tldr_pythia.py
    },
}


def recipe(
    agent: Literal["sea", "passive", "offline"] = "sea",
    placement: Literal["split", "collocated", "laptop"] = "split",
    gpus: int = 8,
) -> dict[str, Any]:
    settings = {
        **AGENTS[agent],
        "agent.loss": "simpo",
        "agent.beta": 10.0,
        "agent.gamma_over_beta": 0.3,
        "env": "rayalign/Prompts-v0",
        "env.path": "HuggingFaceH4/ultrafeedback_binarized",  # its prompts alone; "61k samples" is this set's size
        "env.split": "train_prefs",
        "env.heldout_split": "test_prefs",
        "env.tokenizer": LLAMA,
        "env.max_prompt_tokens": 1800,
        "policy": LLAMA,
        "budget": 60_000,  # not in the text (figure 7); about one label a prompt
        "seed": 0,
        "loop.batch_size": 128,
        "rollout.temperature": 0.7,  # as for TL;DR; 0.9 is the evaluation's
        "rollout.max_tokens": 1024,  # not in the paper; that of the authors' UltraFeedback benchmark
        "rollout.max_prompt_tokens": 2048,  # 1,800 and the chat template
        "rollout.chat": "always",
        "learner.learning_rate": 8e-7,
        "learner.schedule": "cosine",
        "learner.warmup_batches": 8,  # not in the paper, as for TL;DR
        "learner.gradient_checkpointing": True,
        "oracle.kind": "reward_model",
        "oracle.target": "RLHFlow/ArmoRM-Llama3-8B-v0.1",
        "oracle.trust_remote_code": True,
        "oracle.labels": "deterministic",
        "evaluation.num_prompts": 500,  # the paper's 805 are AlpacaEval's
        "evaluation.against": "initial",
        "evaluation.temperature": 0.9,
        "evaluation.every": 2560,
    }
    settings |= place(placement, gpus, settings, vllm=0.35 if placement == "collocated" else 0.0)  # 20 candidates
    if placement != "laptop":
        settings["learner.strategy"] = "zero3"
    return settings


CONFIG = recipe

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
