"""A tiny random policy, encoder and foreign decoder as Hugging Face directories, and duels over a few words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rayalign.types import Candidate, Duel, LabelSource, Preference, Prompt

WORDS = [f"w{i}" for i in range(40)]


def save_tokenizer(path: Path, words: Sequence[str] = WORDS, pair: bool = False) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "[CLS]", "[SEP]", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(path)


def save_llama(path: Path, seed: int, words: Sequence[str] = WORDS) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=5 + len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    save_tokenizer(path, words)
    return path


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("policy"), seed=0)


@pytest.fixture(scope="session")
def same_words_decoder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("same-words"), seed=1)


@pytest.fixture(scope="session")
def other_words_decoder(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("other-words"), seed=2, words=WORDS[::-1])


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(3)
    BertModel(
        BertConfig(
            vocab_size=5 + len(WORDS),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=40,
        )
    ).save_pretrained(path)
    save_tokenizer(path, pair=True)
    return path


def token_ids(text: str) -> tuple[int, ...]:
    return tuple(5 + WORDS.index(word) for word in text.split())


def make_prompt(number: int, length: int = 4) -> Prompt:
    text = " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(length))
    return Prompt(id=f"prompt-{number}", text=text, token_ids=token_ids(text))


def make_response(*numbers: int) -> Candidate:
    text = " ".join(WORDS[n % len(WORDS)] for n in numbers)
    ids = (*token_ids(text), 1)
    return Candidate(text=text, token_ids=ids, logprobs=(-1.0,) * len(ids), policy_version=0)


def make_preference(
    prompt: Prompt,
    first: Candidate,
    second: Candidate,
    label: float = 1.0,
    batch: int = 0,
    source: LabelSource = LabelSource.ORACLE,
) -> Preference:
    duel = Duel(
        id=Duel.make_id("test", batch, 0, prompt, first, second), batch=batch, prompt=prompt, first=first, second=second
    )
    return Preference(duel=duel, label=label, source=source)


class Toolbox:
    """What the tests of this folder share, reachable under importlib mode."""

    prompt = staticmethod(make_prompt)
    response = staticmethod(make_response)
    preference = staticmethod(make_preference)
    token_ids = staticmethod(token_ids)
    words = WORDS


@pytest.fixture(scope="session")
def box() -> type[Toolbox]:
    return Toolbox
