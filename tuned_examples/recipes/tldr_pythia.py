"""TL;DR with Pythia, 1B to 6.9B: SEA, online and offline DAP, XPO and APL, as in "Sample-Efficient Alignment for LLMs".

Command     rayalign run tuned_examples/recipes/tldr_pythia.py
            rayalign run tuned_examples/recipes/tldr_pythia.py --set recipe.size=2.8b --set recipe.agent=xpo
            rayalign run tuned_examples/recipes/tldr_pythia.py --set recipe.agent=passive --set recipe.loss=slic
            ray job submit --working-dir . -- python tuned_examples/recipes/tldr_pythia.py
Choices     recipe.size 1b | 2.8b | 6.9b      recipe.agent sea | passive | offline | xpo | apl
            recipe.loss dpo | ipo | slic      recipe.placement paper | collocated | split | laptop, recipe.gpus
Hardware    one machine with 8 GPUs: A100 of 40 GB for 1B, of 80 GB for 2.8B and 6.9B, with the 8B reward model beside
            them. The paper: 8 A100 for learner and actors, 16 more for the reward model (app. F.1).
Placement   1B: everything on each GPU (config 1 of app. H). 2.8B, 6.9B: 4 GPUs for the learner, actors and reward model
            on the other 4 (config 2). recipe.placement=laptop is for trying the wiring.
Result      NOT RUN at this size here. The wiring ran on CPUs with a random model: docs/recipes.md.
Source      Liu et al. 2024, appendix F.1, where nothing else is said; "code" is that paper's repository (sail-sg/oat).
"""

from typing import Any, Literal

from rayalign.errors import ConfigError
from rayalign.runs.placement import place

GPU_GB = {"1b": 40, "2.8b": 80, "6.9b": 80}
"""Memory of the GPUs that it fits, as rayalign estimates it."""
BETA = {"dpo": 0.1, "slic": 0.2, "ipo": 0.2}
"""IPO's was tuned over 0.2, 0.3, 0.5, 1.0 for each size; which was best is not printed."""

AGENTS: dict[str, dict[str, Any]] = {
    "passive": {"agent": "passive", "agent.schedule": "online"},
    "offline": {"agent": "passive", "agent.schedule": "offline"},
    "sea": {
        "agent": "sea",
        "agent.exploration": "bai_ts",  # the setting of the paper's main results: labels by crowdsourcing
        "agent.num_candidates": 20,
        "agent.gamma_burn_in": 1000,
        "agent.gamma_after": 0.7,
        "agent.posterior.members": 20,
        "agent.posterior.hidden": 128,
        "agent.posterior.updates": 5,  # app. A
        # lambda = 0.5 belongs to another formula (eq. 4 as printed): agent.posterior.regularization stays as it is.
        # "A pretrained 0.4B transformer [PairRM] without its head": PairRM's own class can't be loaded without its
        # package, so this is the transformer that it was made of.
        "agent.features.backbone": "microsoft/deberta-v3-large",
    },
    "xpo": {"agent": "xpo", "agent.alpha": 5e-6},
    "apl": {"agent": "apl", "agent.prompts_per_duel": 8, "agent.num_candidates": 8},  # 1,024 prompts for 128 labels
}


def recipe(
    size: Literal["1b", "2.8b", "6.9b"] = "1b",
    agent: Literal["sea", "passive", "offline", "xpo", "apl"] = "sea",
    loss: Literal["dpo", "ipo", "slic"] = "dpo",
    placement: Literal["paper", "collocated", "split", "laptop"] = "paper",
    gpus: int = 8,
) -> dict[str, Any]:
    if agent in ("xpo", "apl") and loss != "dpo":
        raise ConfigError(f"recipe.loss={loss!r}: {agent} is built on DPO (section 6.1); set recipe.loss=dpo.")
    settings = {
        **AGENTS[agent],
        "agent.loss": loss,
        "agent.beta": BETA[loss],
        "env": "rayalign/Prompts-v0",
        "env.path": "trl-lib/tldr",
        "env.reference_column": "completion",
        "env.limit": 50_000,  # "we fix 50k prompts"
        "env.heldout_split": "test",
        "policy": f"trl-lib/pythia-{size}-deduped-tldr-sft",  # footnote 13; the SFT models of Huang et al. 2024
        "budget": 50_000,
        "seed": 0,  # the paper: three seeds
        "loop.batch_size": 128,
        "rollout.temperature": 0.7,
        "rollout.max_tokens": 53,  # not in the paper; the SFT models' own length, and the code's
        "rollout.max_prompt_tokens": 1024,
        "rollout.chat": "never",
        "learner.learning_rate": 5e-7,
        "learner.schedule": "cosine",
        "learner.warmup_batches": 8,  # not in the paper; 2% in the code
        "learner.gradient_checkpointing": True,
        "oracle.kind": "reward_model",
        "oracle.target": "Skywork/Skywork-Reward-Llama-3.1-8B",
        "oracle.labels": "deterministic",  # app. G.2: the scalar reward model "is deterministic"
        "evaluation.num_prompts": 1000,
        "evaluation.against": "initial",
        "evaluation.temperature": 0.0,
        "evaluation.every": 2560,  # "periodically"; the code's interval
    }
    where = {"1b": "collocated"}.get(size, "split") if placement == "paper" else placement
    if (size, agent, where) == ("6.9b", "apl", "collocated"):
        raise ConfigError(
            "recipe.placement='collocated': APL's scorer (two copies of 6.9b), the engine, the reward model and the "
            "learner don't fit one GPU of 80 GB together; set recipe.placement=split."
        )
    vllm = 0.0
    if size == "6.9b":
        vllm = 0.4 if agent == "xpo" else 0.35  # XPO has two engines; elsewhere a scorer or a posterior needs room
    elif size == "1b":
        vllm = 0.25 if where == "collocated" else 0.38  # the reward model alone takes nearly half of 40 GB
    settings |= place(where, gpus, settings, vllm=vllm)
    if size == "6.9b" and where != "laptop":
        settings["learner.strategy"] = "zero3"  # app. H: ZeRO-2 where it fits, else ZeRO-3 or offloading
    return settings


CONFIG = recipe

if __name__ == "__main__":
    from rayalign.cli import run_example

    run_example(CONFIG)
