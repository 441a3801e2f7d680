"""APO on TinyWorld: labels for the pairs that fixed features of the initial policy find new.

Command     rayalign run tuned_examples/apo_tinyworld.py
            ray job submit --working-dir . -- python tuned_examples/apo_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/active_dpo_tinyworld.py: the same pool sizes, world, policy, budget and learner
"""

CONFIG = {
    "agent": "apo",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # The paper draws 20 prompts for each label.
    "agent.prompts_per_duel": 5,
    "agent.num_candidates": 3,
    "agent.features.pooling": "mean",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
