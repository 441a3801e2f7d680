"""What scalar and pairwise reward models share: a Hugging Face sequence classifier, asked for the logits of token rows.

    texts -> rows of token ids -> sorted by length -> micro-batches -> padded -> logits, remembered by content

Padding rule: to the right, with the id that the model itself takes for padding. The logits of a row do not depend on
what it is batched with, and are what the model says of that row alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayalign.errors import ConfigError, DataError
from rayalign.rollout.weights import checksum
from rayalign.serve.config import OracleConfig

log = logging.getLogger(__name__)

Row = Mapping[str, list[int]]
"""Model inputs of one sequence: `input_ids`, and `token_type_ids` where the model has types. Not padded."""

MICRO_BATCH_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""On a CPU larger batches are slower: more padding, and activations that leave the caches."""
UNLIMITED = 1_000_000
"""Tokenizers that know no limit name a larger one than this."""


class Classifier:
    """The sequence classifier `config.target`, with its tokenizer. Raises `DataError` if it is not a trained one.

    Args:
        labels: how many labels the model may have.
        what: it is to be, in messages: `a scalar reward model`.
    """

    def __init__(self, config: OracleConfig, labels: Sequence[int], what: str) -> None:
        self.device = device_of(config.device)
        placed = placement(config, self.device)
        self.model, self.tokenizer = _load(config, placed, labels, what)
        self.model.eval()
        if "device_map" in placed:
            self.device = self.model.device  # that of its first layer, which is where inputs go
        else:
            self.model.to(self.device)
        self.name, self.version = model_name(config.target), version_name(self.model, config.quantization)
        limit = longest_input(self.model, self.tokenizer)
        self.max_tokens = min(config.max_tokens or limit, limit)
        self.token_types = getattr(self.model.config, "type_vocab_size", 0) > 0
        self.token_budget = config.micro_batch_tokens or MICRO_BATCH_TOKENS[self.device.type]
        self._own_pad: int | None = self.model.config.get_text_config().pad_token_id

    @property
    def reads(self) -> str:
        """What else its scores depend on, beside name and version: how texts are cut, and how it computes."""
        return f"{self.max_tokens} tokens, {self.model.dtype}"

    def logits(self, rows: Sequence[Row]) -> list[list[float]]:
        """Per row the logit of each label, in float32."""
        found: list[list[float]] = [[] for _ in rows]
        with torch.inference_mode():
            for indices in micro_batches([len(row["input_ids"]) for row in rows], self.token_budget):
                logits = self.model(**self._padded([rows[i] for i in indices])).logits
                for i, of_row in zip(indices, logits.float().reshape(len(indices), -1).tolist(), strict=True):
                    found[i] = of_row
        return found

    def _padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
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


class Truncations:
    """Counts what had to be cut, and says so: after 1, 2, 4, 8, ... times, often enough to be seen, never a flood."""

    def __init__(self, what: str, max_tokens: int) -> None:
        self.what, self.max_tokens, self.count = what, max_tokens, 0

    def add(self) -> None:
        """One more."""
        self.count += 1
        if self.count & (self.count - 1) == 0:
            log.warning("%d %s so far: more than %d tokens", self.count, self.what, self.max_tokens)


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


# -- loading --------------------------------------------------------------------------------------------------------
def _load(config: OracleConfig, placed: Mapping[str, Any], labels: Sequence[int], what: str) -> tuple[Any, Any]:
    from rayalign.system.hf import AutoModelForSequenceClassification, AutoTokenizer

    options = {"trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.target, **options)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            config.target, dtype=getattr(torch, config.dtype), output_loading_info=True, **placed, **options
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"oracle.target={config.target!r} can't be loaded as {what}: {' '.join(str(error).split())}"
        ) from error
    if info["missing_keys"]:
        raise DataError(
            f"oracle.target={config.target!r} is not {what.replace('a ', 'a trained ', 1)}: its weights lack "
            f"{', '.join(sorted(info['missing_keys'])[:3])}, which would be random numbers.{_foreign(model.config)}"
        )
    if model.config.num_labels not in labels:
        raise DataError(
            f"oracle.target={config.target!r} has {model.config.num_labels} labels; {what} has "
            f"{' or '.join(map(str, labels))} (num_labels in its config.json)."
        )
    return model, tokenizer


def _foreign(config: Any) -> str:
    """Names the class that a model was saved as, if transformers does not have it."""
    import transformers

    foreign = [name for name in config.architectures or () if not hasattr(transformers, name)]
    return f" It was saved as {foreign[0]}, which transformers does not have." if foreign else ""


def placement(config: OracleConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` needs to spread the model over a replica's GPUs, or to store it in fewer bits."""
    options: dict[str, Any] = {}
    if config.device == "auto" and device.type == "cuda" and config.gpus_per_replica > 1:
        options["device_map"] = "auto"  # whole layers, one GPU after the other
    if config.quantization:
        options |= _quantization(config)
        options.setdefault("device_map", {"": str(device)})
    return options


def _quantization(config: OracleConfig) -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"oracle.quantization={config.quantization!r} needs bitsandbytes: pip install 'rayalign[quantized]'."
        ) from error
    from rayalign.system.hf import BitsAndBytesConfig

    if config.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, config.dtype)
    )
    return {"quantization_config": four_bits}


def device_of(name: str) -> torch.device:
    """The device that `oracle.device` names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "oracle.device='cuda', but the replica sees no GPU. Set oracle.gpus_per_replica (a fraction shares one), "
            "or oracle.device=cpu."
        )
    return torch.device(name)


def longest_input(model: Any, tokenizer: Any) -> int:
    """Most tokens that both know how to take."""
    limits = [tokenizer.model_max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    known = [limit for limit in limits if limit and 0 < limit < UNLIMITED]
    return min(known, default=UNLIMITED)


def model_name(target: str) -> str:
    """The last name of a directory, or the id."""
    return Path(target).name if Path(target).is_dir() else target


def version_name(model: Any, quantization: str) -> str:
    """Its commit on the hub, or a checksum of its tensors; with how it is stored, since that changes what it says.

    Every tensor counts, some numbers of it: training moves them all, but may leave a head's bias where it was.
    """
    some = {name: tensor.detach().flatten()[:256] for name, tensor in model.named_parameters()}
    version = str(getattr(model.config, "_commit_hash", None) or checksum(some))[:12]
    return f"{version}:{quantization}" if quantization else version
