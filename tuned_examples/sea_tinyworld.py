"""SEA on TinyWorld: the whole loop in minutes, without a download.

Command     rayalign run tuned_examples/sea_tinyworld.py
            rayalign run tuned_examples/sea_tinyworld.py --seed 11 --set agent.num_candidates=10
            ray job submit --working-dir . -- python tuned_examples/sea_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      on fresh worlds (env.seed 10 and up), one run each: held-out win rate 0.65 after 470 to 741 labels, where
            passive needs 670 to 1,941 or does not get there; docs/results/sample_efficiency_agents.md
Compare     tuned_examples/passive_tinyworld.py: the same world, policy, budget and learner, without exploration
"""

from rayalign.env.tinyworld.build import backbone_dir

CONFIG = {
    "agent": "sea",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # The reward posterior reads responses with a backbone that was trained on other worlds of the same family,
    # never on this one's hidden reward: the counterpart of the pre-trained 0.4B reward transformer in the paper.
    "agent.features.backbone": str(backbone_dir()),
    "agent.num_candidates": 20,
    "agent.exploration": "bai_ts",
    "agent.gamma_burn_in": 300,
    "agent.gamma_after": 0.5,
    "agent.synthetic_pairs": "extremes",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
