"""A ledger's preferences as other trainers read them: in the format, and with the spaces, that the policy needs.

conversational   where plain prompts reach the policy through its chat template
standard         elsewhere; readers join `prompt` and `chosen` to one text and tokenise that. A tokenizer whose decoding
                 drops the space in front of a word (word-level, SentencePiece) gets it back here, or the first word of
                 every response would become another token than the one that was sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayalign.ledger.ledger import Ledger
from rayalign.ledger.preference_table import Between
from rayalign.rollout.encode import load_tokenizer


def export_preferences(
    ledger: str | Path,
    folder: str | Path,
    policy_dir: str | Path,
    chat: str,
    *,
    batches: int | None = None,
    synthetic: bool = True,
) -> bool:
    """Write a dataset into `folder` for trainers of the policy; returns whether it is conversational.

    `chat` is `rollout.chat`: always, never, or auto, which asks whether the tokenizer has a template. `batches` and
    `synthetic` say which rows, as `Ledger.labelled_rows` has it.
    """
    tokenizer = load_tokenizer(policy_dir)
    conversational = chat == "always" or (chat == "auto" and bool(getattr(tokenizer, "chat_template", None)))
    with Ledger(ledger, read_only=True) as opened:
        opened.export(folder, conversational, space_between(tokenizer), batches=batches, synthetic=synthetic)
    return conversational


def space_between(tokenizer: Any) -> Between:
    """A space where the tokens of prompt and response, decoded together, have one that the response's text lacks."""

    def decode(ids: Sequence[Sequence[int]]) -> list[str]:
        return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def between(
        prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], texts: Sequence[str]
    ) -> list[str]:
        ends = [ids[-1:] for ids in prompts]
        alone = decode(ends)
        together = decode([[*end, *response] for end, response in zip(ends, responses, strict=True)])
        rows = zip(alone, together, texts, strict=True)
        return [" " if whole == f"{end} {text}" else "" for end, whole, text in rows]

    return between
