"""Memory and time of response log-probabilities and their backward pass, chunked and plain.

    python benchmarks/logprobs.py [--rows 8] [--tokens 512] [--vocabulary 128000] [--dtype float32]

Each way runs in a process of its own. "adds" is the peak of the process's resident memory over what it was just
before, gradients of hidden states and of the head's weights included. The hidden size is small (64), so that what is
measured is the logits, and not the head.

On a busy 2-core machine, one thread: chunked adds 346 MiB, plain 5,971 MiB; the times were about equal (85 and 67 s).
"""

import argparse
import json
import resource
import subprocess
import sys
import time


def measure(way: str, rows: int, tokens: int, vocabulary: int, dtype: str, chunk: int) -> dict[str, float]:
    """MiB that one forward and backward add at their peak, and its seconds."""
    import torch
    from torch import nn

    from rayalign.learner.logprobs import chunked_logprobs

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    head = nn.Linear(64, vocabulary, bias=False, dtype=kind)
    hidden_ND = torch.randn(rows * tokens, 64, dtype=kind, requires_grad=True)
    targets_N = torch.randint(vocabulary, (rows * tokens,))
    chunked_logprobs(hidden_ND[:2], targets_N[:2], head, 2).sum().backward()  # libraries are loaded now
    head.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    if way == "plain":
        logprob_N = head(hidden_ND).float().log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    else:
        logprob_N = chunked_logprobs(hidden_ND, targets_N, head, chunk)
    logprob_N.view(rows, tokens).sum(-1).mean().backward()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"adds_mib": after - before, "seconds": seconds, "sum": float(logprob_N.detach().double().sum())}


def main() -> None:
    """Run both ways and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--way", choices=["plain", "chunked"], help="measure one way in this process, print JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(**vars(options))))
        return
    size = f"{options.rows} x {options.tokens} tokens x {options.vocabulary} words"
    print(f"{size}, {options.dtype}, chunks of {options.chunk}")
    for way in ("chunked", "plain"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=900).stdout)
        print(f"{way:8} adds {result['adds_mib']:7.0f} MiB   {result['seconds']:6.1f} s   sum {result['sum']:.2f}")


if __name__ == "__main__":
    main()
