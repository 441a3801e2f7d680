"""Prompts into the token ids that the policy reads: chat template, generation prompt, beginning-of-sequence.

Done once per prompt, by whoever owns the loop, so that engines, learner and ledger all see the same ids.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rayalign.errors import ConfigError, DataError
from rayalign.rollout.config import CHAT
from rayalign.types import Candidate, Prompt

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def load_tokenizer(policy_dir: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory. `DataError` that says what is missing if there is none."""
    path = Path(policy_dir)
    if not path.is_dir():
        raise DataError(f"policy={str(policy_dir)!r} is not a directory. Name a local Hugging Face model directory.")
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        raise DataError(
            f"policy={str(policy_dir)!r} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). "
            "Save one beside the weights with tokenizer.save_pretrained(directory)."
        )
    from rayalign.system.hf import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        raise DataError(f"policy={str(policy_dir)!r}: its tokenizer can't be read: {error}") from error


def eos_token_ids(policy_dir: str | Path, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a response: generation_config.json's (one or several), config.json's, the tokenizer's."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(policy_dir) / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            ids.update(found if isinstance(found, list) else [found])
            break  # generation_config.json knows better where both have one
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise DataError(
            f"policy={str(policy_dir)!r} names no end-of-sequence token, so no response would ever end. "
            "Set eos_token_id in generation_config.json."
        )
    return tuple(sorted(ids))


def context_length(policy_dir: str | Path) -> int | None:
    """Most tokens, prompt and response together, that the model has positions for; None if it does not say."""
    path = Path(policy_dir) / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    found = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return int(found) if found else None


def check_fits(prompt: Prompt, max_tokens: int, context: int | None) -> None:
    """`DataError` if an encoded prompt leaves no room in the context for `max_tokens` more, or was not encoded."""
    length = len(prompt.token_ids)
    if not length:
        raise DataError(f"prompt {prompt.id!r} has no token ids; encode it with PromptEncoder first.")
    if context is not None and length + max_tokens > context:
        raise DataError(
            f"prompt {prompt.id!r} has {length} tokens; with rollout.max_tokens={max_tokens} it exceeds the "
            f"{context} positions of the model. Shorten it, or lower rollout.max_tokens."
        )


class PromptEncoder:
    """Fills in `Prompt.token_ids` with the policy's tokenizer.

    A prompt with chat messages in `meta["messages"]` (role and content each) goes through the chat template;
    a plain one too, as a single user message, where `chat` is `always`, or `auto` and the tokenizer has one.
    """

    def __init__(self, policy_dir: str | Path, max_prompt_tokens: int = 1024, chat: str = "auto") -> None:
        if chat not in CHAT:
            raise ConfigError(f"rollout.chat={chat!r} must be one of {', '.join(CHAT)}.")
        self.policy_dir, self.max_prompt_tokens = Path(policy_dir), max_prompt_tokens
        self.tokenizer = load_tokenizer(policy_dir)
        self.has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if chat == "always" and not self.has_template:
            raise DataError(
                f"rollout.chat='always', but the tokenizer of policy={str(policy_dir)!r} has no chat template. "
                "Add chat_template.jinja to the directory, or set rollout.chat='auto' or 'never'."
            )
        self.chat = chat
        self.eos_ids = eos_token_ids(policy_dir, self.tokenizer)

    def encode(self, prompt: Prompt) -> Prompt:
        """The same prompt with its token ids; `DataError` if it is empty or longer than `max_prompt_tokens`."""
        ids = self._ids(prompt)
        if not ids:
            raise DataError(f"prompt {prompt.id!r} is empty after tokenisation; give it a text.")
        if len(ids) > self.max_prompt_tokens:
            raise DataError(
                f"prompt {prompt.id!r} has {len(ids)} tokens, more than rollout.max_prompt_tokens="
                f"{self.max_prompt_tokens}. Shorten or drop it, or raise the limit."
            )
        return dataclasses.replace(prompt, token_ids=tuple(ids))

    def encode_response(self, text: str) -> Candidate:
        """A given text as a finished candidate, end-of-sequence added. Its log-probabilities are not known: NaN."""
        ids = (*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id)
        return Candidate(
            text=text, token_ids=ids, logprobs=(math.nan,) * len(ids), policy_version=-1, finished=True, source="data"
        )

    def given_pair(self, prompt: Prompt) -> tuple[Candidate, Candidate]:
        """The prompt's own two responses; `DataError` if it has none."""
        if prompt.pair is None:
            raise DataError(
                f"prompt {prompt.id!r} has no pair of responses, and the agent works with given ones. Use an env whose "
                "prompts carry pairs (rayalign/Prompts-v0 with `pair` fields, rayalign/TinyWorld-v0), or another agent."
            )
        first, second = prompt.pair
        return self.encode_response(first), self.encode_response(second)

    def check(self, prompts: Iterable[Prompt], max_tokens: int = 0) -> None:
        """Encode all and keep nothing; `DataError` names the first that can't be used.

        With `max_tokens` the longest response must also fit into the model's context after each prompt.
        """
        context = context_length(self.policy_dir)
        for prompt in prompts:
            check_fits(self.encode(prompt), max_tokens, context)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        messages = prompt.meta.get("messages")
        if messages is not None and self.chat != "never":
            if not self.has_template:
                raise DataError(
                    f"prompt {prompt.id!r} has chat messages, but the tokenizer of policy={str(self.policy_dir)!r} has "
                    "no chat template. Add chat_template.jinja to the directory, or set rollout.chat='never' to send "
                    "the prompt's plain text."
                )
        elif self.has_template and self.chat != "never":
            messages = [{"role": "user", "content": prompt.text}]
        if messages is not None and self.chat != "never":
            # The template writes beginning-of-sequence itself; apply_chat_template adds no second one.
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        ids = self.tokenizer(prompt.text)["input_ids"]
        # Some tokenizers close every text with end-of-sequence; a prompt that is to be continued must stay open.
        while ids and ids[-1] == self.tokenizer.eos_token_id and not prompt.text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids
