"""US-DPO on TinyWorld: out of given pairs those with the most uncertain log-probabilities.

Command     rayalign run tuned_examples/us_dpo_tinyworld.py
            ray job submit --working-dir . -- python tuned_examples/us_dpo_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/ae_dpo_tinyworld.py: the same pairs, another score
"""

CONFIG = {
    "agent": "us_dpo",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # The paper's numbers: 128 pairs for 32 labels, dropout 0.05.
    "agent.prompts_per_duel": 4,
    "agent.dropout.rate": 0.05,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
