r"""People label: which of two haiku by SmolLM2-135M-Instruct is better? On a page in their browser, by key or mouse.

Command     rayalign run tuned_examples/passive_people_haiku_smollm2.py          prints the page's address and a token
            rayalign run tuned_examples/passive_people_haiku_smollm2.py \
                --set oracle.human.tokens_file=tokens.txt --set oracle.human.annotators_per_duel=2      several people
            rayalign resume RUN_DIR                          tomorrow, with what was answered and the same queue
            ray job submit --working-dir . -- python tuned_examples/passive_people_haiku_smollm2.py
Hardware    2 CPU cores, 16 GiB, and somebody who answers
Result      no people were asked for it; that such a run loses no answer is tested (tests/contracts/test_people.py)
Compare     tuned_examples/passive_haiku_smollm2.py: the hidden reward labels

The final policy is compared with the initial one on 20 held-out subjects, by the same people, counted apart. With
`--set evaluation.oracle.kind=world` the hidden reward does that.
"""

CONFIG = {
    "agent": "passive",
    "env": "rayalign/Haiku-v0",
    "policy": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "budget": 96,
    "seed": 0,
    "rollout.engine": "vllm",
    "oracle.kind": "human",
}

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
