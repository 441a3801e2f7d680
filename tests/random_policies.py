"""Tiny Llamas of random weights with a word-level tokenizer, saved as Hugging Face directories."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from rayalign.rollout.weights import Weights, pack
from rayalign.types import Prompt

WORDS = 60
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def save_tokenizer(path: Path, template: bool = False, affix: bool = False) -> None:
    """`<pad> <eos> <bos> <end>` and the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<end>", "<unk>", "user", "assistant"])}
    vocab |= {f"w{i}": len(vocab) + i for i in range(WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if affix:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)


def save_policy(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 2,
    kv_heads: int = 1,
    eos: int | list[int] = 1,
    scale: float = 4.0,
    dtype: torch.dtype = torch.float32,
    template: bool = False,
    affix: bool = False,
    tie: bool = True,
) -> Path:
    """Heads of 64 (vLLM's CPU attention needs a multiple of 32); `scale` makes the distributions peaked."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS + 7,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0, bos_token_id=2)
    model.to(dtype).save_pretrained(path)
    save_tokenizer(path, template=template, affix=affix)
    return path


def random_prompts(count: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[Prompt]:
    rng = random.Random(seed)
    return [
        Prompt(
            id=f"p{i}", text="", token_ids=tuple(rng.randrange(7, WORDS) for _ in range(rng.randint(shortest, longest)))
        )
        for i in range(count)
    ]


def changed_weights(path: Path, version: int, seed: int = 7) -> Weights:
    """The policy's weights with noise of their own size added."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (tensor.float() + tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        if tensor.ndim > 1
        else tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    return pack(version, state)
