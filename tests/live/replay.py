"""What a request's logprobs must be when the weights change inside it: computed with transformers and a KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache


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


@dataclass(frozen=True)
class Rollout:
    """A request with, for every output token, the version of the weights whose forward pass yielded it: one number or
    more per token, and they never fall. The prompt's KV is written by the pass that yields token 0."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    versions: Sequence[int]

    def shifted(self, change: int, by: int) -> Rollout:
        """The same request, had its change number ``change`` (from 0) come ``by`` tokens later."""
        at = self.changes()[change]
        versions = list(self.versions)
        for i in range(at + by, at) if by < 0 else range(at, at + by):
            versions[i] = versions[at] if by < 0 else versions[at - 1]
        return Rollout(self.prompt, self.tokens, versions)

    def changes(self) -> list[int]:
        """The tokens whose version is not that of the token before."""
        return [i for i in range(1, len(self.versions)) if self.versions[i] != self.versions[i - 1]]


def replay(model: Path, updates: Sequence[Path], rollouts: Sequence[Rollout]) -> list[list[float]]:
    """Teacher-forced float32 logprobs at temperature 1 of every output token, over any number of updates.

    Version 0 is ``model``; version v is what ``updates[v - 1]`` (a safetensors file with some or all parameters) makes of
    version v - 1. Every forward pass reads the KV cache as the versions before it left it.

    All rollouts run side by side, one forward pass per version: each has a row of the batch from its first version to its
    last, and in each pass the tokens that this version saw, with padding that no token looks at.
    """
    running = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    inputs = [[*r.prompt, *r.tokens[:-1]] for r in rollouts]
    # The version that each input met: the input at len(prompt) - 1 + i yields token i.
    met = [[r.versions[0]] * (len(r.prompt) - 1) + list(r.versions) for r in rollouts]
    for r, versions in zip(rollouts, met, strict=True):
        assert len(r.tokens) == len(r.versions)
        assert all(a <= b for a, b in itertools.pairwise(versions))
    starts: dict[int, list[int]] = {}
    for i, versions in enumerate(met):
        starts.setdefault(versions[0], []).append(i)

    free = _rows(rollouts)
    row: dict[int, int] = {}
    done = [0] * len(rollouts)
    found: list[list[float]] = [[] for _ in rollouts]
    cache, visible = DynamicCache(), torch.zeros(len(free), 0, dtype=torch.bool)
    with torch.inference_mode():
        for version in range(max(v[-1] for v in met) + 1):
            if version:
                running.load_state_dict({k: t.float() for k, t in load_file(updates[version - 1]).items()}, strict=False)
            for i in starts.get(version, []):
                row[i] = free.pop()
            spans = {i: (done[i], done[i] + met[i][done[i] :].count(version)) for i in row}
            width = max((end - begin for begin, end in spans.values()), default=0)
            if not width:
                continue
            ids = torch.zeros(len(visible), width, dtype=torch.long)
            positions, real = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for i, (begin, end) in spans.items():
                ids[row[i], : end - begin] = torch.tensor(inputs[i][begin:end], dtype=torch.long)
                positions[row[i], : end - begin] = torch.arange(begin, end)
                real[row[i], : end - begin] = True
            visible = torch.cat([visible, real], 1)
            # A row without any token would be a softmax over nothing, and its NaN would stay in the cache.
            mask = visible.clone()
            mask[~visible.any(1), -width:] = True
            logits = running(
                ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
            for i, (begin, end) in spans.items():
                skip = max(0, len(rollouts[i].prompt) - 1 - begin)
                if skip < end - begin:
                    wanted = torch.tensor(rollouts[i].tokens[len(found[i]) : len(found[i]) + end - begin - skip])
                    rows = logits[row[i], skip : end - begin].log_softmax(-1)
                    found[i] += rows.gather(1, wanted[:, None])[:, 0].tolist()
                done[i] = end
            for i in [i for i in row if done[i] == len(inputs[i])]:
                visible[row[i]] = False
                free.append(row.pop(i))
            visible = _pack(cache, visible)
    return found


def _pack(cache: DynamicCache, visible: torch.Tensor) -> torch.Tensor:
    """Move each row's real entries to its front, in their order, and cut what no row needs."""
    order = visible.int().sort(dim=1, descending=True, stable=True).indices[:, : int(visible.sum(1).max())]
    for layer in cache.layers:
        where = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
        layer.keys, layer.values = layer.keys.gather(2, where), layer.values.gather(2, where)
    return visible.gather(1, order)


def _rows(rollouts: Sequence[Rollout]) -> list[int]:
    """As many rows as rollouts are ever there at once."""
    there: dict[int, int] = {}
    for r in rollouts:
        for version in range(r.versions[0], r.versions[-1] + 1):
            there[version] = there.get(version, 0) + 1
    return list(range(max(there.values())))


def worst_gaps(
    model: Path, updates: Sequence[Path], rollouts: Sequence[Rollout], logprobs: Sequence[Sequence[float]]
) -> list[float]:
    """Each rollout's largest distance of a logprob from the exact one."""
    exact = replay(model, updates, rollouts)
    return [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(exact, logprobs, strict=True)]
