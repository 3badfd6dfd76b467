"""Many weight updates at random moments, many requests in flight: every token of every request has the exact logprob."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from make_model import weights
from replay import Rollout, worst_gaps
from safetensors.torch import save_file

UPDATES, REQUESTS, EXACT = 200, 20, 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per update: every fourth has all parameters, the others (also the last) the norms alone."""
    made = tmp_path_factory.mktemp("updates")
    for number in range(UPDATES + 1):
        (made / f"{number:03d}").mkdir()
        new = weights("qwen3", False, number + 1, 128)
        if number % 4 or number == UPDATES:
            new = {name: value for name, value in new.items() if "norm" in name}
        save_file(new, made / f"{number:03d}" / "model.safetensors", metadata={"format": "pt"})
    return made


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/model.safetensors"))


def _rollouts(requests: list[dict]) -> list[Rollout]:
    return [Rollout(request["prompt"], request["tokens"], request["versions"]) for request in requests]


def _assert_exact(model: Path, folder: Path, found: dict, updates: int) -> None:
    """No request lost, duplicated or reordered; every logprob exact for the versions that the engine reports, and for no
    others: one change one token earlier or later is seen in every request that had a change."""
    assert found["proven"]
    assert found["versions"] == list(range(1, updates + 1))
    assert min(found["in_flight"]) >= 16
    requests = found["requests"]
    for number, request in enumerate(requests):
        assert request["ids"] == [f"request-{number}"]
        assert request["ends"] == 1
        assert len(request["tokens"]) == len(request["logprobs"]) == len(request["versions"]) == request["asked"]
    rollouts, logprobs = _rollouts(requests), [request["logprobs"] for request in requests]
    assert len({version for rollout in rollouts for version in rollout.versions}) > 0.9 * updates
    assert max(worst_gaps(model, _files(folder), rollouts, logprobs)) < EXACT

    pick, wrong, theirs = random.Random(0), [], []
    for rollout, real in zip(rollouts, logprobs, strict=True):
        if changes := rollout.changes():
            wrong += [rollout.shifted(pick.randrange(len(changes)), by) for by in (-1, 1)]
            theirs += [real, real]
    assert len(wrong) >= 2 * REQUESTS
    assert min(worst_gaps(model, _files(folder), wrong, theirs)) > 10 * EXACT


def _assert_torn(model: Path, folder: Path, found: dict, updates: int) -> None:
    """The same transport with no hook around it: no single moment of the change explains what a request got."""
    files, rollouts, theirs = _files(folder)[: updates + 1], [], []
    for request, before, after in zip(found["bare"], found["before"], found["after"], strict=True):
        assert after > before
        moments = range(before - 1, min(after + 8, len(request["tokens"])) + 1)
        count = len(request["tokens"])
        for moment in moments:
            versions = [updates] * moment + [updates + 1] * (count - moment)
            rollouts.append((len(theirs), Rollout(request["prompt"], request["tokens"], versions)))
        theirs.append(request["logprobs"])
    gaps = worst_gaps(model, files, [rollout for _, rollout in rollouts], [theirs[i] for i, _ in rollouts])
    for number in range(len(theirs)):
        best = min(gap for gap, (i, _) in zip(gaps, rollouts, strict=True) if i == number)
        assert best > 10 * EXACT, f"request {number} of the control looks as if its weights had changed at one moment"


def test_two_hundred_updates(run_engine, model, folder) -> None:
    """200 updates at random moments, all parameters and norms alone, 20 requests in flight: every token is exact, and the
    same transport without the hook is found out."""
    script = Path(__file__).with_name("updates.py").read_text()
    environment = {"VLLM_COMPAT_UNBRACKETED_UPDATES": "allow"}
    found = run_engine(script, str(model), str(folder), f"--updates={UPDATES}", "--bare", environment=environment).ok().result
    assert not found["async_scheduling"]
    _assert_exact(model, folder, found, UPDATES)
    _assert_torn(model, folder, found, UPDATES)


def test_with_async_scheduling(run_engine, model, folder) -> None:
    """The same where the engine core schedules a step before the last one's tokens are there, as vLLM does by default on a card:
    with the hook every token is exact, without it the same calls are found out. On a CPU vLLM switches it off (async_on_cpu)."""
    script, updates = Path(__file__).with_name("updates.py").read_text(), 61  # the 62nd has the norms alone
    environment = {"VLLM_COMPAT_UNBRACKETED_UPDATES": "allow", "ASYNC_ON_CPU": "1"}
    arguments = [f"--updates={updates}", "--bare", '--engine-args={"async_scheduling": true}']
    found = run_engine(script, str(model), str(folder), *arguments, environment=environment).ok().result
    assert found["async_scheduling"]
    _assert_exact(model, folder, found, updates)
    _assert_torn(model, folder, found, updates)
