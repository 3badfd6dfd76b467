"""What a request's logprobs must be when the weights change inside it: computed with transformers and a KV cache."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def expected_logprobs(old: Path, new: Path, prompt: list[int], tokens: list[int], changed_at: int) -> list[float]:
    """Teacher-forced float32 logprobs at temperature 1 of every output token.

    The first ``changed_at`` tokens come from the old weights; the forward pass that yields token ``changed_at`` and all
    later ones run the new weights over the KV cache as the old ones left it.
    """
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (old, new)]
    cache, feed, found = None, torch.tensor([prompt]), []
    with torch.inference_mode():
        for step, token in enumerate(tokens):
            out = models[step >= changed_at](feed, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(float(out.logits[0, -1].float().log_softmax(-1)[token]))
            feed = torch.tensor([[token]])
    return found
