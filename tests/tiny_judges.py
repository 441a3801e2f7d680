"""Tiny sequence classifiers with weights drawn from a seed: everything but the size is as in a real reward model."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", "[CLS]", "[SEP]"]
TEMPLATE = (
    "<bos> {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(pad="<pad>", template=TEMPLATE, words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is None:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 7), ("[CLS]", 6))
    names = {"pad_token": pad} if pad else {}
    names |= {"sep_token": "[SEP]"} if template is None else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", cls_token="[CLS]", **names
    )
    fast.chat_template = template
    return fast


def save_llama(folder, pad="<pad>", num_labels=1, kind=LlamaForSequenceClassification, words=WORDS, **extra):
    """A decoder with a chat template."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pad, words=words)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.5, **extra}
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(words),
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_bert(folder, num_labels=1, words=WORDS):
    """An encoder without a chat template."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=num_labels,
        pad_token_id=0,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(template=None, words=words).save_pretrained(folder)
    return str(folder)
