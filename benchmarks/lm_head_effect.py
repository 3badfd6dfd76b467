"""What a 16-bit head alone does to logprobs: |Δlogprob| of sampled tokens between it and the float32 head over one trunk.

    python benchmarks/lm_head_effect.py

Each family's small model (tests/families, with a vocabulary of 8,200) runs in transformers, in bfloat16, once with its own head
and once with the trainer's float32 head: the same hidden states, so the difference is the head's.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import transformers

from vllm_compat.trainer import fp32_lm_head

ROOT = Path(__file__).resolve().parents[1]
VOCAB, SEQUENCES, TOKENS = 8_200, 8, 128


def main() -> None:
    spec = importlib.util.spec_from_file_location("families", ROOT / "tests" / "families" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    families = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = families
    spec.loader.exec_module(families)
    print("| family | tokens | mean, nats | max, nats |\n| --- | --- | --- | --- |")
    for name in ("qwen3", "llama3", "mistral", "gemma2", "granite"):
        common = {**families.COMMON, "vocab_size": VOCAB}
        with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(families, VOCAB=VOCAB, COMMON=common):
            made = families.make(Path(folder) / name, name)
            model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16).eval()
        prompt = torch.randint(0, 298, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            rounded = model(prompt).logits.float().log_softmax(-1).flatten(0, 1)
            with fp32_lm_head(model):
                exact = model(prompt).logits.log_softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(exact.exp(), 1, generator=torch.Generator().manual_seed(1))
        gap = (rounded - exact).gather(-1, drawn).abs()
        print(f"| {name} | {gap.numel()} | {gap.mean():.2g} | {gap.max():.2g} |", flush=True)


if __name__ == "__main__":
    main()
