"""Passive online DPO on TinyWorld: what SEA has to beat.

Command     rayalign run tuned_examples/passive_tinyworld.py
            rayalign run tuned_examples/passive_tinyworld.py --set agent.schedule=offline
            ray job submit --working-dir . -- python tuned_examples/passive_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      on fresh worlds (env.seed 10 and up), one run each: held-out win rate 0.65 after 670 to 1,941 labels, or
            not within 2,000; docs/results/sample_efficiency_agents.md
Compare     tuned_examples/sea_tinyworld.py
"""

CONFIG = {
    "agent": "passive",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    "agent.schedule": "online",
    "agent.loss": "dpo",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
