"""ActiveDPO's features, ours against the plain way, in one run: python benchmarks/active_dpo_features.py

ours     all responses in padded batches, one backward a batch, each layer's gradients projected at once (sparse
         Johnson-Lindenstrauss matrix); rayalign/scoring/gradients.py
plain    one forward and one backward per response through PEFT's adapters, then the product with a dense matrix

    tiny     TinyWorld's policy and prompts, 10 words a response; the dense matrix fits and is made beforehand
    small    SmolLM2-135M's shape, random weights; its dense matrix (d x p in float32) does not fit beside anything

Three prices of the plain way's projection, each a column: the product alone, as if the matrix were at hand; the matrix
made once for all responses, layer by layer, and multiplied with all of them; the matrix made again for each response,
which is what one response at a time means where it does not fit. For `small` one decoder layer's part is measured and
multiplied by the number of layers, which are alike.
Both ways give the same numbers: the largest relative error is printed (`small`: before the projection is dense).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rayalign.env.tinyworld.build import policy_dir
from rayalign.learner.logprobs import PolicyModule
from rayalign.learner.microbatch import pad_rows
from rayalign.scoring.config import ScorerConfig
from rayalign.scoring.gradients import _PROJECTION, initial_down, project
from rayalign.scoring.model import ScorerModel
from rayalign.types import Candidate, Prompt

SEED = 0


def save_small(folder: Path) -> Path:
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def with_adapters(folder: Path, rank: int) -> tuple[PolicyModule, list[Tensor]]:
    """PEFT's adapters as it initialises them, with the A that ours draw; and every B."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, lora).eval()
    layers = [m for m in wrapped.modules() if isinstance(m, peft.tuners.lora.Linear)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.lora_A["default"].weight.copy_(initial_down(layer.get_base_layer(), rank, SEED, number))
    return PolicyModule(wrapped, 256), [layer.lora_B["default"].weight for layer in layers]


def measure(size: str, folder: Path, prompts: list[Prompt], groups: list[list[Candidate]], options: Any) -> None:
    dim, rank = options.dim, options.rank
    rows = [(p.token_ids, c.token_ids) for p, group in zip(prompts, groups, strict=True) for c in group]
    scorer = ScorerModel(ScorerConfig(num_replicas=0, lora_rank=rank), str(folder))
    ours: list[np.ndarray] = []

    def batched() -> None:
        ours[:] = scorer.gradients(prompts, groups, dim=dim, seed=SEED)

    fast = seconds(batched, options.repeats) / len(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    policy, parameters = with_adapters(folder, rank)
    some = rows[: options.plain]

    def gradient(row: Any) -> list[Tensor]:
        return list(torch.autograd.grad(policy(*pad_rows([row])).sum(), parameters))

    gradient(rows[0])  # warm
    start = time.perf_counter()
    plain = [gradient(row) for row in some]
    backward = (time.perf_counter() - start) / len(some)

    layers = scorer.live.model.config.num_hidden_layers
    p = sum(parameter.numel() for parameter in parameters)
    flat_RP = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in plain])
    part = p // layers if size == "small" else p
    start = time.perf_counter()
    dense_DP = torch.randn(dim, part)
    making = (time.perf_counter() - start) * p / part
    product = seconds(lambda: dense_DP @ flat_RP[0, :part], 3) * p / part
    together = seconds(lambda: flat_RP[:, :part] @ dense_DP.T, 1) * p / part / len(some)

    expected_RD = torch.zeros(len(some), dim)
    for number, part_R in enumerate(zip(*plain, strict=True)):
        values_RK = torch.stack([value.flatten() for value in part_R])
        if size == "tiny":
            expected_RD += values_RK @ project(torch.eye(values_RK.shape[1]), dim, SEED, number, _PROJECTION)
        else:
            expected_RD += project(values_RK, dim, SEED, number, _PROJECTION)
    found_RD = torch.from_numpy(np.concatenate(ours)[: len(some)])
    error = float(((found_RD - expected_RD).norm(dim=1) / expected_RD.norm(dim=1)).max())

    print(f"{size}: {len(rows)} responses ({len(some)} the plain way), p = {p:,}, d = {dim:,}; ", end="")
    print(f"dense matrix {4 * dim * p / 2**30:.1f} GiB; ours peaks at {peak:.1f} GiB; largest error {error:.1e}")
    print(
        f"  ms per response: ours {1e3 * fast:.1f}; plain: backward {1e3 * backward:.1f}, product {1e3 * product:.1f}"
    )
    shared = backward + together + making / len(rows)
    print(
        f"  times faster than plain: {(backward + product) / fast:.1f} with the matrix at hand, "
        f"{shared / fast:.1f} made once for {len(rows)}, {(backward + product + making) / fast:.1f} made for each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="tiny,small")
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tiny-prompts", type=int, default=128)
    parser.add_argument("--small-prompts", type=int, default=4)
    parser.add_argument("--plain", type=int, default=6, help="responses that go the plain way")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    rng = np.random.default_rng(0)

    def work(prompts: int, lengths: tuple[int, int], words: int) -> tuple[list[Prompt], list[list[Candidate]]]:
        def ids(n: int) -> tuple[int, ...]:
            return tuple(map(int, rng.integers(words, size=n)))

        def response() -> Candidate:
            length = int(rng.integers(lengths[1] // 2, lengths[1] + 1))
            return Candidate(text="", token_ids=ids(length), logprobs=(), policy_version=0)

        table = [Prompt(id=str(i), text="", token_ids=ids(lengths[0])) for i in range(prompts)]
        return table, [[response() for _ in range(3)] for _ in table]

    if "tiny" in options.sizes:
        folder = Path(policy_dir(0))
        words = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
        measure("tiny", folder, *work(options.tiny_prompts, (22, 14), words), options)
    if "small" in options.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = save_small(Path(temporary))
            measure("small", folder, *work(options.small_prompts, (48, 40), 49_152), options)


if __name__ == "__main__":
    main()
