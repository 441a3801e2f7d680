"""A word-level tokenizer for the language of TinyWorld, saved like any other Hugging Face tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayalign.env.tinyworld.language import ATTRIBUTES, FILLERS, ITEMS

if TYPE_CHECKING:
    from rayalign.system.hf import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
CONTEXT = 128
"""Longest prompt plus response that the shipped models take; the longest that TinyWorld makes has 32 tokens."""


SPACE = "\u2581"
"""What a space looks like inside a token."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, which carries the space before it, so that `decode(encode(x)) == x`; no special token
    is added, and padding is on the left.

    The frame of a prompt costs little: `Report:`, `. Summary:` and a comma with its attribute are one token
    each, so that a report of k items has 2 k + 2 tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from rayalign.system.hf import PreTrainedTokenizerFast

    frame = [f"{SPACE}Report:", f".{SPACE}Summary:", *(f",{SPACE}{word}" for word in ATTRIBUTES)]
    spaced = [SPACE + word for word in (*ATTRIBUTES, *FILLERS, *ITEMS)]
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNK, *frame, *spaced])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    pieces = f"{SPACE}Report:|\\.{SPACE}Summary:|,?{SPACE}\\w+|[^\\w\\s]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(split=False), pre_tokenizers.Split(Regex(pieces), behavior="isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
