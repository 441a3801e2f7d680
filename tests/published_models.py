"""The `config.json` of the recipes' models, of which memory is worked out: the fields that are published."""

import json

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3 = {
    **LLAMA,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
LLAMA_7B = {
    **LLAMA,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "float16",
}
PYTHIA = {"model_type": "gpt_neox", "max_position_embeddings": 2048, "rotary_pct": 0.25, "dtype": "float16"}
PYTHIA_2_8B = {
    **PYTHIA,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "vocab_size": 50304,
}
DEBERTA = {
    "model_type": "deberta-v2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 128100,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
SCALAR = {"id2label": {"0": "reward"}, "pad_token_id": 0}

CONFIGS = {
    "trl-lib/pythia-1b-deduped-tldr-sft": {
        **PYTHIA,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 50304,
    },
    "trl-lib/pythia-2.8b-deduped-tldr-sft": PYTHIA_2_8B,
    "trl-lib/pythia-6.9b-deduped-tldr-sft": {
        **PYTHIA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 16384,
        "vocab_size": 50432,
    },
    "EleutherAI/pythia-2.8b": PYTHIA_2_8B,
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
        "dtype": "float32",
    },
    "meta-llama/Meta-Llama-3-8B": LLAMA_3,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3,
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "huggyllama/llama-7b": {**LLAMA_7B, "max_position_embeddings": 2048},
    "HuggingFaceH4/mistral-7b-sft-beta": {
        **LLAMA_3,
        "model_type": "mistral",
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "google/gemma-2b": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 16384,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    },
    "Qwen/Qwen3-4B": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "microsoft/deberta-v3-large": DEBERTA,
    "OpenAssistant/reward-model-deberta-v3-large": {**DEBERTA, **SCALAR},
    "OpenAssistant/reward-model-deberta-v3-large-v2": {**DEBERTA, **SCALAR},
    "Skywork/Skywork-Reward-Llama-3.1-8B": {**LLAMA_3, **SCALAR, "max_position_embeddings": 131072},
    "RLHFlow/ArmoRM-Llama3-8B-v0.1": {**LLAMA_3, **SCALAR},  # and its small gating head
}
"""Name on the hub -> config."""

PARAMETERS = {
    "trl-lib/pythia-1b-deduped-tldr-sft": 1_011_781_632,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "trl-lib/pythia-6.9b-deduped-tldr-sft": 6_857_302_016,
    "openai-community/gpt2": 124_439_808,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "HuggingFaceH4/mistral-7b-sft-beta": 7_241_732_096,
    "google/gemma-2b": 2_506_172_416,
    "Qwen/Qwen3-4B": 4_022_468_096,
}
"""As they are published: a check of the fields above."""


def save_configs(folder):
    """Name on the hub -> a folder with that config alone, as `from_pretrained` reads it."""
    found = {}
    for name, config in CONFIGS.items():
        found[name] = folder / name.replace("/", "--")
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps(config))
    return {name: str(path) for name, path in found.items()}
