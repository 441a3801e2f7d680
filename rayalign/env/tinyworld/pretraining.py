"""What happened before alignment: the initial policy learns from demonstrations, the backbone from other rewards.

Both are trained from scratch on one core in about a minute, and are a function of their seed: on one machine the
same seed gives the same weights.

Shapes: B sequences, T tokens, W worlds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rayalign.env.tinyworld.annotators import CAREFUL_DEMONSTRATIONS, demonstrate
from rayalign.env.tinyworld.language import ATTRIBUTES, FILLERS, ITEMS, MAX_WORDS, Listing, render_prompt
from rayalign.env.tinyworld.reward import hidden_weights, word_terms
from rayalign.env.tinyworld.tokenizer import CONTEXT, SPACE
from rayalign.env.tinyworld.world import BACKBONE_WORLDS, training_listing

if TYPE_CHECKING:
    from rayalign.system.hf import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

POLICY_STEPS = (500, 500)
"""Steps on clean in-order listing (copying comes late and suddenly), then on the noisy demonstrations."""
BACKBONE_STEPS = 800
NUM_BACKBONE_WORLDS = 256
BATCH = 64
"""Sequences per step."""
PEAK_LEARNING_RATE = 3e-3
_POLICY, _BACKBONE = 3, 4
_STRAY = (*FILLERS, *ATTRIBUTES)


def model_config(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A two-layer Llama of 0.35 M parameters; heads of 32, the smallest that vLLM's CPU attention knows."""
    from rayalign.system.hf import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """One thread and a random state of one's own; the caller's are restored."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def encode_batch(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[tuple[Listing, Sequence[str]]]
) -> tuple[Tensor, Tensor]:
    """Token ids `B x T`, padded on the right, and where the responses' words and end-of-sequence are, `B x T` bool."""
    token = tokenizer.get_vocab()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows, starts = [], []
    prompts = tokenizer([render_prompt(listing) for listing, _ in examples])["input_ids"]
    for prompt, (_, response) in zip(prompts, examples, strict=True):
        ids = [token[SPACE + word] for word in response]
        rows.append([*prompt, *ids, *([eos] if len(ids) < MAX_WORDS else [])])
        starts.append(len(prompt))
    width = max(map(len, rows))
    tokens_BT = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    place_T = torch.arange(width)
    lengths_B1, starts_B1 = torch.tensor([len(row) for row in rows])[:, None], torch.tensor(starts)[:, None]
    return tokens_BT, (place_T >= starts_B1) & (place_T < lengths_B1)


def _optimise(parameters: list[Tensor], steps: int, losses: Iterator[Tensor]) -> None:
    """Adam with a short warm-up and a linear decay to a tenth."""
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        rate = PEAK_LEARNING_RATE * min((step + 1) / 50, 1.0 - 0.9 * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        next(losses).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def train_policy(
    seed: int, tokenizer: PreTrainedTokenizerFast, steps: tuple[int, int] = POLICY_STEPS
) -> LlamaForCausalLM:
    """The initial policy of world `seed`. It meets W only through the demonstrations of its careful annotators."""
    from rayalign.system.hf import LlamaForCausalLM

    rng, weights = np.random.default_rng([seed, _POLICY]), hidden_weights(seed)

    def losses(model: LlamaForCausalLM, clean: bool) -> Iterator[Tensor]:
        while True:
            listings = [training_listing(rng) for _ in range(BATCH)]
            examples = [
                (
                    listing,
                    [ITEMS[item] for item, _ in listing]
                    if clean
                    else demonstrate(listing, weights, rng, CAREFUL_DEMONSTRATIONS),
                )
                for listing in listings
            ]
            tokens_BT, response_BT = encode_batch(tokenizer, examples)
            hidden = model.model(tokens_BT[:, :-1]).last_hidden_state[response_BT[:, 1:]]
            yield torch.nn.functional.cross_entropy(model.lm_head(hidden), tokens_BT[:, 1:][response_BT[:, 1:]])

    with reproducible(seed):
        model = LlamaForCausalLM(model_config(tokenizer)).train()
        for clean, count in zip((True, False), steps, strict=True):
            _optimise(list(model.parameters()), count, losses(model, clean))
    return model.eval()


def train_backbone(
    tokenizer: PreTrainedTokenizerFast, steps: int = BACKBONE_STEPS, num_worlds: int = NUM_BACKBONE_WORLDS
) -> LlamaModel:
    """A causal transformer whose last hidden states tell, linearly, what a word is worth in any world of the family.

    It is trained to predict the token rewards of `num_worlds` worlds, none of them a `TinyWorld`, at once; the
    256 linear heads are thrown away. Rewards are sums over words, hence the sum as pooling.
    """
    from rayalign.system.hf import LlamaModel

    rng = np.random.default_rng([BACKBONE_WORLDS.start, _BACKBONE])
    tables = np.stack([hidden_weights(BACKBONE_WORLDS[w]) for w in range(num_worlds)])

    def losses(model: LlamaModel, head: torch.nn.Linear) -> Iterator[Tensor]:
        while True:
            examples = [babble(rng) for _ in range(BATCH)]
            targets = []
            for listing, response in examples:
                for earned, cost in word_terms(listing, response):
                    gain = 0.0 if earned is None else tables[:, listing[earned][0], listing[earned][1]]
                    targets.append(np.full(num_worlds, -cost) + gain)
                if len(response) < MAX_WORDS:
                    targets.append(np.zeros(num_worlds))  # the reward of end-of-sequence
            tokens_BT, response_BT = encode_batch(tokenizer, examples)
            predicted = head(model(tokens_BT).last_hidden_state[response_BT])
            yield torch.nn.functional.mse_loss(predicted, torch.from_numpy(np.stack(targets)).float())

    with reproducible(BACKBONE_WORLDS.start):
        model = LlamaModel(model_config(tokenizer)).train()
        head = torch.nn.Linear(model.config.hidden_size, num_worlds)
        _optimise([*model.parameters(), *head.parameters()], steps, losses(model, head))
    return model.eval()


def babble(rng: np.random.Generator) -> tuple[Listing, list[str]]:
    """A report and 3 to 14 words in response: half of them its items, mostly in order, the others every kind of slip.

    So many slips, because the hard part to learn is not what an item is worth but whether it earns that here.
    """
    listing = training_listing(rng)
    own = [ITEMS[item] for item, _ in listing]
    sorted_, kinds, draws = rng.random() < 0.6, rng.random(rng.integers(3, MAX_WORDS + 1)), rng.random(MAX_WORDS)
    place, response = 0, []
    for kind, draw in zip(kinds, draws[: len(kinds)], strict=True):
        if kind < 0.55 and sorted_:
            place += int(1.6 * draw)
            response.append(own[place % len(own)])
            place += 1
        else:
            pool = own if kind < 0.63 else ITEMS if kind < 0.93 else _STRAY
            response.append(pool[int(draw * len(pool))])
    return listing, response
