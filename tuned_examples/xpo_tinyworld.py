"""XPO on TinyWorld: one response of the policy against one of the reference, which becomes less likely.

Command     rayalign run tuned_examples/xpo_tinyworld.py
            rayalign run tuned_examples/xpo_tinyworld.py --set agent.optimism=duelled
            rayalign run tuned_examples/xpo_tinyworld.py --set "agent.alpha_schedule=[1e-5, 5e-6, 0.0]"
            ray job submit --working-dir . -- python tuned_examples/xpo_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/passive_tinyworld.py: the same budget; both responses of the policy
"""

CONFIG = {
    "agent": "xpo",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    "agent.alpha": 5e-6,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
