"""Precedence and routes: pure, so every combination is tried."""

from __future__ import annotations

import itertools

import pytest
from packaging.version import Version

from vllm_compat.behaviors import ALL, BY_NAME
from vllm_compat.patching.model import Behavior, Native, NotNeeded, Patch, State, Unsupported
from vllm_compat.plan import Plan
from vllm_compat.profiles import shipped
from vllm_compat.resolve import resolve, routes, supported

V = Version("0.32.0")


def plan(**more) -> Plan:
    return resolve(ALL, **{"version": V, "runner": "v1", **more})


def test_all_on_by_default():
    """Nothing said: every behavior is wanted, by default."""
    for decision in plan().decisions:
        assert decision.wanted
        assert decision.origin == "default"


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize(("environment", "profile"), list(itertools.product([None, True, False], repeat=2)))
def test_environment_beats_profile_beats_default(name, environment, profile):
    """The three switches of every behavior, in all nine combinations."""
    found = plan(environment={name: environment}, profile={} if profile is None else {name: profile})[name]
    if environment is not None:
        expected, origin = environment, "environment"
    elif profile is not None:
        expected, origin = profile, "profile"
    else:
        expected, origin = True, "default"
    assert (found.wanted, found.origin) == (expected, origin)
    assert (found.state is State.DISABLED) == (not expected)
    if not expected:
        assert BY_NAME[name].cost in found.reason
        assert not found.sets
        assert not found.patches


@pytest.mark.parametrize(
    ("option", "value", "behavior"),
    [
        ("logprobs_mode", "raw_logprobs", "processed_logprobs"),
        ("enable_prefix_caching", True, "no_prefix_caching"),
        ("async_scheduling", True, "no_async_scheduling"),
        ("hf_overrides.head_dtype", "bfloat16", "fp32_lm_head"),
        ("seed", 5, "unshared_engine_seed"),
        ("VLLM_USE_V2_MODEL_RUNNER", "1", "model_runner_v1"),
    ],
)
def test_the_users_own_argument_wins(option, value, behavior):
    """Even over an environment that insists; the report names the option and the cost, and nothing is patched."""
    found = plan(user={option: value}, environment={behavior: True})[behavior]
    assert found.state is State.OVERRIDDEN
    assert not found.patches
    assert f"{option}={value!r}" in found.reason
    assert BY_NAME[behavior].cost in found.reason


def test_the_users_own_argument_that_is_already_v0s():
    """``logprobs_mode='processed_logprobs'`` by the user: the option is his, the patches still go in."""
    found = plan(user={"logprobs_mode": "processed_logprobs"})["processed_logprobs"]
    assert (found.state, found.origin) == (State.PENDING, "engine argument")
    assert found.sets == ()
    assert found.patches == ("min_p_last", "prompt_rows")
    assert plan(user={"hf_overrides.head_dtype": "float32"})["fp32_lm_head"].wanted


def test_an_inherited_variable_with_v0s_value_changes_nothing():
    """A child sees what its parent set for it: the plan is the same, or the proof would compare two plans."""
    assert plan(user={"VLLM_USE_V2_MODEL_RUNNER": "0"}).text() == plan().text()


def test_switched_off_by_environment_keeps_the_users_argument():
    """Off is off: no patches, also where the user chose the option himself."""
    found = plan(user={"logprobs_mode": "processed_logprobs"}, environment={"processed_logprobs": False})["processed_logprobs"]
    assert (found.state, found.patches) == (State.DISABLED, ())


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("profile", sorted(shipped()))
def test_no_hole_on_the_supported_release(runner, profile):
    """Every behavior x profile x runner ends in a state with a reason, and no two kinds of routes overlap."""
    found = plan(runner=runner, profile_name=profile, profile=shipped()[profile].behaviors)
    for behavior, decision in zip(ALL, found.decisions, strict=True):
        matching = routes(behavior, V, runner)
        assert matching, f"{behavior.name} has no route on {runner}"
        refusals = [route for route in matching if isinstance(route, (Unsupported, NotNeeded))]
        assert not refusals or len(matching) == 1
        assert decision.reason
    states = {d.behavior: d.state for d in found.decisions}
    assert (states["processed_logprobs"] is State.UNSUPPORTED) == (runner == "v2")
    assert (states["model_runner_v1"] is State.UNSUPPORTED) == (runner == "v2")


def test_another_release_is_not_supported():
    """0.31.0 and 0.33.0 have no routes here, and a wanted behavior says so."""
    for version in ("0.31.0", "0.33.0", "0.8.5"):
        assert not supported(ALL, Version(version))
        found = plan(version=Version(version))
        assert all(decision.state is State.UNSUPPORTED for decision in found.decisions)
        assert version in found["fp32_lm_head"].reason


def test_not_needed_and_unsupported_routes():
    """A route may also say that there is nothing to do, or that nothing can be done."""
    behavior = Behavior(
        name="x",
        v0="",
        v1="",
        cost="",
        routes=(
            NotNeeded(versions="==0.8.5", runners=("v0",), reason="this is V0"),
            Unsupported(versions="==0.8.5", runners=("v1",), reason="too old"),
        ),
    )
    for runner, state, reason in (("v0", State.NOT_NEEDED, "this is V0"), ("v1", State.UNSUPPORTED, "too old")):
        (decision,) = resolve([behavior], version=Version("0.8.5"), runner=runner).decisions
        assert (decision.state, decision.reason) == (state, reason)


def test_every_route_is_documented():
    """Words for users on every behavior; why and until when on every patch."""
    for behavior in ALL:
        assert behavior.v0
        assert behavior.v1
        assert behavior.cost
        assert behavior.checks, f"{behavior.name} promises something nobody checks"
        for route in behavior.routes:
            if isinstance(route, Patch):
                assert route.upstream
                assert route.remove_when
            if isinstance(route, Native):
                assert route.value
