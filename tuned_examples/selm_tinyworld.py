"""SELM on TinyWorld: a fresh response is ranked with the dataset's pair, three labels a prompt.

Command     rayalign run tuned_examples/selm_tinyworld.py
            rayalign run tuned_examples/selm_tinyworld.py --set agent.fresh=3    the online form, no dataset
            ray job submit --working-dir . -- python tuned_examples/selm_tinyworld.py
Hardware    2 CPU cores, 8 GiB
Result      not measured yet
Compare     tuned_examples/passive_tinyworld.py, agent.schedule=iterative, agent.batches_per_round=21: no
            dataset, no optimism, one label a prompt
"""

CONFIG = {
    "agent": "selm",
    "env": "rayalign/TinyWorld-v0",
    "budget": 2_000,
    "seed": 0,
    "max_staleness": 0,
    "agent.alpha": 1e-3,
    # 2,000 labels, batches of 10 prompts with 3 duels each: 67 batches in 3 iterations.
    "agent.iterations": 3,
    "agent.batches_per_iteration": 22,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
