"""Time and memory of MC-dropout moments: the trunk once and the last layer per mask, against the whole model per mask.

    python benchmarks/dropout_logprobs.py [--masks 10] [--rows 4] [--tokens 64] [--device cpu]

The model has the shape of SmolLM2-135M (or of --config, a Hugging Face directory) and random weights. Each way runs in
a process of its own; seconds are of the processor, "adds" is the peak memory over what was there just before. The
three ways give the same moments:

    once      what the scorer does: the head's full product once per chunk, per mask a product over the dropped features
    head      the trunk once, the whole head per mask
    plain     the whole model per mask, all its logits in memory

On a busy 2-core machine, one thread, wall clock: once 4.0 s, head 18.3 s, plain 50.3 s (12.7 times once; more than the
10 masks, because it also computes the logits of the prompts). The moments agree to 7e-7. With --rows 12 --masks 4 they
add 195, 133 and 665 MiB: "once" holds two chunks of float32 logits, whatever the number of masks and rows.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SMOLLM2 = dict(
    vocab_size=49_152, hidden_size=576, intermediate_size=1_536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


def build(config: str | None, device: str) -> Any:
    """A model of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(config) if config else LlamaConfig(**SMOLLM2)
    return AutoModelForCausalLM.from_config(shape).to(device).eval().requires_grad_(False)


def measure(way: str, masks: int, rows: int, tokens: int, device: str, config: str | None) -> dict[str, Any]:
    """MiB added at the peak, seconds, and the moments, of one way."""
    import torch

    from rayalign.learner.logprobs import PolicyModule
    from rayalign.scoring.dropout import HeadDropout

    class HeadPerMask(HeadDropout):
        """Multiplies by the whole head for each mask."""

        def _logits(self, hidden_CD):  # type: ignore[no-untyped-def]
            for kept_D in self._kept(hidden_CD):
                yield self.policy.scaled(self.head(hidden_CD * kept_D / (1 - self.rate)))

    policy = PolicyModule(build(config, device), chunk_tokens=256)
    kind = HeadPerMask if way == "head" else HeadDropout
    dropout = kind(policy, rate=0.05, masks=masks, seed=0, plain=way == "plain")
    ids_RT = torch.randint(5, 1_000, (rows, 2 * tokens), generator=torch.Generator().manual_seed(1)).to(device)
    response_RT = torch.arange(2 * tokens, device=device).expand(rows, -1) >= tokens
    dropout(ids_RT[:1, :4], torch.ones_like(ids_RT[:1, :4]), response_RT[:1, -4:].logical_and(ids_RT[:1, :4] > 0))

    def peak() -> float:
        """MiB, since `before`."""
        if device == "cpu":
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 1024
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20

    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    else:
        torch.cuda.reset_peak_memory_stats()
    clock = time.process_time if device == "cpu" else time.perf_counter  # other programs don't count
    before, start = peak(), clock()
    moments_R3 = dropout(ids_RT, torch.ones_like(ids_RT), response_RT)
    after = peak()
    return {"adds_mib": after - before, "seconds": clock() - start, "moments": moments_R3.tolist()}


def main() -> None:
    """Run the three ways and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each prompt, and of each response")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--config", help="Hugging Face directory whose config gives the model's shape")
    parser.add_argument("--way", choices=["once", "head", "plain"], help="measure one way in this process, print JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(**vars(options))))
        return
    print(f"{options.masks} masks, {options.rows} x ({options.tokens} + {options.tokens}) tokens, {options.device}")
    results = {}
    for way in ("once", "head", "plain"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        results[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=900).stdout)
    plain = results["plain"]
    for way, found in results.items():
        error = max(
            abs(a - b) / abs(b)
            for mine, theirs in zip(found["moments"], plain["moments"], strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        print(
            f"{way:6} {found['seconds']:7.2f} s ({plain['seconds'] / found['seconds']:5.1f}x)   adds "
            f"{found['adds_mib']:6.0f} MiB   largest relative difference {error:.0e}"
        )


if __name__ == "__main__":
    main()
