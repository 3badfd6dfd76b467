"""Rollouts against a trainer that shares every kernel: the same engine, scoring the same tokens as prompts.

python -m vllm_compat.gpu_reference.invariance MODEL OUT [--exact] [--engine-args JSON]

Prefill instead of decode, and another batch: under VLLM_BATCH_INVARIANT=1 (CUDA, vLLM 0.19.0 on) neither may move a bit, so the
KL is to be exactly 0 (``--exact``), as vLLM's blog reports of TorchTitan with vLLM's kernels (2025-11-10). Without it, what
remains is the floor of this engine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEQUENCES, TOKENS = 32, 96


def compared(rollout: Sequence[float], scored: Sequence[float]) -> dict[str, float]:
    """Of the same tokens' logprobs, in nats: share that differs in any bit, the largest difference, k1 and k3 of
    KL(rollout ‖ scored) (J. Schulman, "Approximating KL Divergence", 2020). Exactly 0 where nothing differs."""
    import math

    deltas = [b - a for a, b in zip(rollout, scored, strict=True)]
    count = len(deltas)
    return {
        "share that differs": sum(delta != 0 for delta in deltas) / count,
        "largest difference": max(abs(delta) for delta in deltas),
        "k1": -math.fsum(deltas) / count + 0.0,
        "k3": math.fsum(math.expm1(delta) - delta for delta in deltas) / count,
    }


def _sampled(outputs: Any) -> list[tuple[list[int], list[int], list[float]]]:
    """(prompt, tokens, their logprobs) of each request."""
    rows = []
    for output in outputs:
        one = output.outputs[0]
        logprobs = [row[token].logprob for token, row in zip(one.token_ids, one.logprobs, strict=True)]
        rows.append((list(output.prompt_token_ids), list(one.token_ids), logprobs))
    return rows


def _scored(outputs: Any, prompts: int) -> list[float]:
    """Logprobs of the tokens after the first ``prompts`` of each prompt."""
    found = []
    for output in outputs:
        rows = zip(output.prompt_token_ids[prompts:], output.prompt_logprobs[prompts:], strict=True)
        found += [row[token].logprob for token, row in rows]
    return found


def main() -> int:
    """Exit code 1 where a bit differs that was to be exact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path, help="a folder for report.json")
    parser.add_argument("--exact", action="store_true", help="every figure has to be 0")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="JSON")
    args = parser.parse_args()
    import torch
    from vllm import LLM, SamplingParams

    from vllm_compat import status

    llm = LLM(**{"model": str(args.model), "dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, **args.engine_args})
    length = 16
    prompts: list[Any] = [{"prompt_token_ids": [(7 * i + 3 * k) % 256 for k in range(length)]} for i in range(SEQUENCES)]
    params = SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    rows = _sampled(llm.generate(prompts, params, use_tqdm=False))
    rollout = [logprob for _, _, logprobs in rows for logprob in logprobs]
    whole: list[Any] = [{"prompt_token_ids": [*prompt, *tokens]} for prompt, tokens, _ in rows]
    ask = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0)
    together = _scored(llm.generate(whole, ask, use_tqdm=False), length)
    alone = [logprob for one in whole for logprob in _scored(llm.generate([one], ask, use_tqdm=False), length)]
    ways = {"scored in a batch": together, "scored one at a time": alone}
    bands = [
        {"metric": f"{way}: {name}", "value": value, "limit": 0.0 if args.exact else None, "held": value == 0 or not args.exact}
        for way, scored in ways.items()
        for name, value in compared(rollout, scored).items()
    ]
    made_by = {"device": "cuda" if torch.cuda.is_available() else "cpu", "proven": status(llm).proven}
    args.out.mkdir(parents=True, exist_ok=True)
    found = {"bands": bands, "tokens": len(rollout), "found": {"made_by": made_by}}
    (args.out / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    for band in bands:
        print(f"{band['metric']}: {band['value']:.3g}, of {len(rollout)} tokens")
    return int(not all(band["held"] for band in bands))


if __name__ == "__main__":
    sys.exit(main())
