"""APL on TinyWorld: the most uncertain eighth of the prompts, and the pair with the largest implicit margin.

Command     rayalign run tuned_examples/apl_tinyworld.py
            rayalign run tuned_examples/apl_tinyworld.py --set agent.prompts_per_duel=1    certainty alone
            ray job submit --working-dir . -- python tuned_examples/apl_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/passive_tinyworld.py: the same budget, prompts and pairs as they come
"""

CONFIG = {
    "agent": "apl",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    "agent.prompts_per_duel": 8,
    "agent.num_candidates": 8,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
