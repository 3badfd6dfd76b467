"""PURE: settings, profile, version, runner and the user's own arguments in, a Plan out. All precedence is here.

The user's engine argument beats the environment beats the profile beats the behavior's default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_compat.patching.model import Behavior, Native, NotNeeded, Patch, Route, State, Target, Unsupported
from vllm_compat.plan import Decision, Plan


def routes(behavior: Behavior, version: Version, runner: str, mode: str | None = None) -> tuple[Route, ...]:
    """The behavior's routes for this release and runner, and where given for this mode; several natives and patches act
    together."""
    found = (route for route in behavior.routes if runner in route.runners and within(version, route.versions))
    return tuple(route for route in found if mode is None or not route.modes or mode in route.modes)


@cache
def within(version: Version, versions: str) -> bool:
    """Whether a release lies in a PEP 440 range; the empty range is all of them."""
    return version in SpecifierSet(versions, prereleases=True)


def targets(behavior: Behavior, version: Version, runner: str, patches: Sequence[str] | None = None) -> tuple[Target, ...]:
    """What the behavior replaces (of ``patches`` where given) and relies on in this release."""
    found = [r for r in routes(behavior, version, runner) if isinstance(r, Patch) and (patches is None or r.name in patches)]
    relied = (target for target in behavior.relies_on if within(version, target.versions))
    return (*(patch.target for patch in found), *relied)


def resolve(
    behaviors: Sequence[Behavior],
    *,
    version: Version,
    runner: str,
    profile_name: str = "default",
    profile: Mapping[str, bool | str] | None = None,
    environment: Mapping[str, bool | str | None] | None = None,
    user: Mapping[str, Any] | None = None,
    strict: bool = True,
    notes: Sequence[str] = (),
) -> Plan:
    """Decide every behavior. ``user`` maps a native route's ``option`` to the value the user gave explicitly; profile and
    environment say on, off, or a mode."""
    decisions = [
        _decide(behavior, version, runner, profile_name, profile or {}, environment or {}, user or {}) for behavior in behaviors
    ]
    return Plan(
        vllm=str(version), runner=runner, profile=profile_name, strict=strict, decisions=tuple(decisions), notes=tuple(notes)
    )


def _decide(
    behavior: Behavior,
    version: Version,
    runner: str,
    profile_name: str,
    profile: Mapping[str, bool | str],
    environment: Mapping[str, bool | str | None],
    user: Mapping[str, Any],
) -> Decision:
    choice: bool | str = behavior.default
    origin, said = "default", "on by default" if behavior.default else "off by default"
    if behavior.name in profile:
        choice, origin = profile[behavior.name], "profile"
        said = f"profile {profile_name} says {choice if isinstance(choice, str) else 'on' if choice else 'off'}"
    chosen = environment.get(behavior.name)
    if chosen is not None:
        choice, origin = chosen, "environment"
        said = f"{behavior.variable}={choice if isinstance(choice, str) else int(choice)}"
    wanted = choice != behavior.off if isinstance(choice, str) else choice
    mode = choice if isinstance(choice, str) else behavior.modes[0] if behavior.modes else ""

    def decision(state: State, reason: str, **more: Any) -> Decision:
        by, kept = more.pop("by", origin), mode if wanted else ""
        return Decision(behavior=behavior.name, state=state, origin=by, reason=reason, mode=kept, **more)

    if not wanted:
        return decision(State.DISABLED, f"{said}; lost: {behavior.cost}")
    found = routes(behavior, version, runner, mode)
    natives = [route for route in found if isinstance(route, Native)]
    patches = tuple(route.name for route in found if isinstance(route, Patch))
    given = [(native, user[native.option]) for native in natives if native.option in user]
    for native, value in given:
        if not native.accepts(value):
            reason = f"you set {native.option}={value!r}; lost: {behavior.cost}"
            by = "environment" if native.env else "engine argument"
            return decision(State.OVERRIDDEN, reason, by=by, given=f"{native.option}={value!r}")
    # A variable that already holds V0's value may be ours: processes inherit what their parent set for them.
    given = [(native, value) for native, value in given if not native.env]
    for route in found:
        if isinstance(route, NotNeeded):
            return decision(State.NOT_NEEDED, route.reason)
        if isinstance(route, Unsupported):
            return decision(State.UNSUPPORTED, route.reason)
    if not found:
        return decision(State.UNSUPPORTED, f"no route for vLLM {version} with model runner {runner}")
    if given and len(given) == len(natives):
        option, value = given[0][0].option, given[0][1]
        state = State.PENDING if patches else State.NATIVE
        return decision(state, f"you set {option}={value!r}, which is V0's", by="engine argument", patches=patches)
    sets = tuple(native.value for native in natives if native.env or native.option not in user)
    return decision(State.PENDING if patches else State.NATIVE, said, sets=sets, patches=patches)
