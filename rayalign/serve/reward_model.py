"""A scalar reward model as an oracle: any Hugging Face sequence-classification model with one label.

    prompt + response -> chat template -> cut from the left of the prompt -> sorted by length -> micro-batches -> score

Truncation rule: what is too long loses the beginning of its prompt (a begin-of-sequence token stays), never a token
of the response. A response that leaves no room for its prompt is a failed verdict, which is not charged.

Padding rule: to the right, with the id that the model itself takes for padding. The score of a response does not
depend on what it is batched with, and is what the model says of that sequence alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayalign.env.labels import Oracle
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError, OracleError
from rayalign.rollout.weights import checksum
from rayalign.serve.config import OracleConfig
from rayalign.serve.kinds import OracleKind, check_target
from rayalign.serve.oracles import sigmoid
from rayalign.types import Duel, Prompt, Verdict

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""On a CPU larger batches are slower: more padding, and activations that leave the caches."""
UNLIMITED = 1_000_000
"""Tokenizers that know no limit name a larger one than this."""


class RewardModelOracle:
    """`P(first wins) = sigmoid(scale * (r(x, first) - r(x, second)))` with a model's reward `r`."""

    def __init__(self, config: OracleConfig) -> None:
        self.config = config
        self.device = _device(config.device)
        self.model, self.tokenizer = _load(config)
        self.model.to(self.device).eval()
        self.name, self.version = _name(config.target), _version(self.model)
        limit = _limit(self.model, self.tokenizer)
        types = getattr(self.model.config, "type_vocab_size", 0) > 0
        self.encoder = Encoder(self.tokenizer, min(config.max_tokens or limit, limit), types)
        self.token_budget = config.micro_batch_tokens or MICRO_BATCH_TOKENS[self.device.type]
        self._own_pad: int | None = self.model.config.get_text_config().pad_token_id
        self._cache: OrderedDict[bytes, float] = OrderedDict()

    @property
    def id(self) -> str:
        """`reward_model:`, the model's name, and its commit on the hub or a checksum of its head."""
        return f"reward_model:{self.name}@{self.version}"

    @property
    def truncated(self) -> int:
        """Responses so far that were scored without the beginning of their prompt."""
        return self.encoder.truncated

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
        keys = [_key(prompt, response) for prompt, response in pairs]
        known: dict[bytes, float | None] = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
        rows = self.encoder.encode(list(new.values()))
        fitting = {key: row for key, row in zip(new, rows, strict=True) if row is not None}
        known |= dict.fromkeys(new)
        known |= dict(zip(fitting, self._forward(list(fitting.values())), strict=True))
        self._remember(known)
        return [known[key] for key in keys]

    def _forward(self, rows: Sequence[Mapping[str, list[int]]]) -> list[float]:
        scores = [math.nan] * len(rows)
        with torch.inference_mode():
            for indices in micro_batches([len(row["input_ids"]) for row in rows], self.token_budget):
                inputs = self._padded([rows[i] for i in indices])
                logits = self.model(**inputs).logits
                for i, score in zip(indices, logits.float().reshape(-1).tolist(), strict=True):
                    scores[i] = score
        return scores

    def _padded(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        """Model inputs of the rows, padded to the right; also tells the model which id is padding.

        Models of the Llama kind score the last token that is not the padding id. A model that names no such id
        scores the last token of a single sequence, whatever it is: so it gets an id which ends no row of this batch.
        """
        pad = self._own_pad
        if pad is None:
            ends = {row["input_ids"][-1] for row in rows}
            pad = next(i for i in range(len(ends) + 1) if i not in ends)
            self.model.config.get_text_config().pad_token_id = pad
        length = max(len(row["input_ids"]) for row in rows)
        inputs = {
            name: torch.tensor(
                [row[name] + [pad if name == "input_ids" else 0] * (length - len(row[name])) for row in rows]
            )
            for name in rows[0]
        }
        inputs["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        )
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _remember(self, scores: Mapping[bytes, float | None]) -> None:
        for key, score in scores.items():
            if score is not None and math.isfinite(score):
                self._cache[key] = score
                self._cache.move_to_end(key)
        while len(self._cache) > self.config.cache_size:
            self._cache.popitem(last=False)


class Encoder:
    """Turns (prompt, response) into token ids of at most `max_tokens`.

    With a chat template: `prompt.meta["messages"]` (or the prompt's text as the user's turn) and the response as the
    assistant's turn. Without one: the prompt's text and the response as the tokenizer's own kind of pair, which for
    most decoders is plain concatenation and for encoders puts a separator between them.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, token_types: bool = False) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.truncated = 0
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
        self._count()
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
        self._count()
        self.tokenizer.truncation_side = "left"
        row = self.tokenizer(
            prompt, response, truncation="only_first", max_length=self.max_tokens, return_token_type_ids=True
        )
        return {name: row[name] for name in self._names}

    def _count(self) -> None:
        self.truncated += 1
        if self.truncated & (self.truncated - 1) == 0:  # 1, 2, 4, 8, ...: often enough to be seen, never a flood
            log.warning(
                "%d responses so far were scored without the beginning of their prompt: more than %d tokens",
                self.truncated,
                self.max_tokens,
            )


def micro_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, in groups of at most `token_budget` tokens with padding; at least one row each.

    >>> list(micro_batches([5, 1, 2, 9], token_budget=10))
    [[1, 2], [0], [3]]
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[i] > token_budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _messages(prompt: Prompt) -> Sequence[Mapping[str, str]]:
    return prompt.meta.get("messages") or [{"role": "user", "content": prompt.text}]


def _key(prompt: Prompt, response: str) -> bytes:
    return hashlib.blake2b(repr((_messages(prompt), response)).encode(), digest_size=16).digest()


# -- loading --------------------------------------------------------------------------------------------------------
def _load(config: OracleConfig) -> tuple[Any, Any]:
    from rayalign.hf import AutoModelForSequenceClassification, AutoTokenizer

    options = {"trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.target, **options)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.target, dtype=getattr(torch, config.dtype), output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"oracle.target={config.target!r} can't be loaded as a reward model: {' '.join(str(error).split())}"
        ) from error
    if info["missing_keys"]:
        raise DataError(
            f"oracle.target={config.target!r} is not a trained reward model: its weights lack "
            f"{', '.join(sorted(info['missing_keys'])[:3])}, which would be random numbers."
        )
    if model.config.num_labels != 1:
        raise DataError(
            f"oracle.target={config.target!r} has {model.config.num_labels} labels; a scalar reward model has 1 "
            "(num_labels in its config.json)."
        )
    return model, tokenizer


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "oracle.device='cuda', but the replica sees no GPU. Set oracle.gpus_per_replica (a fraction shares one), "
            "or oracle.device=cpu."
        )
    return torch.device(name)


def _limit(model: Any, tokenizer: Any) -> int:
    limits = [tokenizer.model_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    known = [limit for limit in limits if limit and 0 < limit < UNLIMITED]
    return min(known, default=UNLIMITED)


def _name(target: str) -> str:
    return Path(target).name if Path(target).is_dir() else target


def _version(model: Any) -> str:
    commit = getattr(model.config, "_commit_hash", None)
    name, parameter = list(model.named_parameters())[-1]
    return commit[:12] if commit else checksum({name: parameter})[:12]


def _make(config: OracleConfig, world: World | None) -> Oracle:
    return RewardModelOracle(config)


REWARD_MODEL = OracleKind(make=_make, check=check_target)
