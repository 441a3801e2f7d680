"""The reward is a Python function in this file: SmolLM2-135M-Instruct learns to write three short lines.

Command     rayalign run tuned_examples/passive_function_haiku_smollm2.py
            ray job submit --working-dir . -- python tuned_examples/passive_function_haiku_smollm2.py
Hardware    2 CPU cores, 16 GiB
Result      not measured yet
Compare     tuned_examples/passive_haiku_smollm2.py: the hidden reward labels

In place of the function, `oracle` may be the name of a kind, or any object with `id` and `judge(duels)`. A function
that lives in a package of yours is `--set oracle.kind=function --set oracle.target=package.module:function`.
"""


def three_short_lines(prompt: str, response: str) -> float:
    """Higher wins; what counts is the difference of two rewards, in units of a logit."""
    lines = [line for line in response.splitlines() if line.strip()]
    return -2.0 * abs(len(lines) - 3) - 0.1 * sum(max(0, len(line) - 40) for line in lines)


CONFIG = {
    "agent": "passive",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 128,
    "seed": 0,
    "max_staleness": 0,
    "rollout.engine": "vllm",
    "rollout.threads_per_replica": 2,
    "learner.threads_per_worker": 2,
    "oracle": three_short_lines,
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
