"""Make the tiny model of the demo and the tests: seeded random weights, a byte-level tokenizer, nothing downloaded.

    python make_model.py DIR [--architecture qwen3|llama] [--tied] [--seed N] [--hidden N]

The vocabulary (300) is not a multiple of 64, so that the padding of vLLM's head is exercised; weights are stored in
bfloat16, so that a float32 and a bfloat16 run share them; the head is scaled so that distributions are peaked.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB, EOS, PAD = 300, 298, 299
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 32


def tokenizer(folder: Path) -> None:
    """One token per byte, named extras up to the vocabulary's size, and two specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"<t{i}>" for i in range(len(alphabet), EOS)), "<eos>", "<pad>"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>", "<pad>"])
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "chat_template": "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def config(architecture: str, tied: bool, hidden: int) -> dict[str, object]:
    """What config.json holds; spelled so that transformers 4.51 (vLLM 0.8.5) to 5 read it."""
    names = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    return {
        "architectures": [names[architecture]],
        "model_type": architecture,
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def weights(architecture: str, tied: bool, seed: int, hidden: int) -> dict[str, torch.Tensor]:
    """Parameter name -> bfloat16 tensor, from numpy's PCG64 stream of the seed."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape) * scale).to(torch.bfloat16)

    def near_one(size: int) -> torch.Tensor:
        return torch.from_numpy(1 + 0.1 * random.standard_normal(size)).to(torch.bfloat16)

    made = {"model.embed_tokens.weight": normal(VOCAB, hidden, scale=0.22 if tied else 1.0)}
    wide, narrow, inner = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, 2 * hidden
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", wide, hidden),
            ("self_attn.k_proj", narrow, hidden),
            ("self_attn.v_proj", narrow, hidden),
            ("self_attn.o_proj", hidden, wide),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            made[f"{at}{name}.weight"] = normal(rows, columns, scale=1.5 / columns**0.5)
        if architecture == "qwen3":
            made[f"{at}self_attn.q_norm.weight"] = near_one(HEAD_DIM)
            made[f"{at}self_attn.k_norm.weight"] = near_one(HEAD_DIM)
        made[f"{at}input_layernorm.weight"] = near_one(hidden)
        made[f"{at}post_attention_layernorm.weight"] = near_one(hidden)
    made["model.norm.weight"] = near_one(hidden)
    if not tied:
        made["lm_head.weight"] = normal(VOCAB, hidden, scale=2.5 / hidden**0.5)
    return made


def make(folder: Path, architecture: str = "qwen3", tied: bool = False, seed: int = 0, hidden: int = 128) -> Path:
    """Write a model folder that vLLM and transformers load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(architecture, tied, seed, hidden), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(architecture, tied, hidden), indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, "pad_token_id": PAD}) + "\n")
    tokenizer(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", choices=("qwen3", "llama"), default="qwen3")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=128)
    given = parser.parse_args()
    print(make(given.folder, given.architecture, given.tied, given.seed, given.hidden))
