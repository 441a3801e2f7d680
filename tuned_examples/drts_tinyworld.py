"""Double reverse Thompson sampling on TinyWorld: one member's best response against another's worst.

Command     rayalign run tuned_examples/drts_tinyworld.py
            rayalign run tuned_examples/drts_tinyworld.py --set agent.num_candidates=8
            ray job submit --working-dir . -- python tuned_examples/drts_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/dts_tinyworld.py: two members' best responses
"""

from rayalign.env.tinyworld.build import backbone_dir

CONFIG = {
    "agent": "drts",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # SEA's posterior on a backbone that knows the family of worlds, never this one: see sea_tinyworld.py.
    "agent.features.backbone": str(backbone_dir()),
    "agent.num_candidates": 20,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
