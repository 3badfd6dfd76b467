"""The V0 sampler as a formula: what a logprob of vLLM 0.8.5's V0 engine is.

Checked against the recorded V0 engine by the suite. Order (vllm 0.8.5, model_executor/layers/sampler.py):
logit_bias / allowed tokens / min_tokens, repetition penalty, frequency and presence penalties, temperature,
top-k, top-p, min-p, then log-softmax. A greedy row (temperature < 1e-5) stops after the penalties. A prompt row
gets no penalties and no logit_bias.

Needs torch; nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The sampling parameters that change a distribution, with vLLM's names and neutral defaults.

    ``top_k`` is off at 0 and below. ``forbidden`` are token ids at -inf (the complement of
    ``allowed_token_ids``, or stop tokens under ``min_tokens``).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    forbidden: Sequence[int] = ()


def processed_logprobs(
    logits: Any, setting: Setting, prompt: Sequence[int] = (), output: Sequence[int] = (), *, prompt_row: bool = False
) -> Any:
    """Logprobs of the distribution V0 sampled from.

    logits: torch.Tensor of shape [vocab], any float dtype, not changed. ``prompt`` and ``output`` are the token
    ids so far, for the penalties. Returns a float64 tensor of shape [vocab]; filtered tokens are -inf.
    """
    import torch

    row = logits.detach().to("cpu", torch.float64).clone()
    if not prompt_row:
        for token, bias in setting.logit_bias.items():
            row[token] += bias
        row[list(setting.forbidden)] = -torch.inf
        seen = torch.zeros_like(row, dtype=torch.bool)
        seen[[*prompt, *output]] = True
        penalty = setting.repetition_penalty
        row = torch.where(seen, torch.where(row > 0, row / penalty, row * penalty), row)
        counts = torch.zeros_like(row)
        for token in output:
            counts[token] += 1
        row = row - setting.frequency_penalty * counts - setting.presence_penalty * (counts > 0)
    if setting.temperature >= GREEDY_BELOW:
        row = row / setting.temperature
        if 0 < setting.top_k < len(row):
            row[row < row.topk(setting.top_k).values[-1]] = -torch.inf
        if setting.top_p < 1:
            values, order = row.sort()
            drop = values.softmax(0).cumsum(0) <= 1 - setting.top_p
            drop[-1] = False
            row[order[drop]] = -torch.inf
        if setting.min_p > 0:
            probs = row.softmax(0)
            row[probs < setting.min_p * probs.max()] = -torch.inf
    return row.log_softmax(0)


def sampled_token(logprobs: Any, generator: Any) -> int:
    """The token V0 drew for a seeded request: ``argmax(probs / q)`` (vllm 0.8.5, model_executor/layers/sampler.py).

    logprobs: torch.Tensor of shape [vocab], what `processed_logprobs` returns. ``generator``: the request's torch.Generator,
    seeded with ``SamplingParams.seed`` on the model's device; q is one float32 exponential from it for every token of the
    vocabulary, so each call moves it on by one step of the request. A greedy row draws nothing and does not come here.
    """
    import torch

    probs = logprobs.to(generator.device).exp().to(torch.float32)
    return int((probs / torch.empty_like(probs).exponential_(generator=generator)).argmax())
