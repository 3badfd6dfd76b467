"""Seeded requests on any release, and what V0's rule makes of the distributions they were drawn from.

Runs in the process of the engine: torch's numbers for a seed differ between its releases, so the rule has to be computed by
the torch that the engine runs.
"""

import torch
from vllm import SamplingParams

from vllm_compat.v0_formula import sampled_token

VOCAB = 300  # of the shipped model
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 20},
    {"temperature": 1.3, "min_p": 0.02},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "min_p": 0.05, "repetition_penalty": 1.2},
]


def requests(tokens: int, prompt: int = 5) -> list[tuple[list[int], dict]]:
    """Two seeded requests a setting: (prompt ids, arguments of SamplingParams). Logprobs of the whole vocabulary."""
    made = []
    for i, given in enumerate(SETTINGS + SETTINGS):
        ids = [(7 * i + 3 * j) % 280 for j in range(prompt)]
        made.append((ids, {**given, "seed": 100 + i, "max_tokens": tokens, "ignore_eos": True, "logprobs": VOCAB}))
    return made


def neighbors(tokens: int) -> list[tuple[list[int], dict]]:
    """A greedy request with a seed and two without one."""
    return [([5, 6, 7 + i], {"max_tokens": tokens, "ignore_eos": True, **more}) for i, more in enumerate(
        [{"temperature": 0.0, "seed": 1}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])]  # fmt: skip


def generate(llm, asked: list[tuple[list[int], dict]]) -> list:
    """All in one call."""
    prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
    return llm.generate(prompts, [SamplingParams(**given) for _, given in asked], use_tqdm=False)


def by_rule(completion, seed: int) -> list[int]:
    """What V0's rule draws from the distributions that were returned with the tokens."""
    generator, found = torch.Generator().manual_seed(seed), []
    for row in completion.logprobs:
        logprobs = torch.full((VOCAB,), -torch.inf)
        for token, held in row.items():
            logprobs[token] = held.logprob
        found.append(sampled_token(logprobs, generator))
    return found


def compared(asked: list[tuple[list[int], dict]], outs: list) -> dict:
    """Requests whose tokens are the rule's, of how many; sample i of a request has the seed ``seed + i``."""
    pairs = []
    for (_, given), out in zip(asked, outs):
        for i, completion in enumerate(out.outputs):
            pairs.append(list(completion.token_ids) == by_rule(completion, given["seed"] + i))
    return {
        "requests": len(pairs),
        "equal": sum(pairs),
        "tokens": [list(c.token_ids) for _, out in zip(asked, outs) for c in out.outputs],
    }
