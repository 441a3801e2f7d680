"""What a frozen transformer makes of a response: the input of the reward posterior's heads.

    responses not in the cache -> sorted by length -> backbone (prompt read once for all its responses) -> pooled

A length is padded up to a multiple of `BUCKET`, a function of the response's own length and never of what else is
in the batch. On CPU the features of a response are then the same bits whatever it is computed with, so that a
replay after a crash, which sees only the duelling responses, makes the same posterior.

Shapes: P prompts    R rows (responses)    T tokens    D features.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayalign.errors import ConfigError, DataError, did_you_mean
from rayalign.types import Candidate, Prompt

POOLINGS = ("sum", "mean", "last", "cls")
BUCKET = 8


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which frozen transformer reads the responses, and how."""

    backbone: str = "policy"
    """`policy` is the frozen initial policy; else a Hugging Face directory or id of an encoder or a decoder."""
    layers: int = 0
    """Use the first so many layers of the backbone and leave out the rest, which saves their share of the time; 0 uses
    all."""
    pooling: str = "sum"
    """How the last hidden states of the response's tokens become one vector: sum, mean, last, or (encoders) cls."""
    dtype: str = "float32"
    """Weights and activations of the backbone: float32 or bfloat16; pooling is always in float32."""
    max_batch_tokens: int = 4096
    """Most tokens (padding and prompt counted) in one forward."""
    cache_responses: int = 20_000
    """Responses whose features are remembered, the latest; 0 remembers none."""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            hint = did_you_mean(self.pooling, POOLINGS)
            raise ConfigError(f"agent.features.pooling={self.pooling!r} is unknown. {hint}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"agent.features.dtype={self.dtype!r} must be 'float32' or 'bfloat16'.")
        if self.layers < 0:
            raise ConfigError(f"agent.features.layers={self.layers} must not be negative; 0 uses all layers.")
        if self.max_batch_tokens < 1:
            raise ConfigError(f"agent.features.max_batch_tokens={self.max_batch_tokens} must be at least 1.")
        if self.cache_responses < 0:
            raise ConfigError(f"agent.features.cache_responses={self.cache_responses} must not be negative.")


def pool(hidden_RTD: Tensor, mask_RT: Tensor, pooling: str) -> Tensor:
    """One float32 vector per row, `R x D`, of the positions where `mask_RT` is true, wherever the padding is.

    `cls` takes position 0 whatever the mask says. A row without any position is all zeros.

    >>> hidden = torch.tensor([[[9.0], [1.0], [3.0]]])  # the 9 is padding on the left
    >>> [pool(hidden, torch.tensor([[False, True, True]]), how).item() for how in ("sum", "mean", "last")]
    [4.0, 2.0, 3.0]
    """
    if pooling == "cls":
        return hidden_RTD[:, 0].float()
    kept_RTD = torch.where(mask_RT.unsqueeze(-1), hidden_RTD.float(), 0.0)  # padding may hold NaN: no product
    if pooling == "last":
        positions_T = torch.arange(1, mask_RT.shape[1] + 1, device=mask_RT.device)
        last_R = (mask_RT * positions_T).argmax(dim=1)
        return kept_RTD[torch.arange(len(kept_RTD), device=mask_RT.device), last_R]
    summed_RD = kept_RTD.sum(dim=1)
    return summed_RD if pooling == "sum" else summed_RD / mask_RT.sum(dim=1, keepdim=True).clamp_min(1)


class Features:
    """Features of responses under one frozen backbone; computed once per response, bounded memory."""

    def __init__(self, config: FeatureConfig, policy: Path, device: str = "cpu") -> None:
        self.config = config
        self.computed = 0
        """Responses that went through the backbone so far."""
        self._cache: OrderedDict[tuple[str, Any], Tensor] = OrderedDict()
        self._backbone = _load_backbone(config, Path(policy), device)
        self.dim: int = self._backbone.dim
        """Length of a feature vector."""

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Candidate]) -> Tensor:
        """`R x D` float32 on the agent's device: row i is `responses[i]` as an answer to `prompts[i]`."""
        keys = [(p.id, self._backbone.key(r)) for p, r in zip(prompts, responses, strict=True)]
        rows: dict[tuple[str, Any], Tensor] = {}
        missing: dict[tuple[str, Any], int] = {}
        for i, key in enumerate(keys):
            if key in self._cache:
                self._cache.move_to_end(key)
                rows[key] = self._cache[key]
            else:
                missing.setdefault(key, i)
        if missing:
            at = list(missing.values())
            with torch.inference_mode():
                new_RD = self._backbone.features([prompts[i] for i in at], [responses[i] for i in at])
            self.computed += len(at)
            rows |= dict(zip(missing, new_RD.clone().unbind(), strict=True))
            self._remember((key, rows[key].clone()) for key in missing)
        return (
            torch.stack([rows[key] for key in keys])
            if keys
            else torch.empty(0, self.dim, device=self._backbone.model.device)
        )

    def _remember(self, items: Iterable[tuple[tuple[str, Any], Tensor]]) -> None:
        self._cache.update(items)
        while len(self._cache) > self.config.cache_responses:
            self._cache.popitem(last=False)


class _Decoder:
    """A causal transformer. The prompt's keys and values are computed once and shared by its responses."""

    def __init__(self, model: Any, tokenizer: Any, config: FeatureConfig) -> None:
        if config.pooling == "cls":
            raise ConfigError(
                "agent.features.pooling='cls' needs an encoder: a decoder's first token has seen nothing of the rest. "
                "Use sum, mean or last."
            )
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.dim = int(model.config.get_text_config().hidden_size)
        self.shares_prompts = _has_plain_cache(model)

    def key(self, response: Candidate) -> Any:
        """What tells this response from others to the same prompt."""
        return response.token_ids if self.tokenizer is None else response.text

    def features(self, prompts: Sequence[Prompt], responses: Sequence[Candidate]) -> Tensor:
        """`R x D`, row by row."""
        prompt_ids = {prompt.id: self._prompt_ids(prompt) for prompt in prompts}
        rows_of: dict[str, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            rows_of[prompt.id].append(i)
        answers = [self._response_ids(response) for response in responses]
        features_RD = torch.zeros(len(responses), self.dim, device=self.model.device)
        read = self._shared if self.shares_prompts else self._whole
        for rows, values_RD in read(prompt_ids, rows_of, answers):
            features_RD[rows] = values_RD
        return features_RD

    def _prompt_ids(self, prompt: Prompt) -> Sequence[int]:
        ids = prompt.token_ids if self.tokenizer is None else _encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise DataError(f"prompt {prompt.id!r} has no token ids; encode it with the policy's tokenizer first.")
        return ids

    def _response_ids(self, response: Candidate) -> Sequence[int]:
        if self.tokenizer is not None:
            ids = self.tokenizer(response.text, add_special_tokens=False)["input_ids"]
            return [*ids, self.tokenizer.eos_token_id] if response.finished and self.tokenizer.eos_token_id else ids
        if response.text and not response.token_ids:
            raise DataError(
                f"response {response.text[:60]!r} (source {response.source!r}) has no token ids; "
                "encode it with the policy's tokenizer first."
            )
        return response.token_ids

    def _shared(
        self, prompt_ids: dict[str, Sequence[int]], rows_of: dict[str, list[int]], answers: list[Sequence[int]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        from rayalign.system.hf import DynamicCache

        for names, prompt_length in self._chunks(list(prompt_ids), lambda name: len(prompt_ids[name])):
            ids_PT, mask_PT = self._pad([prompt_ids[name] for name in names], prompt_length)
            prefill = self.model(input_ids=ids_PT, attention_mask=mask_PT.long(), use_cache=True).past_key_values
            owner = {row: p for p, name in enumerate(names) for row in rows_of[name]}
            for rows, length in self._chunks(list(owner), lambda row: len(answers[row]), extra=prompt_length):
                owner_R = torch.tensor([owner[row] for row in rows], device=ids_PT.device)
                cache = DynamicCache([(layer.keys[owner_R], layer.values[owner_R]) for layer in prefill.layers])
                ids_RT, mask_RT = self._pad([answers[row] for row in rows], length)
                prompt_mask_RT = mask_PT[owner_R]
                starts_R1 = prompt_mask_RT.sum(dim=1, keepdim=True)
                hidden_RTD = self.model(
                    input_ids=ids_RT,
                    attention_mask=torch.cat([prompt_mask_RT, mask_RT], dim=1).long(),
                    position_ids=starts_R1 + torch.arange(length, device=ids_RT.device),
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                yield rows, pool(hidden_RTD, mask_RT, self.config.pooling)

    def _whole(
        self, prompt_ids: dict[str, Sequence[int]], rows_of: dict[str, list[int]], answers: list[Sequence[int]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """For models whose cache is not plain keys and values (sliding windows, state spaces)."""
        prompt_of = {row: prompt_ids[name] for name, rows in rows_of.items() for row in rows}
        for rows, length in self._chunks(list(prompt_of), lambda row: len(prompt_of[row]) + len(answers[row])):
            ids_RT, mask_RT = self._pad([[*prompt_of[row], *answers[row]] for row in rows], length)
            hidden_RTD = self.model(input_ids=ids_RT, attention_mask=mask_RT.long(), use_cache=False).last_hidden_state
            starts_R1 = torch.tensor([[len(prompt_of[row])] for row in rows], device=ids_RT.device)
            is_response_RT = mask_RT & (torch.arange(length, device=ids_RT.device) >= starts_R1)
            yield rows, pool(hidden_RTD, is_response_RT, self.config.pooling)

    def _chunks(self, items: list[Any], length: Any, extra: int = 0) -> Iterator[tuple[list[Any], int]]:
        return _chunks(items, length, self.config.max_batch_tokens, extra)

    def _pad(self, sequences: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
        return _pad(sequences, length, self.model.device)


class _Encoder:
    """A bidirectional transformer that reads prompt and response as a pair of texts, with its own tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, config: FeatureConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.dim = int(model.config.hidden_size)
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        self.max_length = min(int(tokenizer.model_max_length), int(positions))

    def key(self, response: Candidate) -> Any:
        """What tells this response from others to the same prompt."""
        return response.text

    def features(self, prompts: Sequence[Prompt], responses: Sequence[Candidate]) -> Tensor:
        """`R x D`, row by row."""
        encoded = self.tokenizer(
            [prompt.text for prompt in prompts],
            [response.text for response in responses],
            truncation="longest_first",
            max_length=self.max_length,
        )
        ids, types = encoded["input_ids"], encoded.get("token_type_ids")
        is_response = [[part == 1 for part in encoded.sequence_ids(i)] for i in range(len(ids))]
        features_RD = torch.zeros(len(ids), self.dim, device=self.model.device)
        for rows, length in _chunks(list(range(len(ids))), lambda i: len(ids[i]), self.config.max_batch_tokens):
            length = min(length, self.max_length)  # a whole bucket may exceed the position table
            ids_RT, mask_RT = _pad([ids[i] for i in rows], length, self.model.device)
            more = {} if types is None else {"token_type_ids": _pad([types[i] for i in rows], length, ids_RT.device)[0]}
            hidden_RTD = self.model(input_ids=ids_RT, attention_mask=mask_RT.long(), **more).last_hidden_state
            is_response_RT, _ = _pad([is_response[i] for i in rows], length, ids_RT.device)
            features_RD[rows] = pool(hidden_RTD, is_response_RT.bool(), self.config.pooling)
        return features_RD


def _chunks(items: list[Any], length: Any, max_tokens: int, extra: int = 0) -> Iterator[tuple[list[Any], int]]:
    """Items of like length in chunks of at most `max_tokens`, with the padded length of each chunk, longest first."""
    buckets: dict[int, list[Any]] = defaultdict(list)
    for item in items:
        buckets[-(-max(1, length(item)) // BUCKET) * BUCKET].append(item)
    for padded, bucket in sorted(buckets.items(), reverse=True):  # what does not fit fails first
        size = max(1, max_tokens // (padded + extra))
        for start in range(0, len(bucket), size):
            yield bucket[start : start + size], padded


def _pad(sequences: Sequence[Sequence[int]], length: int, device: Any) -> tuple[Tensor, Tensor]:
    """Right-padded ids (0 where padded) and their mask, both `R x T`."""
    ids_RT = torch.zeros(len(sequences), length, dtype=torch.long)
    mask_RT = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids_RT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask_RT[row, : len(sequence)] = True
    return ids_RT.to(device), mask_RT.to(device)


def _encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [dict(m) for m in prompt.meta.get("messages", ())] or [{"role": "user", "content": prompt.text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(prompt.text)["input_ids"])


def _load_backbone(config: FeatureConfig, policy: Path, device: str) -> _Decoder | _Encoder:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    from rayalign.system.hf import AutoConfig, AutoModel, AutoTokenizer

    where = str(policy) if config.backbone == "policy" else config.backbone
    try:
        described = AutoConfig.from_pretrained(where)
        shortened = first_layers(described, config)
        with _quiet():  # that the head and the upper layers are left out is no news
            model, info = AutoModel.from_pretrained(
                where, config=shortened, dtype=getattr(torch, config.dtype), output_loading_info=True
            )
        if config.backbone != "policy":
            tokenizer = AutoTokenizer.from_pretrained(where)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"agent.features.backbone={config.backbone!r} can't be loaded from {where!r}: {error} "
            "Name a Hugging Face model directory with its tokenizer, or 'policy'."
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # what no pooling here reads
    if missing:
        raise DataError(
            f"agent.features.backbone={config.backbone!r} has no trained weights for {', '.join(missing[:3])}"
            f"{' and others' if missing[3:] else ''}: they would be random numbers. Name a model whose weights are "
            f"those of a {type(model).__name__}."
        )
    model = model.to(device).eval().requires_grad_(False)
    # BERT and its kin can be loaded as causal models too; what can't be loaded as a masked one is a decoder.
    if type(described) in MODEL_FOR_MASKED_LM_MAPPING or type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return _Encoder(model, AutoTokenizer.from_pretrained(where), config)
    same = config.backbone == "policy" or tokenizer.get_vocab() == AutoTokenizer.from_pretrained(policy).get_vocab()
    return _Decoder(model, None if same else tokenizer, config)


def first_layers(described: Any, config: FeatureConfig) -> Any:
    """The backbone's own config, with `config.layers` layers if it says so."""
    if not config.layers:
        return described
    text = described.get_text_config()
    if config.layers > text.num_hidden_layers:
        raise ConfigError(
            f"agent.features.layers={config.layers}, but the backbone {config.backbone!r} has {text.num_hidden_layers}"
            ". Ask for fewer; 0 uses all."
        )
    text.num_hidden_layers = config.layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[: config.layers]
    return described


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _has_plain_cache(model: Any) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config).layers
    plain = all(type(layer) is DynamicLayer for layer in layers)
    return plain and "position_ids" in inspect.signature(model.forward).parameters
