"""A scalar reward model as an oracle: any Hugging Face sequence-classification model with one label.

    prompt + response -> chat template -> cut from the left of the prompt -> sorted by length -> micro-batches -> score

Truncation rule: what is too long loses the beginning of its prompt (a begin-of-sequence token stays), never a token
of the response. A response that leaves no room for its prompt is a failed verdict, which is not charged.

Padding and batching are `classifier.py`'s: a response's score does not depend on what it is batched with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import OracleError
from rayalign.serve.classifier import Classifier, Truncations
from rayalign.serve.config import OracleConfig
from rayalign.serve.kinds import OracleKind, check_target
from rayalign.serve.oracles import sigmoid
from rayalign.serve.score_cache import ScoreCache, content_key
from rayalign.types import Duel, Prompt, Verdict


class RewardModelOracle:
    """`P(first wins) = sigmoid(scale * (r(x, first) - r(x, second)))` with a model's reward `r`."""

    def __init__(self, config: OracleConfig) -> None:
        self.config = config
        self.classifier = Classifier(config, labels=(1,), what="a scalar reward model")
        self.model = self.classifier.model
        self.encoder = Encoder(
            self.classifier.tokenizer, self.classifier.max_tokens, token_types=self.classifier.token_types
        )
        self._cache = ScoreCache(config.cache_size)

    @property
    def id(self) -> str:
        """`reward_model:`, the model's name, and its commit on the hub or a checksum of its head."""
        return f"reward_model:{self.classifier.name}@{self.classifier.version}"

    def keep_in(self, folder: str | Path) -> None:
        """Share scores with all replicas that use `folder`, and with those that come after them."""
        self._cache.keep_in(folder, f"{self.id}, {self.classifier.reads}")

    @property
    def truncated(self) -> int:
        """Responses so far that were scored without the beginning of their prompt."""
        return self.encoder.truncations.count

    def judge(self, duels: Sequence[Duel]) -> list[Verdict]:
        """One verdict per duel. Raises `OracleError` that names the duel whose score is not finite."""
        pairs = [(duel.prompt, response.text) for duel in duels for response in (duel.first, duel.second)]
        scores = self.scores(pairs)
        return [
            self._verdict(duel, first, second)
            for duel, first, second in zip(duels, scores[::2], scores[1::2], strict=True)
        ]

    def _verdict(self, duel: Duel, first: float | None, second: float | None) -> Verdict:
        if first is None or second is None:
            return Verdict(
                duel_id=duel.id,
                failure=f"the {'first' if first is None else 'second'} response leaves no room for the prompt in the "
                f"{self.encoder.max_tokens} tokens of the reward model",
            )
        if not (math.isfinite(first) and math.isfinite(second)):
            raise OracleError(
                f"oracle {self.id} scored duel {duel.id} (prompt {duel.prompt.id}) with {first} and {second}; a reward "
                "is a finite number. With oracle.dtype=bfloat16, try float32."
            )
        return Verdict(
            duel_id=duel.id, probability=sigmoid(self.config.scale * (first - second)), price=self.config.price
        )

    # -- scoring --------------------------------------------------------------------------------------------------
    def scores(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        """The reward of each (prompt, response); None where the response leaves no room for the prompt.

        A pair that was scored before, here or in an earlier call, is not scored again.
        """
        keys = [content_key(_messages(prompt), response) for prompt, response in pairs]
        known = self._cache.through(dict(zip(keys, pairs, strict=True)), self._new_scores)
        return [known[key] for key in keys]

    def _new_scores(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        rows = self.encoder.encode(pairs)
        fitting = [row for row in rows if row is not None]
        scores = iter(self.classifier.logits(fitting))
        return [None if row is None else next(scores)[0] for row in rows]


class Encoder:
    """Turns (prompt, response) into token ids of at most `max_tokens`.

    With a chat template: `prompt.meta["messages"]` (or the prompt's text as the user's turn) and the response as the
    assistant's turn. Without one: the prompt's text and the response as the tokenizer's own kind of pair, which for
    most decoders is plain concatenation and for encoders puts a separator between them.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, token_types: bool = False) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.truncations = Truncations("responses were scored without the beginning of their prompt", max_tokens)
        self._names = ("input_ids", "token_type_ids") if token_types else ("input_ids",)

    def encode(self, pairs: Sequence[tuple[Prompt, str]]) -> list[dict[str, list[int]] | None]:
        """Model inputs per pair, not padded; None where the response leaves no room for the prompt."""
        if not pairs:
            return []
        encode = self._with_template if self.tokenizer.chat_template else self._as_pairs
        return encode(pairs)

    # -- chat template --------------------------------------------------------------------------------------------
    def _with_template(self, pairs: Sequence[tuple[Prompt, str]]) -> list[dict[str, list[int]] | None]:
        texts = [self._render([*_messages(p), {"role": "assistant", "content": response}]) for p, response in pairs]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            self._typed(row) if len(row) <= self.max_tokens else self._cut(prompt, text)
            for (prompt, _), text, row in zip(pairs, texts, ids, strict=True)
        ]

    def _cut(self, prompt: Prompt, text: str) -> dict[str, list[int]] | None:
        """The last `max_tokens` of `text`, its first token kept where that begins every sequence."""
        begins = self._render(_messages(prompt), add_generation_prompt=True)
        same = next((i for i, (a, b) in enumerate(zip(text, begins, strict=False)) if a != b), len(begins))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        response = self.tokenizer(text[same:], add_special_tokens=False)["input_ids"]
        head = ids[:1] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
        if len(response) + len(head) >= self.max_tokens:
            return None
        self.truncations.add()
        return self._typed([*head, *ids[len(head) - self.max_tokens :]])

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _typed(self, ids: list[int]) -> dict[str, list[int]]:
        return {"input_ids": ids} | {name: [0] * len(ids) for name in self._names[1:]}

    # -- no template ----------------------------------------------------------------------------------------------
    def _as_pairs(self, pairs: Sequence[tuple[Prompt, str]]) -> list[dict[str, list[int]] | None]:
        prompts = ["\n".join(m["content"] for m in _messages(prompt)) for prompt, _ in pairs]
        rows = self.tokenizer(prompts, [response for _, response in pairs], return_token_type_ids=True)
        return [
            {name: rows[name][i] for name in self._names}
            if len(rows["input_ids"][i]) <= self.max_tokens
            else self._cut_pair(prompts[i], pairs[i][1])
            for i in range(len(pairs))
        ]

    def _cut_pair(self, prompt: str, response: str) -> dict[str, list[int]] | None:
        fixed = len(self.tokenizer("", response)["input_ids"])
        if fixed >= self.max_tokens:
            return None
        self.truncations.add()
        self.tokenizer.truncation_side = "left"
        row = self.tokenizer(
            prompt, response, truncation="only_first", max_length=self.max_tokens, return_token_type_ids=True
        )
        return {name: row[name] for name in self._names}


def _messages(prompt: Prompt) -> Sequence[Mapping[str, str]]:
    return prompt.meta.get("messages") or [{"role": "user", "content": prompt.text}]


def _make(config: OracleConfig, world: World | None) -> Oracle:
    return RewardModelOracle(config)


REWARD_MODEL = OracleKind(make=_make, check=check_target)
