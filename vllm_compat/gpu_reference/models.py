"""Models without a hub: seeded weights at real shapes, and a small language model trained on Python's own sources.

python -m vllm_compat.gpu_reference.models NAME FOLDER [--train-seconds S] [--device cuda|cpu]
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, as its config.json on the hub has it. ``tied``: the head is the embedding."""

    kind: str  # qwen2, qwen3, llama, mistral
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """How many, norms and biases left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def bytes_needed(self) -> int:
        """An estimate, of the device: the full float32 trainer's weights, which are the most, an eighth more, and 2 GiB."""
        return self.parameters * 4 * 9 // 8 + (2 << 30)


SHAPES = {
    "Qwen2.5-0.5B": Shape("qwen2", 151_936, 896, 4_864, 24, 14, 2, 64, tied=True),
    "Qwen2.5-7B": Shape("qwen2", 152_064, 3_584, 18_944, 28, 28, 4, 128),
    "Qwen3-0.6B": Shape("qwen3", 151_936, 1_024, 3_072, 28, 16, 8, 128, tied=True),
    "Qwen3-8B": Shape("qwen3", 151_936, 4_096, 12_288, 36, 32, 8, 128),
    "Llama-3.1-8B": Shape("llama", 128_256, 4_096, 14_336, 32, 32, 8, 128),
    "Mistral-7B": Shape("mistral", 32_768, 4_096, 14_336, 32, 32, 8, 128),
}
REHEARSED = {"tiny": Shape("qwen3", 512, 128, 256, 2, 4, 2, 32)}
LANGUAGE = {"cuda": Shape("llama", 512, 768, 2_048, 12, 12, 12, 64), "cpu": Shape("llama", 512, 64, 128, 2, 2, 2, 32)}
SHOWS = {
    "seeded": "seeded weights: rounding at this hidden size, vocabulary and depth. Not what a language model's distributions "
    "make of it: they are no language model's.",
    "language": "a small language model, trained on the spot on Python's own sources: a language model's distributions. Not a "
    "large model's depth, nor a large vocabulary.",
}
_CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}


def config(shape: Shape) -> dict[str, Any]:
    """What config.json holds; spelled so that transformers 4.51 (vLLM 0.8.5) to 5 read it."""
    return {
        "architectures": [_CLASSES[shape.kind]], "model_type": shape.kind, "vocab_size": shape.vocab,
        "hidden_size": shape.hidden, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "hidden_act": "silu", "max_position_embeddings": 2_048, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
        "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": shape.tied, "sliding_window": None,
        "bos_token_id": None, "eos_token_id": shape.vocab - 2, "pad_token_id": shape.vocab - 1, "torch_dtype": "bfloat16",
    }  # fmt: skip


def _describe(folder: Path, shape: Shape) -> None:
    """config.json, and a tokenizer of one token a byte with names up to the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"<t{i}>" for i in range(len(alphabet), shape.vocab - 2)), "<eos>", "<pad>"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>", "<pad>"])
    made.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>", "model_max_length": 2_048}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1), encoding="utf-8")


def _pieces(shape: Shape) -> Iterator[dict[str, tuple[tuple[int, ...], float]]]:
    """Layer by layer, parameter name -> (shape, standard deviation; 0: ones)."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        matrices: dict[str, tuple[int, int]] = {
            "self_attn.q_proj": (wide, shape.hidden), "self_attn.k_proj": (narrow, shape.hidden),
            "self_attn.v_proj": (narrow, shape.hidden), "self_attn.o_proj": (shape.hidden, wide),
            "mlp.gate_proj": (shape.inner, shape.hidden), "mlp.up_proj": (shape.inner, shape.hidden),
            "mlp.down_proj": (shape.hidden, shape.inner),
        }  # fmt: skip
        piece: dict[str, tuple[tuple[int, ...], float]] = {
            f"{at}{name}.weight": (size, size[1] ** -0.5) for name, size in matrices.items()
        }
        piece |= {f"{at}{name}_layernorm.weight": ((shape.hidden,), 0.0) for name in ("input", "post_attention")}
        if shape.kind == "qwen2":
            piece |= {f"{at}self_attn.{n}_proj.bias": ((s,), 0.1) for n, s in (("q", wide), ("k", narrow), ("v", narrow))}
        if shape.kind == "qwen3":
            piece |= {f"{at}self_attn.{n}_norm.weight": ((shape.head_dim,), 0.0) for n in ("q", "k")}
        yield piece
    head: tuple[tuple[int, ...], float] = (
        (shape.vocab, shape.hidden),
        3 * shape.hidden**-0.5,
    )  # logits with a standard deviation of 3
    ends: dict[str, tuple[tuple[int, ...], float]] = {
        "model.norm.weight": ((shape.hidden,), 0.0),
        "model.embed_tokens.weight": head if shape.tied else (head[0], 1.0),
    }
    yield ends if shape.tied else {**ends, "lm_head.weight": head}


def seeded(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write the model, one file of bfloat16 weights a layer, so that no more than a layer (or the ends) is in memory."""
    import torch
    from safetensors.torch import save_file

    random, total = torch.Generator().manual_seed(seed), 0
    places: dict[str, str] = {}
    count = shape.layers + 1
    for number, piece in enumerate(_pieces(shape), 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        made = {
            name: (torch.randn(size, generator=random).mul_(scale) if scale else torch.ones(size)).bfloat16()
            for name, (size, scale) in piece.items()
        }
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
        total += sum(tensor.numel() * 2 for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    _describe(folder, shape)


def trained(folder: Path, shape: Shape, seconds: float, device: str) -> tuple[float, float]:
    """Train on the bytes of the standard library for so many seconds; returns the first and the last loss (nats a byte)."""
    import torch
    import transformers

    _describe(folder, shape)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: None if device == "cuda" else 8]
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).float().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4 if device == "cuda" else 3e-3)
    rows, length = (32, 512) if device == "cuda" else (8, 64)
    ends = time.monotonic() + seconds
    losses: list[float] = []
    while not losses or time.monotonic() < ends:
        at = torch.randint(0, len(ids) - length, (rows,)).tolist()
        batch = torch.stack([ids[i : i + length] for i in at]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1), encoding="utf-8")
    return losses[0], losses[-1]


def main() -> int:
    """Make one model, in a folder beside its own that is renamed when it is whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train-seconds", type=float, default=240)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    part = args.folder.with_name(args.folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    if args.name == "language":
        first, last = trained(part, LANGUAGE[args.device], args.train_seconds, args.device)
        print(f"loss {first:.2f} -> {last:.2f} nats a byte")
    else:
        seeded(part, {**SHAPES, **REHEARSED}[args.name])
    part.rename(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
