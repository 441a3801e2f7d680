"""`rayalign/Tabular-v0`: a table of contexts and arms, and a one-layer Llama that picks an arm with one word.

Everything is exact and small, so that the whole loop (engines, oracle, learner) runs in seconds in a test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError
from rayalign.system.cache import cached_folder
from rayalign.types import Prompt

_VERSION = 1  # of the policy's checkpoint: part of its name in the cache
_HIDDEN = 64  # one head of this size, which every attention kernel of vLLM has
_TRAINING, _HELDOUT = "choose", "pick"  # held-out prompts put the same question in another word
_PROMPT = re.compile(rf"(?:{_TRAINING}|{_HELDOUT}) for c([0-9]+)")


class Tabular(World):
    """`num_prompts` contexts, `num_arms` arms, utilities drawn from a standard normal.

    Prompt       `choose for c3`. The stream goes through all contexts in a new order each epoch.
    Response     the name of an arm, `a0`, `a1`, ...; white space around it does not matter.
    Reward       utility of the arm in the context; any other text is worth the context's worst arm minus 1.
    Policy       answers with one arm, almost uniformly, then end-of-sequence.
    Held out     the same contexts, `pick for c3`, each with a reference drawn uniformly from the arms.
    """

    id = "rayalign/Tabular-v0"

    def __init__(self, num_prompts: int = 16, num_arms: int = 8, seed: int = 0, scale: float = 1.0) -> None:
        for name, value, least in (("num_prompts", num_prompts, 1), ("num_arms", num_arms, 2), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"env.{name}={value} must be at least {least}.")
        if scale <= 0:
            raise ConfigError(f"env.scale={scale} must be positive: it multiplies rewards into log-odds of the labels.")
        self.num_prompts, self.num_arms, self.seed, self.scale = num_prompts, num_arms, seed, scale
        self.arms = tuple(f"a{i}" for i in range(num_arms))
        rng = np.random.default_rng([seed, 0])
        self.utilities_PN = rng.standard_normal((num_prompts, num_arms))
        self._references_P = rng.integers(num_arms, size=num_prompts)

    # -- prompts ------------------------------------------------------------------------------------------------
    def prompt(self, index: int) -> Prompt:
        """Training prompt number `index`: every context once in `num_prompts`, in an order of the epoch's own."""
        if index < 0:
            raise ConfigError(f"prompt index={index} must not be negative.")
        epoch, place = divmod(index, self.num_prompts)
        order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.num_prompts)
        return self._prompt(int(order[place]), _TRAINING)

    def heldout(self, n: int) -> Sequence[Prompt]:
        """The first `n` contexts in the other wording."""
        return [self._prompt(context, _HELDOUT) for context in range(min(n, self.num_prompts))]

    def check_prompts(self) -> Sequence[Prompt]:
        """All training prompts."""
        return [self._prompt(context, _TRAINING) for context in range(self.num_prompts)]

    def find(self, text: str) -> Prompt | None:
        """The context that `text` names, in the wording in which it does."""
        found = _PROMPT.fullmatch(text)
        if not found or int(found[1]) >= self.num_prompts:
            return None
        return self._prompt(int(found[1]), text.partition(" ")[0])

    def _prompt(self, context: int, word: str) -> Prompt:
        return Prompt(
            id=f"tabular-{self.seed}-{word}-{context}",
            text=f"{word} for c{context}",
            token_ids=(),
            reference=self.arms[self._references_P[context]] if word == _HELDOUT else None,
        )

    # -- truth --------------------------------------------------------------------------------------------------
    @property
    def has_truth(self) -> bool:
        """Always: the table is the truth."""
        return True

    @property
    def reward_scale(self) -> float:
        """`scale`: `P(y > y') = sigmoid(scale * (r*(y) - r*(y')))`."""
        return self.scale

    def reward(self, prompt: Prompt, response: str) -> float:
        """Utility of the named arm. Raises `DataError` for a prompt that is not of this table."""
        utilities_N = self._utilities(prompt)
        arm = response.strip()
        return float(utilities_N[self.arms.index(arm)] if arm in self.arms else utilities_N.min() - 1)

    def best_reward(self, prompt: Prompt) -> float:
        """Utility of the context's best arm."""
        return float(self._utilities(prompt).max())

    def _utilities(self, prompt: Prompt) -> np.ndarray:
        found = _PROMPT.fullmatch(prompt.text)
        if not found or int(found[1]) >= self.num_prompts:
            raise DataError(f"prompt {prompt.text!r} is not of {self.id}; its prompts read 'choose for c0'.")
        return self.utilities_PN[int(found[1])]

    # -- what a run needs beside the prompts ----------------------------------------------------------------------
    def default_policy(self) -> str:
        """A Llama checkpoint with a vocabulary of its own for this table; made at the first call, then cached."""
        name = f"tabular-v{_VERSION}-{self.num_prompts}x{self.num_arms}-seed{self.seed}"
        return str(cached_folder(name, self._build_policy))

    def defaults(self) -> Mapping[str, Any]:
        """Settings that suit this world."""
        return {
            "loop.batch_size": 16,
            "rollout.max_tokens": 3,
            "rollout.temperature": 1.0,
            "learner.learning_rate": 3e-3,
            "evaluation.num_prompts": self.num_prompts,
            "evaluation.every": 128,
        }

    def _build_policy(self, folder: Path) -> None:
        """Write the policy down rather than train it: one layer whose outputs start small, so that the next token
        depends on the last one alone. Hidden dimension 0 says 'an arm has been named', dimension 1 'not yet'.
        """
        import torch

        from rayalign.system.hf import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self._tokenizer(), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_HIDDEN,
            intermediate_size=2 * _HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng():  # transformers draws its own initial weights, all of which are replaced
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                if "norm" not in name:
                    small = name.endswith(("o_proj.weight", "down_proj.weight"))
                    weight.normal_(0.0, 0.01 if small else 0.1, generator=generator)
            arms = tokenizer.convert_tokens_to_ids(list(self.arms))
            model.model.embed_tokens.weight[:, :2] = torch.tensor([0.0, 1.0])
            model.model.embed_tokens.weight[arms, :2] = torch.tensor([1.0, 0.0])
            model.lm_head.weight[:, :2] = 0.0
            model.lm_head.weight[arms, 1] = 2.0  # times about 6, what the norm leaves of a 1
            model.lm_head.weight[tokenizer.eos_token_id, 0] = 2.0
        model.save_pretrained(folder)

    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer, models, pre_tokenizers

        contexts = [f"c{i}" for i in range(self.num_prompts)]
        words = ["<pad>", "</s>", "<unk>", _TRAINING, _HELDOUT, "for", *contexts, *self.arms]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer
