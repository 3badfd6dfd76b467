"""Train the small model that reinforcement learning starts from, on demonstrations that slip, and write its folder.

    python examples/rl_parity/start_model.py FOLDER [--steps N]

A Qwen3 of half a million parameters, stored in bfloat16; about ten minutes on one core. The shipped folder ``model`` was made
by this command: another machine's rounding makes other weights, as good.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import task
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

CONFIG = {
    "vocab_size": task.VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": task.EOS,
    "pad_token_id": task.PAD,
}
RATE, WARM_UP, BATCH, SEED = 2e-3, 50, 64, 0


def batch(rng: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [size, longest] with padding, and the targets: -100 where nothing is to be learned."""
    rows = []
    for _ in range(size):
        one = task.problem(rng)
        rows.append((one.prompt, one.demonstration(rng)))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, targets = torch.full((size, longest), task.PAD), torch.full((size, longest), -100)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        targets[i, len(prompt) : end] = torch.tensor(answer)
    return tokens, targets


def train(steps: int) -> Qwen3ForCausalLM:
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        share = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        tokens, targets = batch(rng, BATCH)
        start = len(task.EXAMPLES)
        logits = model(tokens).logits[:, start:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, start + 1 :].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return model


def write(model: Qwen3ForCausalLM, folder: Path) -> None:
    """What vLLM 0.8.5 (transformers 4.51) and today's transformers both read."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **CONFIG, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args()
    write(train(given.steps), given.folder)
