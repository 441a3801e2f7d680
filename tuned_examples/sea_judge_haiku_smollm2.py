r"""SEA with a language model as the judge: SmolLM2-135M-Instruct writes haiku, another model says which is better.

Command     rayalign run tuned_examples/sea_judge_haiku_smollm2.py --set oracle.judge.price=PRICE
                with OPENAI_API_KEY; PRICE is the most that one call can cost, and no run spends more than max_spend
            rayalign run tuned_examples/sea_judge_haiku_smollm2.py --set oracle.target=MODEL \
                --set oracle.judge.base_url=http://HOST:8000/v1 --set oracle.judge.api_key_env=""      your own server
            rayalign run tuned_examples/sea_judge_haiku_smollm2.py --set oracle.target=OWNER/MODEL \
                --set oracle.judge.base_url=local --set oracle.judge.api_key_env=""              loaded into the cluster
            ray job submit --working-dir . -- python tuned_examples/sea_judge_haiku_smollm2.py
Hardware    2 CPU cores, 16 GiB
Result      not measured yet
Compare     tuned_examples/sea_haiku_smollm2.py: the labels are the hidden reward's, where they are the judge's here

The judge sees each pair in both orders, so a label is two calls. The evaluation asks the hidden reward and costs
nothing: it says whether the judge's taste is the program's. The report has the judge's position bias and, for a tenth
of the duels, its self-agreement.
"""

CONFIG = {
    "agent": "sea",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 128,
    "seed": 0,
    # A batch is judged while the next one is generated and the last one is learnt from.
    "max_staleness": 1,
    "rollout.engine": "vllm",
    "oracle.kind": "judge",
    "oracle.target": "gpt-4o-mini",
    "oracle.labels": "deterministic",
    "oracle.judge.template": (
        "A student was asked: {prompt}\n\nWhich of two answers is the better haiku? Three lines of 5, 7 and 5 "
        "syllables, on the subject, without repetition or chatter.\n\n"
        "Answer 0:\n{first}\n\nAnswer 1:\n{second}\n\n{answer}"
    ),
    "oracle.judge.order": "both",
    "oracle.judge.recheck": 0.1,
    "oracle.judge.price": 0.0005,  # a guess, on the safe side: set yours
    "oracle.judge.max_spend": 1.0,
    "evaluation.oracle.kind": "world",
    "agent.num_candidates": 8,
    "agent.exploration": "bai_ts",
    "agent.gamma_burn_in": 96,
    "agent.gamma_after": 0.7,
    "agent.synthetic_pairs": "extremes",
    "agent.features.pooling": "mean",
    "agent.features.dtype": "bfloat16",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
