"""`rayalign/Prompts-v0`: your own prompts. Nobody knows the truth here, so a run needs an oracle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rayalign.env.prompt_data import Columns, check_source, load_prompts
from rayalign.env.world import World
from rayalign.errors import ConfigError, DataError
from rayalign.types import Prompt


class Prompts(World):
    """Prompts from JSONL, Parquet or a Hugging Face dataset, with what else the rows have.

    path       a *.jsonl file, a *.parquet file or folder of them, a saved dataset's folder, the name of a dataset, or a
               `datasets.Dataset`. See `prompt_data.Columns` for the columns.
    heldout    share of the prompts that is kept for evaluation (by a hash of seed and prompt, so that more data moves
               few prompts across), or another source of that kind. 0 keeps none.
    seed       of the split and of the order, which is a new one each epoch.

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
        self.path, self.heldout_path, self.seed, self.split = path, heldout if self.share is None else None, seed, split
        self.columns = Columns(
            prompt=prompt_column,
            reference=reference_column,
            responses=responses_column,
            chosen=chosen_column,
            rejected=rejected_column,
        )
        for source in (self.path, self.heldout_path):
            if source is not None:
                check_source(source, self.columns, split)
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
        """Training and held-out prompts, each prompt once."""
        every = _once(load_prompts(self.path, self.columns, self.split))
        if self.heldout_path is not None:
            heldout = list(_once(load_prompts(self.heldout_path, self.columns, self.split)).values())
        else:
            by_hash = sorted(every.values(), key=self._hash)
            wanted = round(self.share * len(every)) if self.share else 0
            heldout = by_hash[: max(wanted, 1 if self.share else 0)]
        kept_apart = {prompt.id for prompt in heldout}
        training = [prompt for prompt in every.values() if prompt.id not in kept_apart]
        if not training:
            raise DataError(
                f"env.path={self.path!r:.200} has no training prompt left: {len(every)} different prompts, all of them "
                "held out. Add prompts, set env.heldout=0, or hold out others."
            )
        return training, heldout

    def _hash(self, prompt: Prompt) -> bytes:
        return hashlib.blake2b(f"{self.seed}:{prompt.id}".encode(), digest_size=8).digest()


def _once(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    """Prompts by id; of several with the same content the first."""
    every: dict[str, Prompt] = {}
    for prompt in prompts:
        every.setdefault(prompt.id, prompt)
    return every
