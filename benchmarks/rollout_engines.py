"""Tokens per second of the engines, and the cost of a verified sync, all in one run on one machine.

    python benchmarks/rollout_engines.py                                tiny: 0.3M parameters, 32 prompts x 20 x 14
    python benchmarks/rollout_engines.py --policy DIR --prompts 16 --n 4 --max-tokens 64 --dtype bfloat16

    generate        transformers' own `model.generate(num_return_sequences=n)`, left-padded, the same EOS ids
    transformers    TransformersEngine
    vllm            VllmEngine, in this process

Each is warmed up, then the median of `--repeats` runs is taken, engines in turn, so that a busy machine is busy for
all of them. Tokens are those that were sampled up to end-of-sequence. A sync is `load`: weights in, read back.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rayalign.rollout.config import RolloutConfig
from rayalign.rollout.engine import Engine, Sampling
from rayalign.rollout.replica import engine_name, make_engine
from rayalign.rollout.transformers_engine import TransformersEngine
from rayalign.rollout.weights import pack
from rayalign.types import Prompt


def tiny_policy(path: Path) -> Path:
    """A random Llama of 0.34M parameters with a word-level tokenizer of 67 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(64))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def plain_generate(engine: TransformersEngine, prompts: list[Prompt], sampling: Sampling) -> int:
    """Tokens sampled by `model.generate`, the way most trainers call it."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    pad = engine.tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(p.token_ids)) + list(p.token_ids) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
    out = engine._model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_tokens,
        num_return_sequences=sampling.n,
        eos_token_id=list(engine.eos_ids),
        pad_token_id=pad,
    )[:, longest:]
    is_eos = torch.isin(out, torch.tensor(engine.eos_ids))
    before = is_eos.cumsum(-1) - is_eos.long()
    return int((before == 0).sum())


def by_engine(engine: Engine, prompts: list[Prompt], sampling: Sampling) -> int:
    groups = engine.generate(prompts, sampling, seed=0)
    return sum(len(candidate.token_ids) for group in groups for candidate in group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, help="Hugging Face directory; default: a tiny random one")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=14)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-vllm", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, args.policy or tiny_policy(Path(folder)))


def measure(args: argparse.Namespace, policy: Path) -> None:
    config = RolloutConfig(
        dtype=args.dtype, max_prompt_tokens=64, max_tokens=args.max_tokens, threads_per_replica=args.threads
    )
    os.environ.update(config.environment())
    torch.set_num_threads(args.threads)
    sampling = Sampling(n=args.n, temperature=1.0, max_tokens=args.max_tokens)
    rng = random.Random(0)
    prompts = [
        Prompt(id=str(i), text="", token_ids=tuple(rng.randrange(3, 60) for _ in range(rng.randint(15, 40))))
        for i in range(args.prompts)
    ]
    ours = TransformersEngine(policy, dtype=args.dtype)
    engines: dict[str, Engine] = {"transformers": ours}
    runs: dict[str, Callable[[], int]] = {
        "generate": lambda: plain_generate(ours, prompts, sampling),
        "transformers": lambda: by_engine(ours, prompts, sampling),
    }
    vllm = RolloutConfig(**{**vars(config), "engine": "vllm"})
    if not args.no_vllm and engine_name(vllm) == "vllm":
        engines["vllm"] = make_engine(vllm, policy)
        runs["vllm"] = lambda: by_engine(engines["vllm"], prompts, sampling)

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, int] = {}
    for repeat in range(args.repeats + 1):  # the first is the warm-up
        for name, run in runs.items():
            began = time.perf_counter()
            tokens[name] = run()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    base = tokens["generate"] / statistics.median(seconds["generate"])
    parameters = sum(p.numel() for p in ours._model.parameters())
    print(
        f"{parameters / 1e6:.2f}M parameters, {args.prompts} prompts x {args.n} samples x {args.max_tokens} tokens, ",
        end="",
    )
    print(f"{args.dtype}, {args.threads} threads, median of {args.repeats} (fastest in brackets)")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rate = tokens[name] / median
        print(f"{name:14s}{median:8.3f} s [{min(taken):.3f}]  {rate:9.0f} tokens/s  {rate / base:5.2f} x generate")

    tied = ours._model.config.tie_word_embeddings
    state = {k: v for k, v in ours._model.state_dict().items() if not (tied and k == "lm_head.weight")}
    for name, engine in engines.items():
        taken = []
        for version in range(1, 4):
            weights = pack(version, state)
            began = time.perf_counter()
            assert engine.load(weights) == weights.checksum
            taken.append(time.perf_counter() - began)
        print(
            f"{name:14s}{statistics.median(taken):8.3f} s per sync of {weights.nbytes / 1e6:.1f} MB, read back included"
        )


if __name__ == "__main__":
    main()
