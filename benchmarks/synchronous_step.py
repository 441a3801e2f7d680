"""A synchronous step of the loop on a real language model, against bare generation plus a bare optimizer step.

    python benchmarks/synchronous_step.py [--batches 8] [--batch-size 16] [--threads 2]

The loop: passive on rayalign/Haiku-v0, SmolLM2-135M-Instruct on vLLM, `max_staleness=0`, no evaluation: a step is the
time between two batches, everything included (gate, weights to the engine and their read-back, sampling, oracle under
Serve, ledger, DPO step). Bare, afterwards, in a process of its own with the same threads: `vllm.LLM.generate` for the
same prompts, and on the very duels that the run bought the reference's log-probabilities, forward and backward of
DPO in plain transformers, and AdamW. The target is a ratio of at most 1.25.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

POLICY = "HuggingFaceTB/SmolLM2-135M-Instruct"
TOKENS = 40
TEMPERATURE = 0.7


def main() -> None:
    """Run both and print seconds per step and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", help="of the learner; engines compute in bfloat16")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(Path(options.bare), options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        loop = through_the_loop(run_dir, options)
        command = [sys.executable, __file__, "--bare", str(run_dir), *sys.argv[1:]]
        output = subprocess.run(command, env=bare_environment(options), capture_output=True, text=True, timeout=3600)
        if output.returncode:
            sys.exit(output.stderr[-2000:])
        plain = json.loads(output.stdout.strip().splitlines()[-1])
    for name, seconds in loop.items():
        print(f"loop  {name:10s} {seconds:7.2f} s")
    for name, seconds in plain.items():
        print(f"bare  {name:10s} {seconds:7.2f} s")
    print(f"ratio {loop['step'] / sum(plain.values()):.2f}")


def through_the_loop(run_dir: Path, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step and of its stages, the first two steps left out."""
    import rayalign

    result = rayalign.run(
        "passive",
        "rayalign/Haiku-v0",
        policy=POLICY,
        budget=(options.batches + 2) * options.batch_size,
        seed=0,
        max_staleness=0,
        run_dir=run_dir,
        **settings(options),
    )
    history = result.history.to_pydict()
    times = history["time"]
    steps = [after - before for before, after in pairwise(times[1:])]
    stages = ("gate", "sync", "generate", "select", "label", "observe")
    medians = {stage: statistics.median(history[f"seconds/{stage}"][2:]) for stage in stages}
    return {**medians, "step": statistics.median(steps)}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """One process at a time works, so each may have all threads."""
    return {
        "loop.batch_size": options.batch_size,
        "rollout.engine": "vllm",
        "rollout.max_tokens": TOKENS,
        "rollout.temperature": TEMPERATURE,
        "rollout.threads_per_replica": options.threads,
        "learner.threads_per_worker": options.threads,
        "learner.dtype": options.dtype,
        "learner.checkpoint_every": 1000,
        "evaluation.every": 0,
        "evaluation.at_start": False,
        "logging.progress": "off",
    }


# ==== the bare way ===============================================================================================
def bare_environment(options: argparse.Namespace) -> dict[str, str]:
    """What the engine's process has in the loop, too."""
    from rayalign.rollout.config import RolloutConfig

    config = RolloutConfig(engine="vllm", threads_per_replica=options.threads)
    return {**os.environ, **config.environment()}


def bare(run_dir: Path, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of sampling the run's prompts, and of a DPO step on its duels."""
    import torch
    from vllm import LLM, SamplingParams

    from rayalign.ledger.ledger import Ledger
    from rayalign.models import resolve_policy

    torch.set_num_threads(options.threads)
    path = str(resolve_policy(POLICY))
    ledger = Ledger(run_dir / "ledger.arrow", read_only=True)
    batches = [ledger.stream_batch(i) for i in range(ledger.num_streamed)]

    engine = LLM(path, dtype="bfloat16", max_model_len=1024 + TOKENS, enforce_eager=True, max_num_seqs=256)
    params = SamplingParams(n=2, temperature=TEMPERATURE, max_tokens=TOKENS, seed=0, detokenize=False)
    sampling = []
    for batch in batches:
        prompts: list[Any] = [{"prompt_token_ids": list(p.duel.prompt.token_ids)} for p in batch]
        start = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        sampling.append(time.perf_counter() - start)
    del engine

    step = dpo_step(path, getattr(torch, options.dtype))
    learning = []
    for batch in batches:
        rows = [(p.duel.prompt.token_ids, r.token_ids) for p in batch for r in (p.winner, p.loser)]
        start = time.perf_counter()
        step(rows)
        learning.append(time.perf_counter() - start)
    return {"generate": statistics.median(sampling[2:]), "learn": statistics.median(learning[2:])}


def dpo_step(path: str, dtype: Any) -> Any:
    """DPO as a page of plain code: one padded batch, all logits, AdamW."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    def logprobs(model: Any, ids: Any, mask: Any, response: Any) -> Any:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (tokens * response[:, 1:]).sum(-1)

    def step(rows: list[Any]) -> None:
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask, response = torch.zeros_like(ids), torch.zeros(len(rows), longest)
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor([*prompt, *answer])
            mask[i, :end], response[i, len(prompt) : end] = 1, 1
        with torch.no_grad():
            anchor = logprobs(reference, ids, mask, response)
        gain = logprobs(policy, ids, mask, response) - anchor
        (-F.logsigmoid(0.1 * (gain[::2] - gain[1::2]))).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
