"""ActiveDPO on TinyWorld: labels for the pairs that the policy's own gradients find new.

Command     rayalign run tuned_examples/active_dpo_tinyworld.py
            ray job submit --working-dir . -- python tuned_examples/active_dpo_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/random_tinyworld.py, apo_tinyworld.py and aplp_tinyworld.py, which share all but the choice
"""

CONFIG = {
    "agent": "active_dpo",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # The paper draws 20 prompts for each label.
    "agent.prompts_per_duel": 5,
    "agent.num_candidates": 3,
    # p is 18,432 here; with 2,048 dimensions a batch costs seconds on a CPU.
    "agent.dim": 2048,
    "agent.earlier": "recompute",
    "agent.normalize": "response",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
