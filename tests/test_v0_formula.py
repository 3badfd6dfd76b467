"""The written formula against the recorded V0 engine: the specification is itself checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import PARITY

from vllm_compat import recording
from vllm_compat.behaviors import processed_logprobs as behavior
from vllm_compat.v0_formula import Setting, processed_logprobs

EOS = 298
REFERENCE = recording.load(PARITY / "v0_float32.safetensors")
BASE = REFERENCE.settings.index("T=1")
# The recorded T=1 rows are the logits up to a constant. Only the repetition penalty sees that constant.
CASES = [
    (i, name, given) for i, (name, given) in enumerate(REFERENCE.experiment["settings"]) if "repetition_penalty" not in given
]


def setting_of(given: dict) -> Setting:
    named = {key: value for key, value in given.items() if key not in ("max_tokens", "allowed_token_ids", "min_tokens")}
    named["logit_bias"] = {int(token): bias for token, bias in given.get("logit_bias", {}).items()}
    forbidden = [EOS] if given.get("min_tokens") else []
    if "allowed_token_ids" in given:
        forbidden = [token for token in range(REFERENCE.experiment["vocab"]) if token not in given["allowed_token_ids"]]
    return Setting(**named, forbidden=forbidden)


def agree(found: torch.Tensor, recorded: np.ndarray) -> None:
    expected = torch.from_numpy(recorded).double()
    lonely = (found.isfinite() != expected.isfinite()) & (torch.maximum(found, expected) > -80)
    assert not lonely.any()
    kept = found.isfinite() & expected.isfinite()
    assert float((found - expected)[kept].abs().max()) < 2e-4


@pytest.mark.parametrize(("index", "name", "given"), CASES, ids=[case[1] for case in CASES])
def test_first_sampled_row_and_prompt_rows(index, name, given):
    """Every setting's first step and all its prompt rows follow from the same row at temperature 1."""
    for prompt in range(len(REFERENCE.prompts)):
        logits = torch.from_numpy(REFERENCE.get(BASE, prompt, "logprobs")[0])
        agree(processed_logprobs(logits, setting_of(given)), REFERENCE.get(index, prompt, "logprobs")[0])
        recorded = REFERENCE.get(index, prompt, "prompt_logprobs")
        for row in range(0 if recorded is None else len(recorded)):
            logits = torch.from_numpy(REFERENCE.get(BASE, prompt, "prompt_logprobs")[row])
            agree(processed_logprobs(logits, setting_of(given), prompt_row=True), recorded[row])


def test_output_penalties_on_later_steps():
    """Presence and frequency penalties count the output: the recorded greedy run's own tokens follow."""
    plain, index = REFERENCE.settings.index("greedy"), REFERENCE.settings.index("greedy presence 0.8 frequency 0.4")
    compared = 0
    for prompt in range(len(REFERENCE.prompts)):
        free, tokens = REFERENCE.get(plain, prompt, "tokens"), REFERENCE.get(index, prompt, "tokens")
        for step in range(1, len(tokens)):
            if (free[:step] != tokens[:step]).any():
                break
            logits = torch.from_numpy(REFERENCE.get(plain, prompt, "logprobs")[step])
            setting = setting_of(REFERENCE.experiment["settings"][index][1])
            agree(
                processed_logprobs(logits, setting, output=tokens[:step].tolist()), REFERENCE.get(index, prompt, "logprobs")[step]
            )
            compared += 1
    assert compared >= 8


def test_the_recording_can_tell_the_two_orders_apart():
    """min-p in front of top-k/top-p (V1's order) keeps other tokens in at least two recorded settings."""
    told = 0
    for index, _, given in CASES:
        if {"min_p", "top_p"} <= set(given):
            setting = setting_of(given)
            differs = False
            for prompt in range(len(REFERENCE.prompts)):
                logits = torch.from_numpy(REFERENCE.get(BASE, prompt, "logprobs")[0])
                first = processed_logprobs(logits, Setting(temperature=setting.temperature, min_p=setting.min_p))
                swapped = processed_logprobs(first, Setting(top_k=setting.top_k, top_p=setting.top_p))
                recorded = torch.from_numpy(REFERENCE.get(index, prompt, "logprobs")[0])
                differs = differs or bool((swapped.isfinite() != recorded.isfinite()).any())
            told += differs
    assert told >= 2


def test_the_self_tests_filters_cut_between_tokens():
    """No filter's edge of the workers' self-test lies near a token, so that float32 and float64 keep the same ones."""
    logits = behavior.self_test_logits()
    for row in range(len(logits)):
        for given in behavior._SETTINGS.values():
            setting = Setting(**given)
            for prompt_row in (True, False):
                bare = Setting(**{**given, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
                logprobs = processed_logprobs(logits[row], bare, behavior._PROMPT, behavior._OUTPUT, prompt_row=prompt_row)
                if 0 < setting.top_k < len(logprobs):
                    values = logprobs.topk(setting.top_k + 1).values
                    assert values[-2] - values[-1] > 1e-4
                    logprobs = processed_logprobs(logprobs, Setting(top_k=setting.top_k))
                probs = logprobs.exp()
                if setting.top_p < 1:
                    assert (probs.sort().values.cumsum(0) - (1 - setting.top_p)).abs().min() > 1e-5
                if setting.min_p > 0:
                    assert (probs / probs.max() - setting.min_p).abs().min() > 1e-5
