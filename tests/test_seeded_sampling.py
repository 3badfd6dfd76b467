"""The rule of seeded sampling, and the replacements against the installed sampler; no engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_compat.behaviors import seeded_sampling
from vllm_compat.v0_formula import sampled_token

VOCAB, SEEDS = 257, {0: 5, 2: 6, 3: 5}


def generators() -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(seed) for row, seed in SEEDS.items()}


def logits(step: int) -> torch.Tensor:
    return torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(step)) * 2


def test_the_rule_draws_the_distribution():
    """20,000 draws of one generator meet the probabilities, and a filtered token is never drawn."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    generator = torch.Generator().manual_seed(1)
    counts = np.bincount([sampled_token(probs.log(), generator) for _ in range(20_000)], minlength=5)
    assert counts[4] == 0
    # four standard deviations of a count
    assert (abs(counts / 20_000 - probs.numpy()) <= 4 * np.sqrt(probs.numpy() * (1 - probs.numpy()) / 20_000)).all()


def test_the_rule_is_v0s_code():
    """`_multinomial` of 0.8.5 over a batch, request by request: one call of the rule a row and step."""
    theirs, ours = generators(), generators()
    for step in range(5):
        probs = logits(step).softmax(-1)
        q = torch.empty_like(probs)
        for row, generator in theirs.items():
            q[row : row + 1].exponential_(generator=generator)
        for row, generator in ours.items():
            assert sampled_token(logits(step)[row].log_softmax(-1), generator) == int((probs / q)[row].argmax())


def test_seeded_batches_take_torchs_path_and_others_vllms():
    """With a generator the batch goes to `forward_native`, without one to the original; the arguments stay as they came."""

    def original(self, *args):
        return "vLLM's", args

    forward = seeded_sampling._build_native(original, None)
    sampler = SimpleNamespace(forward_native=lambda *args: ("torch's", args))
    batch, seeded = logits(0), generators()
    for given, path in ((seeded, "torch's"), ({}, "vLLM's")):
        name, args = forward(sampler, batch, given, None, 0.9)
        assert name == path
        assert args[0] is batch
        assert args[1] is given
        assert args[2:] == (None, 0.9)


@pytest.mark.parametrize("fails", [False, True])
def test_an_incomplete_prompt_has_no_generator(fails):
    """While its row is dropped the generator is out of the batch; then it is back, the same object, whatever happened."""
    held = generators()
    before = dict(held)
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(generators=held),
        discard_request_mask=SimpleNamespace(np=np.array([True, True, False, True, False])),
    )

    def original(self, first, *, second):
        assert (first, second) == (1, 2)
        assert list(self.input_batch.generators) == [2]
        if fails:
            raise KeyError
        return 3

    method = seeded_sampling._build_whole_prompts(original, None)
    if fails:
        with pytest.raises(KeyError):
            method(runner, 1, second=2)
    else:
        assert method(runner, 1, second=2) == 3
    assert runner.input_batch.generators is held
    assert held == before
