"""`rayalign/Prompts-v0`: your own prompts. Nobody knows the truth here, so a run needs an oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from rayalign.env.formats import find_format
from rayalign.env.prompt_data import Columns, Source, check_source, load_prompts
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError
from rayalign.types import Prompt


class Prompts(World):
    """Prompts from JSON, CSV, Parquet or a Hugging Face dataset, with what else the rows have.

    path       a *.jsonl, *.json or *.csv file, a *.parquet file or folder of them, a saved dataset's folder, the name
               of a dataset, or a `datasets.Dataset`. See `prompt_data.Columns` for the columns.
    heldout    share of the prompts that is kept for evaluation (by a hash of seed and prompt, so that more data moves
               few prompts across), or another source of that kind. 0 keeps none.
    seed       of the split and of the order, which is a new one each epoch.
    split, heldout_split, revision    of datasets: with heldout_split, held-out prompts are that split of `heldout` if
               it names a source, and else of `path`; split and revision are also those of `heldout`.
    format     name of a well-known dataset whose rows are read in their own way (`env.formats`); empty: rows have the
               columns named here.
    limit      most training prompts, the first of the data; 0 takes all.
    every_pair    a prompt that comes with several pairs of responses is a training prompt with each of them; else with
               its first alone.
    tokenizer, max_prompt_tokens, max_row_tokens    of all prompts, leave out those with more tokens of that tokenizer
               (a directory or an id), alone or together with their longer given response; 0 leaves none out.

    Training prompts with the content of a held-out one are left out, and so are repetitions. The data is checked at
    once and read, through Ray Data, when the first prompt is asked for.
    """

    id = "rayalign/Prompts-v0"

    def __init__(
        self,
        path: Any = None,
        heldout: Any = 0.1,
        seed: int = 0,
        split: str = "train",
        heldout_split: str = "",
        revision: str = "",
        format: str = "",
        limit: int = 0,
        every_pair: bool = False,
        tokenizer: str = "",
        max_prompt_tokens: int = 0,
        max_row_tokens: int = 0,
        prompt_column: str = "prompt",
        reference_column: str = "reference",
        responses_column: str = "responses",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
    ) -> None:
        if path is None or path == "":
            raise ConfigError("env.path is not set: rayalign/Prompts-v0 needs a file, folder or dataset with prompts.")
        self.share = float(heldout) if isinstance(heldout, int | float) else None
        if self.share is not None and not 0 <= self.share < 1:
            raise ConfigError(f"env.heldout={heldout} must be a share in [0, 1), or a file of prompts.")
        limits = {"limit": limit, "max_prompt_tokens": max_prompt_tokens, "max_row_tokens": max_row_tokens}
        for name, value in limits.items():
            if value < 0:
                raise ConfigError(f"env.{name}={value} must not be negative; 0 leaves nothing out.")
        if (max_prompt_tokens or max_row_tokens) and not tokenizer:
            raise ConfigError(
                "env.max_prompt_tokens and env.max_row_tokens count tokens of env.tokenizer, which is not set; name a "
                "Hugging Face directory or id, e.g. that of the policy."
            )
        columns = Columns(
            prompt=prompt_column,
            reference=reference_column,
            responses=responses_column,
            chosen=chosen_column,
            rejected=rejected_column,
        )
        if format and columns != Columns():
            raise ConfigError(f"env.format={format!r} knows its columns: leave out the settings env.*_column.")
        self.source = Source(path=path, columns=columns, split=split, revision=revision, format=find_format(format))
        self.heldout_source: Source | None = None
        if self.share is None or heldout_split:
            where = path if self.share is not None else heldout
            self.heldout_source = replace(self.source, path=where, split=heldout_split or split)
        for source in (self.source, self.heldout_source):
            if source is not None:
                check_source(source)
        self.seed, self.limit, self.every_pair = seed, limit, every_pair
        self.tokenizer, self.max_prompt_tokens, self.max_row_tokens = tokenizer, max_prompt_tokens, max_row_tokens
        self._epoch: tuple[int, np.ndarray] | None = None

    # -- prompts ------------------------------------------------------------------------------------------------
    def prompt(self, index: int) -> Prompt:
        """Training prompt number `index`: all of them once, in an order of the epoch's own, and again."""
        training = self._parts[0]
        epoch, place = divmod(index, len(training))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(training))
        return training[int(self._epoch[1][place])]

    def heldout(self, n: int) -> Sequence[Prompt]:
        """The first `n` held-out prompts; fewer if there are not as many."""
        return self._parts[1][:n]

    def check_prompts(self) -> Sequence[Prompt]:
        """All training prompts."""
        return self._parts[0]

    @cached_property
    def _parts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Training prompts, and held-out ones, each content once."""
        rows = self._short_enough(load_prompts(self.source))
        if self.heldout_source is not None:
            heldout = list(_once(self._short_enough(load_prompts(self.heldout_source))).values())
        else:
            by_hash = sorted(_once(rows).values(), key=self._hash)
            wanted = round(self.share * len(by_hash)) if self.share else 0
            heldout = by_hash[: max(wanted, 1 if self.share else 0)]
        kept_apart = {prompt.id for prompt in heldout}
        training = [prompt for prompt in rows if prompt.id not in kept_apart]
        training = list((_once_a_pair if self.every_pair else _once)(training).values())
        if not training:
            raise DataError(
                f"env.path={self.source.path!r:.200} has no training prompt left: {len(_once(rows))} different prompts "
                "that are short enough, all of them held out. Add prompts, set env.heldout=0, or hold out others."
            )
        return training[: self.limit or None], heldout

    def _short_enough(self, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts within `max_prompt_tokens` and `max_row_tokens`."""
        if not (self.max_prompt_tokens or self.max_row_tokens):
            return prompts
        count = _counter(self.tokenizer)
        lengths = count([prompt.text for prompt in prompts])
        first, second = (count([(prompt.pair or ("", ""))[side] for prompt in prompts]) for side in (0, 1))
        most_alone, most = (limit or float("inf") for limit in (self.max_prompt_tokens, self.max_row_tokens))
        return [
            prompt
            for prompt, alone, one, two in zip(prompts, lengths, first, second, strict=True)
            if alone <= most_alone and alone + max(one, two) <= most
        ]

    def _hash(self, prompt: Prompt) -> bytes:
        return hashlib.blake2b(f"{self.seed}:{prompt.id}".encode(), digest_size=8).digest()


def _once(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    """Prompts by id; of several with the same content the first."""
    every: dict[str, Prompt] = {}
    for prompt in prompts:
        every.setdefault(prompt.id, prompt)
    return every


def _once_a_pair(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    """Prompts by an id of content and pair."""
    every: dict[str, Prompt] = {}
    for prompt in prompts:
        pair = hashlib.blake2b(repr(prompt.pair).encode("utf-8", "replace"), digest_size=4).hexdigest()
        name = f"{prompt.id}-{pair}"
        every.setdefault(name, replace(prompt, id=name))
    return every


def _counter(tokenizer: str) -> Callable[[list[str]], list[int]]:
    """Tokens of each text, without special ones."""
    from rayalign.system.hf import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise DataError(
            f"env.tokenizer={tokenizer!r} can't be loaded: {error} Name a Hugging Face directory or id, or set "
            "env.max_prompt_tokens=0 and env.max_row_tokens=0."
        ) from error
    return lambda texts: [len(ids) for ids in loaded(texts, add_special_tokens=False)["input_ids"]]
