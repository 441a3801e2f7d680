"""Sampling with plain `transformers`: for machines without vLLM, and fast on tiny models.

    prompts -> sorted by length -> batches -> prefill once per prompt -> decode n rows per prompt -+
                                                                           ^                       |
                                                                           +- finished rows leave -+

A prompt's random numbers are drawn from its own seed before its batch is known, so what is sampled depends on the
batching only where rounding does.

Shapes: P prompts of a batch, R rows being decoded (at most P * n), T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayalign.errors import DataError
from rayalign.rollout.encode import check_fits, context_length, eos_token_ids, load_tokenizer
from rayalign.rollout.engine import Sampling, prompt_seed
from rayalign.rollout.live_model import LiveModel
from rayalign.rollout.weights import Weights
from rayalign.types import Candidate, Prompt


class TransformersEngine:
    """An `AutoModelForCausalLM` with a decode loop of its own. Implements `rayalign.rollout.engine.Engine`."""

    def __init__(
        self,
        policy_dir: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        max_batch_tokens: int = 65_536,
    ) -> None:
        from rayalign.rollout.kv_cache import shares_prefix

        self._dir, self._device, self._max_batch_tokens = Path(policy_dir), torch.device(device), max_batch_tokens
        self.tokenizer = load_tokenizer(policy_dir)
        self.eos_ids = eos_token_ids(policy_dir, self.tokenizer)
        self._context = context_length(policy_dir)
        self._live = LiveModel(_load_model(self._dir, dtype, self._device), self._device)
        self._shares_prefix = shares_prefix(self._live.model.config)

    @property
    def version(self) -> int:
        """Weights version that it runs; 0 is the initial policy."""
        return self._live.version

    # -- sampling ------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, positions: Sequence[int] | None = None
    ) -> list[list[Candidate]]:
        """`sampling.n` candidates for each prompt, in order; see `Engine.generate`."""
        positions = range(len(prompts)) if positions is None else positions
        for prompt in prompts:
            check_fits(prompt, sampling.max_tokens, self._context)
        greedy = sampling.temperature == 0
        drawn = dataclasses.replace(sampling, n=1) if greedy else sampling
        groups: list[list[Candidate]] = [[] for _ in prompts]
        for batch in self._batches(prompts, drawn):
            noise_PNT = None if greedy else torch.stack([_noise(seed, positions[i], drawn) for i in batch])
            found = self._decode([prompts[i].token_ids for i in batch], drawn, noise_PNT)
            for i, group in zip(batch, found, strict=True):
                groups[i] = group * sampling.n if greedy else group
        return groups

    def _batches(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[list[int]]:
        """Indices of prompts of similar length; padded tokens of all rows within `max_batch_tokens`."""
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids)):
            longest = len(prompts[batch[0] if batch else i].token_ids) + sampling.max_tokens
            if batch and (len(batch) + 1) * sampling.n * longest > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, noise_PNT: Tensor | None
    ) -> list[list[Candidate]]:
        """One batch from prefill to the last end-of-sequence."""
        from rayalign.rollout.kv_cache import SharedPrefixCache, repeat_with_room
        from rayalign.system.hf import DynamicCache

        device, n = self._device, sampling.n
        rows = len(prompts) * n
        ids, mask = _left_pad(prompts, device)
        cache: Any = DynamicCache(config=self._live.model.config)
        # Positions count from the first real token; padded places repeat position 0 and are masked.
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(ids, mask, position, cache)
        owner = torch.arange(len(prompts), device=device).repeat_interleave(n)
        if self._shares_prefix:
            cache = SharedPrefixCache(cache, mask, n, sampling.max_tokens - 1)
            # The cache masks by itself; a mask of four dimensions is one that transformers leaves alone.
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        else:
            repeat_with_room(cache, owner, sampling.max_tokens - 1)
            mask = mask[owner]
        logits, position = logits[owner], position[owner, -1:]
        noise_RT = None if noise_PNT is None else noise_PNT.reshape(rows, -1).to(device)

        is_eos = torch.zeros(max(logits.shape[-1], max(self.eos_ids) + 1), dtype=torch.bool, device=device)
        is_eos[list(self.eos_ids)] = True
        tokens = torch.zeros(rows, sampling.max_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(rows, sampling.max_tokens, device=device)
        lengths = torch.full((rows,), sampling.max_tokens, device=device)
        finished = torch.zeros(rows, dtype=torch.bool, device=device)
        row = torch.arange(rows, device=device)  # which response each decoded row is
        for t in range(sampling.max_tokens):
            if t < sampling.min_tokens:
                logits = logits.masked_fill(is_eos[: logits.shape[-1]], -torch.inf)
            token, logprob = sample(logits, sampling, None if noise_RT is None else noise_RT[row, t])
            tokens[row, t], logprobs[row, t] = token, logprob
            ended = is_eos[token] & ~finished[row]
            lengths[row[ended]] = t + 1
            finished[row[ended]] = True
            going = ~finished[row]
            left = int(going.sum())
            if not left or t + 1 == sampling.max_tokens:
                break
            if left <= 0.8 * len(row):  # copying the cache costs about a step: not for every row that ends
                keep = going.nonzero()[:, 0]
                cache.reorder_cache(keep)
                row, token, position = row[keep], token[keep], position[keep]
                mask = mask if self._shares_prefix else mask[keep]
            position = position + 1
            if not self._shares_prefix:
                mask = torch.cat([mask, mask.new_ones(len(row), 1)], dim=1)
            logits = self._forward(token[:, None], mask, position, cache)
            if t == 0 and self._shares_prefix:
                cache.check_used()
        return self._candidates(n, tokens, logprobs, lengths, finished)

    def _forward(self, ids: Tensor, mask: Tensor | None, position: Tensor, cache: Any) -> Tensor:
        """Logits of the last position, `R x V`."""
        out = self._live.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def _candidates(
        self, n: int, tokens: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor
    ) -> list[list[Candidate]]:
        rows = list(zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True))
        ids = [token[:length] for token, _, length, _ in rows]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        all_candidates = [
            Candidate(
                text=text,
                token_ids=tuple(token),
                logprobs=tuple(logprob[:length]),
                policy_version=self._live.version,
                finished=done,
            )
            for text, token, (_, logprob, length, done) in zip(texts, ids, rows, strict=True)
        ]
        return [all_candidates[i : i + n] for i in range(0, len(all_candidates), n)]

    # -- weights -------------------------------------------------------------------------------------------------
    def load(self, weights: Weights) -> str:
        """Copy into the live parameters in place; returns the checksum read back from them."""
        return self._live.load(weights)

    def sleep(self) -> None:
        """Move the weights to the CPU and free the device's memory; nothing happens on a CPU."""
        self._live.sleep()

    def wake(self) -> None:
        """Move the weights back."""
        self._live.wake()


def sample(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """A token per row of `logits`, `R x V`, and its log-probability under the distribution that it was drawn from.

    Inverse of the cumulative distribution at `noise`, `R`, uniform in [0, 1). Temperature 0 takes the largest
    logit (the lowest index in a tie) and reports its log-probability at temperature 1.
    """
    if sampling.temperature == 0 or noise is None:
        logprobs = logits.float().log_softmax(-1)
        token = logits.argmax(-1)
        return token, logprobs.gather(-1, token[:, None])[:, 0]
    logprobs = (logits.float() / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        logprobs = keep_nucleus(logprobs, sampling.top_p)
    # float64 and the right side: a token of probability 0 has no width and is never hit.
    cdf = logprobs.exp().cumsum(-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def keep_nucleus(logprobs: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose mass reaches `top_p`, renormalised; the others at -inf. `R x V`."""
    ordered, index = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(logprobs, -torch.inf).scatter(-1, index, ordered).log_softmax(-1)


def _noise(seed: int, position: int, sampling: Sampling) -> Tensor:
    """Uniform numbers for the samples of one prompt, `N x T`; the first tokens' do not change with `max_tokens`."""
    generator = torch.Generator().manual_seed(prompt_seed(seed, position))
    return torch.rand(sampling.max_tokens, sampling.n, generator=generator, dtype=torch.float64).T


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, `P x T`, real tokens at the right end. What stands in the padding is masked, so 0 will do."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def _load_model(path: Path, dtype: str, device: torch.device) -> Any:
    from rayalign.rollout.kv_cache import ATTENTION, shares_prefix
    from rayalign.system.hf import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    try:
        if shares_prefix(AutoConfig.from_pretrained(str(path))):
            settings["attn_implementation"] = ATTENTION
        model = AutoModelForCausalLM.from_pretrained(str(path), **settings)
    except Exception as error:
        raise DataError(f"policy={str(path)!r}: its model can't be loaded: {error}") from error
    if model.dtype == torch.float16 and device.type == "cpu":
        model = model.float()
    return model.to(device).eval().requires_grad_(False)
