"""AE-Borda on TinyWorld: labels for the prompts whose best response a kernel posterior knows least about.

Command     rayalign run tuned_examples/ae_borda_tinyworld.py
            rayalign run tuned_examples/ae_borda_tinyworld.py --set agent.borda.strategy=uniform
            ray job submit --working-dir . -- python tuned_examples/ae_borda_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/passive_tinyworld.py: the same world, policy, budget and learner, without selection
"""

from rayalign.env.tinyworld.build import backbone_dir

CONFIG = {
    "agent": "ae_borda",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # As for SEA: a backbone that was trained on other worlds of the family, never on this one's hidden reward.
    "agent.features.backbone": str(backbone_dir()),
    "agent.num_candidates": 10,
    # A linear kernel suits features of language models. Bounds of 0.3 standard deviations around 1/2 do not hold with
    # certainty, so the policy goes by the last ones; eq. 5 would hold on to early mistakes.
    "agent.kernel.kernel": "linear",
    "agent.kernel.prior_mean": 0.5,
    "agent.borda.schedule": "constant",
    "agent.borda.width": 0.3,
    "agent.borda.pessimism": "last",
    "agent.prompts_per_duel": 3,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
