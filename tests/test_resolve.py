"""Precedence and routes: pure, so every combination is tried."""

from __future__ import annotations

import itertools

import pytest
from packaging.version import Version

from vllm_compat import releases
from vllm_compat.behaviors import ALL, BY_NAME
from vllm_compat.behaviors._common import V0_RELEASES, V2_RELEASES
from vllm_compat.patching.model import Behavior, Native, NotNeeded, Patch, State, Unsupported
from vllm_compat.plan import Plan
from vllm_compat.profiles import shipped
from vllm_compat.resolve import resolve, routes, within

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
        ("use_fp64_gumbel", True, "seeded_sampling"),
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


def runners(version: Version) -> list[str]:
    """The runners a release has."""
    return ["v1", *(["v0"] if within(version, V0_RELEASES) else []), *(["v2"] if within(version, V2_RELEASES) else [])]


@pytest.mark.parametrize("release", releases.rows())
def test_no_hole_and_no_overlap(release):
    """Every release x profile x runner: each behavior has a route, one kind of it, each patch of it once, and a reason."""
    version = Version(release)
    for runner, (profile, held) in itertools.product(runners(version), shipped().items()):
        found = plan(version=version, runner=runner, profile_name=profile, profile=held.behaviors)
        for behavior, decision in zip(ALL, found.decisions, strict=True):
            where = f"{behavior.name} on {release}, {runner}"
            matching = routes(behavior, version, runner, decision.mode)
            assert matching, f"{where}: no route"
            settled = [route for route in matching if isinstance(route, (Unsupported, NotNeeded))]
            assert len(settled) < 2, where
            # beside a settled route an option only watches what the user says
            assert not settled or all(isinstance(route, Native) for route in matching if route not in settled), where
            names = [route.name for route in matching if isinstance(route, Patch)]
            options = [route.option for route in matching if isinstance(route, Native)]
            assert len(set(names)) == len(names), f"{where}: a patch twice"
            assert len(set(options)) == len(options), f"{where}: an option twice"
            assert decision.reason
            assert (decision.state is State.UNSUPPORTED) == any(isinstance(route, Unsupported) for route in matching), where
        states = {d.behavior: d.state for d in found.decisions}
        assert (states["processed_logprobs"] is State.UNSUPPORTED) == (runner == "v2")
        if runner == "v0":
            assert states["processed_logprobs"] is State.NOT_NEEDED
            assert states["fp32_lm_head"] is State.PENDING


# What changed where, as the releases were read: (release, behavior, its native options, its patches).
EPOCHS = [
    ("0.8.5", "processed_logprobs", [], ["v0_sample", "v0_gather", "prompt_rows"]),
    ("0.9.2", "processed_logprobs", [], ["v0_sample", "v0_gather", "prompt_rows"]),
    ("0.10.0", "processed_logprobs", ["logprobs_mode"], ["v0_sample", "v0_gather", "prompt_rows"]),
    ("0.10.1.1", "processed_logprobs", ["logprobs_mode"], ["v0_sample", "v0_gather", "prompt_rows"]),
    ("0.10.2", "processed_logprobs", ["logprobs_mode"], ["greedy_temperature", "min_p_last", "prompt_rows"]),
    ("0.11.0", "processed_logprobs", ["logprobs_mode"], ["min_p_last", "prompt_rows"]),
    ("0.33.0", "processed_logprobs", ["logprobs_mode"], ["min_p_last", "prompt_rows"]),
    ("0.8.5", "seeded_sampling", [], ["native_filters"]),
    ("0.9.0", "seeded_sampling", [], []),
    ("0.10.2", "seeded_sampling", [], []),
    ("0.11.0", "seeded_sampling", [], ["native_rows"]),
    ("0.11.2", "seeded_sampling", [], ["native_rows"]),
    ("0.12.0", "seeded_sampling", [], ["native_rows", "undrawn_prefill", "unrewound_prefill"]),
    ("0.22.1", "seeded_sampling", [], ["native_rows", "undrawn_prefill", "unrewound_prefill"]),
    ("0.23.0", "seeded_sampling", ["use_fp64_gumbel"], ["native_rows", "undrawn_prefill", "unrewound_prefill"]),
    ("0.33.0", "seeded_sampling", ["use_fp64_gumbel"], ["native_rows", "undrawn_prefill", "unrewound_prefill"]),
    ("0.8.5", "fp32_lm_head", [], ["float32_product"]),
    ("0.11.2", "fp32_lm_head", [], ["float32_product"]),
    ("0.12.0", "fp32_lm_head", [], ["float32_product", "adapter_rows"]),
    ("0.25.1", "fp32_lm_head", [], ["float32_product", "adapter_rows"]),
    ("0.26.0", "fp32_lm_head", ["hf_overrides.head_dtype"], ["apply_head", "contiguous_logits", "adapter_rows"]),
    ("0.32.0", "fp32_lm_head", ["hf_overrides.head_dtype"], ["apply_head", "contiguous_logits", "adapter_rows"]),
    ("0.33.0", "fp32_lm_head", ["hf_overrides.head_dtype"], ["apply_head", "contiguous_logits"]),
    ("0.16.0", "synchronized_weight_update", [], ["hold", "held_loop", "held_step"]),
    ("0.17.0", "synchronized_weight_update", ["weight_update"], []),
    ("0.9.2", "no_async_scheduling", [], []),
    ("0.10.0", "no_async_scheduling", ["async_scheduling"], []),
    ("0.11.2", "model_runner_v1", [], []),
    ("0.12.0", "model_runner_v1", ["VLLM_USE_V2_MODEL_RUNNER"], []),
    ("0.8.5", "unshared_engine_seed", [], []),
    ("0.9.0", "unshared_engine_seed", ["seed"], ["replica_seed"]),
]


@pytest.mark.parametrize(("release", "behavior", "options", "patches"), EPOCHS)
def test_the_routes_change_where_vllm_changed(release, behavior, options, patches):
    """The edges of every range, on Model Runner V1."""
    found = routes(BY_NAME[behavior], Version(release), "v1", next(iter(BY_NAME[behavior].modes), ""))
    assert [route.option for route in found if isinstance(route, Native)] == options
    assert [route.name for route in found if isinstance(route, Patch)] == patches
    assert options or patches or all(isinstance(route, NotNeeded) for route in found)


HEAD = ["apply_head", "contiguous_logits", "adapter_rows"]
MODES = [
    (True, "accumulate", HEAD),
    ("accumulate", "accumulate", HEAD),
    ("weights", "weights", [*HEAD, "float32_weight", "tied_embedding"]),
    ("model", "", []),
    (False, "", []),
]


@pytest.mark.parametrize(("choice", "mode", "patches"), MODES)
def test_modes(choice, mode, patches):
    """A mode is chosen by its word, 1 is the default one, and the word for off is off; environment before profile."""
    for found in (
        plan(environment={"fp32_lm_head": choice}, profile={"fp32_lm_head": "weights"}),
        plan(profile={"fp32_lm_head": choice}),
    ):
        decision = found["fp32_lm_head"]
        assert (decision.mode, list(decision.patches)) == (mode, patches)
        assert decision.wanted == bool(mode)
        assert Plan.parse(found.text()) == found
    if isinstance(choice, str):
        assert f"VLLM_COMPAT_FP32_LM_HEAD={choice}" in plan(environment={"fp32_lm_head": choice})["fp32_lm_head"].reason
    assert plan()["processed_logprobs"].mode == ""


def test_flashinfer_on_v0_is_the_users_choice():
    """V0 is V0, unless its FlashInfer sampler is switched on, which returns logprobs before top-k and top-p."""
    old = {"version": Version("0.8.5"), "runner": "v0"}
    assert plan(**old)["processed_logprobs"].state is State.NOT_NEEDED
    assert plan(**old, user={"VLLM_USE_FLASHINFER_SAMPLER": "0"})["processed_logprobs"].state is State.NOT_NEEDED
    found = plan(**old, user={"VLLM_USE_FLASHINFER_SAMPLER": "1"})["processed_logprobs"]
    assert (found.state, found.origin) == (State.OVERRIDDEN, "environment")


@pytest.mark.parametrize("version", ["0.8.4", "0.33.1", "0.34.0", "0.19.2", "0.18.1rc1", "0.33.0.dev12+g1234567", "0"])
def test_a_release_nobody_read_is_refused(version):
    """Newer, older, between, candidates and development builds: refused, with what to do."""
    why = releases.refused(Version(version))
    assert "vllm-compat releases" in why
    assert releases.tier(Version(version)) == "refused"


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
