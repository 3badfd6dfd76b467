"""The front: where an engine's configuration is made, its plan is decided, and V0's values go into the arguments."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from vllm_compat import bootstrap, lockfile, profiles, releases, report, settings, vllm_info
from vllm_compat.behaviors import ALL, BY_NAME
from vllm_compat.behaviors._common import V0_RELEASES
from vllm_compat.errors import (
    PluginExcludedError,
    TargetError,
    UnsupportedBehaviorError,
    UnsupportedVLLMError,
    VllmCompatError,
    VllmCompatWarning,
)
from vllm_compat.patching.model import UNSET, CheckFailed, Native, NotNeeded, Patch, State, Unsupported
from vllm_compat.patching.probe import fingerprint, probe
from vllm_compat.plan import KEY, Plan, PlanCarrier, PlanText
from vllm_compat.resolve import resolve, routes, targets, within

# vLLM's own variables that a native route may set.
_VARIABLES = {route.option for behavior in ALL for route in behavior.routes if isinstance(route, Native) and route.env}

_said: set[str] = set()  # what is said once a process


class UserArgs:
    """The engine arguments as the user gave them: reading is plain, ``explicit`` asks who set a field, and what we
    write is taken back when the configuration is made (the object is the user's, and vLLM may use it again)."""

    def __init__(self, args: Any) -> None:
        object.__setattr__(self, "_args", args)
        object.__setattr__(self, "_before", {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._before.setdefault(name, getattr(self._args, name))
        setattr(self._args, name, value)

    def restore(self) -> None:
        """Take back everything that was written."""
        for name, value in self._before.items():
            setattr(self._args, name, value)

    def explicit(self, name: str) -> Any:
        """The value the user gave, or UNSET. A value equal to vLLM's default counts where it was named: in a call of
        EngineArgs, in `LLM` where that does not pass the field by itself, or as a flag on the command line."""
        value = getattr(self._args, name)
        fields = {field.name: field for field in dataclasses.fields(self._args) if field.init}
        field = fields[name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value != default:
            return value
        given = vars(self._args).get("_vllm_compat_given", frozenset())
        if name not in given or given >= set(fields):  # all of them: copied from another object, nobody named one
            return UNSET
        llm = getattr(sys.modules.get("vllm.entrypoints.llm"), "LLM", None)
        always = set(inspect.signature(llm.__init__).parameters) & set(fields) if llm else set()
        return UNSET if name in always and given >= always else value


def create_engine_config(engine_args: Any, original: Callable[[], Any]) -> Any:
    """vLLM's own ``create_engine_config``, with the plan decided before and V0's values in force during it."""
    if bootstrap.process.settings is None:
        return original()
    args = UserArgs(engine_args)
    if not (args.additional_config is None or isinstance(args.additional_config, dict)):
        raise UnsupportedBehaviorError(
            f"additional_config is a {type(args.additional_config).__name__}, and vllm_compat's plan travels in it: pass a dict"
        )
    file = lockfile.find(bootstrap.process.settings.lock)
    locked = file and lockfile.read(file)
    choices = decide(args)
    environment = settings.environ()
    before = dict(environment)
    try:
        config, plan = _configured(choices(asked_runner()), args, original)
        if _is_v0() and plan.runner != "v0":
            # vLLM up to 0.10.2 falls back to V0 by itself, and says so only in the finished configuration
            config, plan = _configured(choices("v0"), args, original)
        if file and locked:
            report.note(plan, lockfile.hold(plan, file, locked))
    except BaseException:
        for name in _VARIABLES - set(before):
            environment.pop(name, None)
        raise
    config.additional_config[KEY] = PlanText(plan.text())
    # Forked processes inherit this process's patches; engines inside it use them.
    if not any(bootstrap.process.cores):
        bootstrap.use(plan)
    return config


def _configured(plan: Plan, args: UserArgs, original: Callable[[], Any]) -> tuple[Any, Plan]:
    """vLLM's configuration with the plan's values in the arguments, which are then as before."""
    environment = settings.environ()
    try:
        for decision in plan.decisions:
            if not (decision.wanted and decision.sets):
                continue
            for native in _natives(decision.behavior, plan):
                if native.value in decision.sets:
                    try:
                        native.write(environment if native.env else args)
                    except CheckFailed as failed:
                        plan = plan.given_up(decision.behavior, State.UNSUPPORTED, str(failed))
                        _refuse_or_warn(plan, UnsupportedBehaviorError(f"{decision.behavior}: {failed}"))
                        break
        carrier: dict[str, Any] = {**(args.additional_config or {}), KEY: PlanText(plan.text())}
        args.additional_config = PlanCarrier(carrier) if Version(plan.vllm) < Version("0.9.0") else carrier
        config = original()
        return config, _as_made(plan, config)
    finally:
        args.restore()


def decide(args: UserArgs) -> Callable[[str], Plan]:
    """The plan for these arguments, by runner, refused where it cannot be had. Changes nothing."""
    current, installed = bootstrap.process.settings, vllm_info.installed()
    assert current is not None
    assert installed is not None
    why = releases.refused(installed.release)
    if why:
        raise UnsupportedVLLMError(f"vLLM {installed.version}: {why}, or set VLLM_COMPAT_PROFILE=off to run it as it is")
    notes: list[str] = []
    allowed = settings.vllm_plugins()
    if allowed is not None and KEY not in allowed:
        problem = PluginExcludedError(
            f"VLLM_PLUGINS={','.join(allowed)!r} keeps vLLM from loading vllm_compat in the processes it starts: "
            f"add vllm_compat to it, or unset it"
        )
        if current.strict:
            raise problem
        notes.append(str(problem))
        warnings.warn(str(problem), VllmCompatWarning, stacklevel=2)
    chosen, profile_notes = profiles.choose(current.profile, model_config_json(args))
    unproven = profiles.missing_evidence(chosen, str(installed.release), _device())
    if unproven:
        notes.append(unproven)
        if unproven not in _said:
            _said.add(unproven)
            logging.getLogger("vllm.vllm_compat").warning("vllm_compat: %s", unproven)
    user = given_by_user(args, installed.release)

    def plan_for(runner: str) -> Plan:
        plan = resolved(current, installed.release, chosen, user, (*notes, *profile_notes), runner)
        plan = dataclasses.replace(plan, methods=chosen.weight_update.methods)
        for decision in plan.decisions:
            if decision.state is State.UNSUPPORTED:
                _refuse_or_warn(plan, UnsupportedBehaviorError(f"{decision.behavior}: {decision.reason}"))
        wrong, seen = probe_all(plan)
        plan = dataclasses.replace(plan, notes=(*plan.notes, *seen))
        for name, error in wrong.items():
            plan = plan.given_up(name, State.FAILED, str(error))
            _refuse_or_warn(plan, error)
        return plan

    return plan_for


def _device() -> str:
    """What this vLLM runs on: cpu, cuda, …"""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def asked_runner() -> str:
    """``v0`` where the user asks a release that still has V0 for it, else ``v1``."""
    installed = vllm_info.installed()
    asked = settings.environ().get("VLLM_USE_V1", "")
    return "v0" if installed and within(installed.release, V0_RELEASES) and asked == "0" else "v1"


def _is_v0() -> bool:
    """Whether the configuration just made is for V0: vLLM writes its own choice into the environment."""
    installed = vllm_info.installed()
    if installed is None or not within(installed.release, V0_RELEASES):
        return False
    from vllm import envs

    return not envs.VLLM_USE_V1


def given_by_user(args: Any, release: Version) -> dict[str, Any]:
    """The options the user set himself, by name; without arguments (doctor) those in the environment."""
    found: dict[str, Any] = {}
    for native in (route for behavior in ALL for route in behavior.routes if isinstance(route, Native)):
        if (native.env or args is not None) and within(release, native.versions):
            value = native.read(settings.environ() if native.env else args)
            if value is not UNSET:
                found[native.option] = value
    return found


def resolved(
    current: settings.Settings,
    release: Version,
    profile: profiles.Profile,
    user: dict[str, Any],
    notes: tuple[str, ...] = (),
    runner: str = "v1",
) -> Plan:
    """`resolve` with these settings, for the given runner, or for Model Runner V2 where the user insists on it."""

    def on(runner: str) -> Plan:
        return resolve(
            ALL,
            version=release,
            runner=runner,
            profile_name=profile.name,
            profile=profile.behaviors,
            environment={behavior.name: getattr(current, behavior.name) for behavior in ALL},
            user=user,
            strict=current.strict,
            notes=notes,
        )

    plan = on(runner)
    pinned = plan["model_runner_v1"]
    if pinned.state is State.OVERRIDDEN:
        plan = on("v2").given_up(pinned.behavior, pinned.state, pinned.reason, pinned.origin)
    return plan


def probe_all(plan: Plan) -> tuple[dict[str, TargetError], tuple[str, ...]]:
    """What of the plan's targets is not as declared in the installed sources, by behavior; and, as notes, what is declared
    so but is not the release's own code, or was never run. Imports nothing."""
    installed = vllm_info.installed()
    assert installed is not None
    wrong: dict[str, TargetError] = {}
    notes = [releases.shown(installed.release, plan.runner)]
    for decision in plan.decisions:
        behavior = BY_NAME[decision.behavior]
        if not decision.wanted:
            continue
        adds = {patch.target for patch in behavior.patches() if patch.adds}
        for target in targets(behavior, installed.release, plan.runner, decision.patches):
            try:
                found = probe(target, installed.root, absent=target in adds)
            except TargetError as error:
                wrong.setdefault(behavior.name, error)
                continue
            if found is not None and releases.changed_locally(target.path, installed.release, fingerprint(found)):
                notes.append(f"{target.path} is not what vLLM {installed.release} was released with: somebody edited it")
    return wrong, tuple(dict.fromkeys(note for note in notes if note))


def model_config_json(args: Any) -> dict[str, Any] | None:
    """The model's config.json as vLLM finds it (a folder, the cache or the hub), or None."""
    try:
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
    except ImportError:  # up to 0.11.2
        from vllm.transformers_utils.config import get_hf_file_to_dict

    try:
        found = get_hf_file_to_dict("config.json", args.hf_config_path or args.model, args.revision or "main")
    except Exception as error:  # a missing model is vLLM's to report, in its own words
        warnings.warn(f"vllm_compat could not read config.json of {args.model}: {error}", VllmCompatWarning, stacklevel=2)
        return None
    return dict(found) if found else None


def _natives(behavior: str, plan: Plan) -> list[Native]:
    return [r for r in routes(BY_NAME[behavior], Version(plan.vllm), plan.runner) if isinstance(r, Native)]


def _as_made(plan: Plan, config: Any) -> Plan:
    """What only the finished configuration shows: the runner vLLM insists on, and options that arguments decide together."""
    if getattr(config, "use_v2_model_runner", False):
        plan = dataclasses.replace(plan, runner="v2")
        for decision in plan.decisions:
            found = routes(BY_NAME[decision.behavior], Version(plan.vllm), "v2")
            if decision.wanted and not all(isinstance(route, (Native, Patch)) for route in found):
                reason = next(route.reason for route in found if isinstance(route, (Unsupported, NotNeeded)))
                plan = plan.given_up(decision.behavior, State.UNSUPPORTED, reason)
                _refuse_or_warn(plan, UnsupportedBehaviorError(f"{decision.behavior}: {reason}"))
    for decision in plan.decisions:
        for native in _natives(decision.behavior, plan):
            if decision.wanted and native.made and native.value in decision.sets and not native.accepts(native.made(config)):
                cost = BY_NAME[decision.behavior].cost
                reason = f"your arguments make {native.option}={native.made(config)}; lost: {cost}"
                plan = plan.given_up(decision.behavior, State.OVERRIDDEN, reason, "engine argument")
    return plan


def _refuse_or_warn(plan: Plan, error: VllmCompatError) -> None:
    if plan.strict:
        raise error
    warnings.warn(str(error), VllmCompatWarning, stacklevel=3)
