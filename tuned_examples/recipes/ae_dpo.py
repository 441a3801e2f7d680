"""AE-DPO on the given pairs of HH, SHP and Jeopardy!, as in "Sample Efficient Preference Alignment ...", app. E and H.

Command     rayalign run tuned_examples/recipes/ae_dpo.py --policy SFT_DIR
            rayalign run tuned_examples/recipes/ae_dpo.py --policy SFT_DIR --set recipe.task=jeopardy
            ray job submit --working-dir . -- python tuned_examples/recipes/ae_dpo.py --policy SFT_DIR
Choices     recipe.task hh | shp | jeopardy      recipe.agent ae_dpo | us_dpo | uniform
            recipe.placement split | collocated | laptop, recipe.gpus
            Haikus have no pairs, and the paper no AE-DPO on them: tuned_examples/recipes/ae_borda_dpo.py.
Policy      SFT_DIR: Llama-7B, fine-tuned on 40% of the data with dropout before the last layer, one epoch (Jeopardy!:
            two). Those checkpoints are not published, and rayalign does not fine-tune: bring yours.
Data        HH and SHP come from the hub. Jeopardy!, with a wrong answer for each clue, is two files of the paper's
            repository (belakaria/active-llm-alignment): copy its data/train_jeopardy_data.json and
            data/test_jeopardy_data.json, as they are, to data/ where you start the run, or name yours with
            --set env.path=... and --set env.heldout=...
Labels      are the data's own (oracle.kind=data): one is spent when it is looked up. The judge is for evaluation alone:
            OPENAI_API_KEY, or --set evaluation.oracle.judge.base_url=...
Hardware    2 GPUs of 48 GB (K.2: "the policy and the reference model on two separate GPUs"): bfloat16 weights need more
            than the paper's 4-bit ones, and the scorer has two copies. recipe.placement=collocated: 2 GPUs of 80 GB.
Placement   one GPU for the learner, engine and scorer on the other; adapters, so that the reference is the same model.
Result      NOT RUN at this size here. The wiring ran on CPUs with a random model: docs/recipes.md.
Differs     LoRA on bfloat16 weights and AdamW, where the paper has QLoRA on 4-bit weights and 8-bit Lion (K.2).
Source      Mehta et al. 2023, appendix K.2, where nothing else is said; "code" is that paper's repository.
"""

from typing import Any, Literal

from rayalign.runs.placement import place

GPU_GB = {"split": 48, "collocated": 80}
"""Memory of the GPUs that it fits, as rayalign estimates it."""
BASE = "huggyllama/llama-7b"

TASKS: dict[str, dict[str, Any]] = {
    "hh": {"env.path": "Anthropic/hh-rlhf", "env.heldout_split": "test"},
    "shp": {"env.path": "stanfordnlp/SHP", "env.heldout_split": "test"},
    "jeopardy": {"env.path": "data/train_jeopardy_data.json", "env.heldout": "data/test_jeopardy_data.json"},
}

AGENTS: dict[str, dict[str, Any]] = {
    "ae_dpo": {"agent": "ae_dpo", "agent.prompts_per_duel": 4},  # 128 unlabelled pairs for a batch of 32
    "us_dpo": {"agent": "us_dpo", "agent.prompts_per_duel": 4},
    "uniform": {"agent": "ae_dpo", "agent.prompts_per_duel": 1},
}


def recipe(
    task: Literal["hh", "shp", "jeopardy"] = "hh",
    agent: Literal["ae_dpo", "us_dpo", "uniform"] = "ae_dpo",
    placement: Literal["split", "collocated", "laptop"] = "split",
    gpus: int = 2,
) -> dict[str, Any]:
    settings = {
        **AGENTS[agent],
        "agent.loss": "dpo",
        "agent.beta": 0.1,  # the paper's gamma
        "agent.dropout.rate": 0.05,
        "agent.dropout.width": 4.0,  # the paper's beta
        "agent.dropout.masks": 5,  # m is not in the paper; the code's n_samples
        "env": "rayalign/Prompts-v0",
        **TASKS[task],
        "env.format": task,
        "env.every_pair": True,
        "env.tokenizer": BASE,
        "env.max_prompt_tokens": 256,  # not in the paper; the code cuts there, here they are left out
        "env.max_row_tokens": 510,
        "budget": 100_000,  # app. H: "for 100000 samples"
        "seed": 0,
        "loop.batch_size": 32,
        "rollout.temperature": 1.0,
        "rollout.max_tokens": 32 if task == "jeopardy" else 256,  # of evaluation's answers; not in the paper
        "rollout.max_prompt_tokens": 320,
        "rollout.chat": "never",
        "learner.learning_rate": 5e-7,
        "learner.schedule": "constant",
        "learner.warmup_batches": 150,  # not in the paper; the code's, as are the next four
        "learner.max_grad_norm": 10.0,
        "learner.gradient_checkpointing": True,  # for memory alone: the numbers are the same
        "learner.lora.rank": 8,
        "learner.lora.alpha": 32.0,
        "learner.lora.dropout": 0.05,
        "oracle.kind": "data",
        "evaluation.every": 2048,
        "evaluation.num_prompts": 256,  # not in the paper; the code's
        "evaluation.against": "reference",  # app. H: "preferred to the chosen completion"
        "evaluation.oracle.kind": "judge",
        "evaluation.oracle.target": "gpt-3.5-turbo",
        "evaluation.oracle.judge.verdict": "text",
        "evaluation.oracle.judge.order": "both",  # not in the paper, as for AE-Borda-DPO
        "evaluation.metrics": ("null_rate",) if task == "jeopardy" else (),
    }
    vllm = 0.32 if placement == "split" else 0.0  # the engine answers in evaluations alone: what the scorer leaves
    return settings | place(placement, gpus, settings, vllm=vllm)


CONFIG = recipe

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
