"""APLP on TinyWorld: uncertain prompts, and of each the pair that the policy is most certain of.

Command     rayalign run tuned_examples/aplp_tinyworld.py
            ray job submit --working-dir . -- python tuned_examples/aplp_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/active_dpo_tinyworld.py: the same pool sizes, world, policy, budget and learner
"""

CONFIG = {
    "agent": "aplp",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # The paper draws 20 prompts for each label.
    "agent.prompts_per_duel": 5,
    "agent.num_candidates": 3,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
