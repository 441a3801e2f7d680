"""ActiveDPO and its baselines on TL;DR and WebGPT with Llama-2-7B, Gemma-2B and Qwen3-4B.

Command     rayalign run tuned_examples/recipes/active_dpo.py --policy SFT_DIR
            rayalign run tuned_examples/recipes/active_dpo.py --policy SFT_DIR --set recipe.task=webgpt
            ray job submit --working-dir . -- python tuned_examples/recipes/active_dpo.py --policy SFT_DIR
Choices     recipe.task tldr | webgpt      recipe.model gemma-2b | qwen3-4b | llama-2-7b
            recipe.agent active_dpo | random | apo | aplp
            recipe.placement collocated | split | laptop, recipe.gpus
Policy      SFT_DIR: the model, fine-tuned on the task's own data for one epoch at a learning rate of 2e-5. Those
            checkpoints are not published, and rayalign does not fine-tune: bring yours.
Hardware    one machine with 8 GPUs of 48 GB, for llama-2-7b of 80 GB: beside the engine and the learner the scorer has
            two copies of the weights. The paper: 8 L40 (app. A.1), which have 48 GB.
Placement   everything on each GPU; adapters alone are trained.
Result      NOT RUN at this size here. The wiring ran on CPUs with a random model: docs/recipes.md.
Differs     The paper reports the mean reward of several answers to 100 prompts (figure 1) and a win rate against the
            initial model (figure 5); here it is that win rate, of greedy answers.
Source      ActiveDPO (2025), section 4, "Hyper-parameters", where nothing else is said.
"""

from typing import Any, Literal

from rayalign.runs.placement import place

GPU_GB = {"gemma-2b": 48, "qwen3-4b": 48, "llama-2-7b": 80}
"""Memory of the GPUs that it fits, as rayalign estimates it."""
BASES = {"gemma-2b": "google/gemma-2b", "qwen3-4b": "Qwen/Qwen3-4B", "llama-2-7b": "meta-llama/Llama-2-7b-hf"}

TASKS: dict[str, dict[str, Any]] = {
    "tldr": {
        "env.path": "trl-lib/tldr",
        "env.reference_column": "completion",
        "env.heldout_split": "test",
        "oracle.target": "OpenAssistant/reward-model-deberta-v3-large",
        "rollout.max_tokens": 53,  # not in the paper; as in tldr_pythia.py
    },
    "webgpt": {
        "env.path": "openai/webgpt_comparisons",
        "env.revision": "refs/convert/parquet",  # the set itself is a program that new versions of `datasets` don't run
        "env.format": "webgpt",
        "oracle.target": "OpenAssistant/reward-model-deberta-v3-large-v2",
        "rollout.max_tokens": 256,  # not in the paper
    },
}

AGENTS: dict[str, dict[str, Any]] = {
    "active_dpo": {"agent": "active_dpo", "agent.dim": 8192, "agent.normalize": "response"},
    "random": {"agent": "random"},
    "apo": {"agent": "apo"},
    "aplp": {"agent": "aplp"},
}


def recipe(
    task: Literal["tldr", "webgpt"] = "tldr",
    model: Literal["gemma-2b", "qwen3-4b", "llama-2-7b"] = "gemma-2b",
    agent: Literal["active_dpo", "random", "apo", "aplp"] = "active_dpo",
    placement: Literal["collocated", "split", "laptop"] = "collocated",
    gpus: int = 8,
) -> dict[str, Any]:
    settings = {
        **AGENTS[agent],
        "agent.num_candidates": 3,
        "agent.prompts_per_duel": 20,  # 1,000 prompts for 50 labels
        "agent.loss": "dpo",
        "agent.beta": 0.1,  # not in the paper
        "env": "rayalign/Prompts-v0",
        **TASKS[task],
        "env.tokenizer": BASES[model],
        "env.max_prompt_tokens": 512,  # not in the paper
        "budget": 500,  # ten iterations; their number is not in the text (figure 1)
        "seed": 0,
        "loop.batch_size": 50,
        "loop.agent_checkpoint_every": 1,
        "rollout.temperature": 0.7,  # not in the paper
        "rollout.max_prompt_tokens": 768,
        "rollout.chat": "never",
        "learner.learning_rate": 1e-4,
        "learner.schedule": "constant",
        "learner.updates_per_batch": 4,  # "4 epochs" on the 50 labels, in one step each: their batches are not given
        "learner.lora.rank": 128,
        "learner.lora.alpha": 512.0,
        "learner.checkpoint_every": 1,
        "learner.gradient_checkpointing": True,
        "scorer.max_gradient_tokens": 1024,  # one longest sequence: its activations are kept for the way back
        "oracle.kind": "reward_model",
        "oracle.labels": "deterministic",  # not in the paper
        "evaluation.num_prompts": 100,
        "evaluation.against": "initial",
        "evaluation.every": 50,
    }
    vllm = 0.25 if placement == "collocated" else 0.4  # three short answers a prompt; the scorer needs the room
    return settings | place(placement, gpus, settings, vllm=vllm)


CONFIG = recipe

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
