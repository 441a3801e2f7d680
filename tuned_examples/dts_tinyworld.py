"""Double Thompson sampling on TinyWorld, with a policy that learns; or a fixed one, judged by best-of-n.

Command     rayalign run tuned_examples/dts_tinyworld.py
            rayalign run tuned_examples/dts_tinyworld.py --set agent.fixed_policy=true --set evaluation.best_of_n=20
            ray job submit --working-dir . -- python tuned_examples/dts_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/sea_tinyworld.py: the same posterior, with labels of its own
"""

from rayalign.env.tinyworld.build import backbone_dir

CONFIG = {
    "agent": "dts",
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
