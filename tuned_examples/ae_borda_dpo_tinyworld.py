"""AE-Borda-DPO on TinyWorld: labels for the prompts whose best response is least known.

Command     rayalign run tuned_examples/ae_borda_dpo_tinyworld.py
            ray job submit --working-dir . -- python tuned_examples/ae_borda_dpo_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet: the wiring was run with 64 labels, too few to say anything
Compare     tuned_examples/passive_tinyworld.py: the same world, policy, budget and learner, without selection
"""

CONFIG = {
    "agent": "ae_borda_dpo",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # The paper's numbers: 96 prompts for 32 labels, dropout 0.05, bounds of 4 standard deviations, DPO's beta 0.1.
    "agent.prompts_per_duel": 3,
    "agent.dropout.rate": 0.05,
    "agent.dropout.width": 4.0,
    "agent.num_candidates": 8,
    "agent.num_opponents": 8,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
