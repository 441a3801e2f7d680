"""DeltaUCB on TinyWorld: the pair of responses that may differ most, optimistically.

Command     rayalign run tuned_examples/delta_ucb_tinyworld.py
            rayalign run tuned_examples/delta_ucb_tinyworld.py --set agent.width=0        the gap of the means
            ray job submit --working-dir . -- python tuned_examples/delta_ucb_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/drts_tinyworld.py: the same idea, with draws in place of bounds
"""

from rayalign.env.tinyworld.build import backbone_dir

CONFIG = {
    "agent": "delta_ucb",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    # SEA's posterior on a backbone that knows the family of worlds, never this one: see sea_tinyworld.py.
    "agent.features.backbone": str(backbone_dir()),
    "agent.num_candidates": 20,
    "agent.width": 1.0,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
