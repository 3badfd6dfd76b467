"""THE DOOR: how vllm_compat becomes active in a process, and which patches stand in it.

A process comes in by ``import vllm_compat``, by vLLM's plugin loader when the environment names a profile, or by
unpickling the plan inside an engine's configuration (spawned and Ray processes). Forked ones inherit.
"""

from __future__ import annotations

import sys
import weakref
from types import ModuleType
from typing import Any

from vllm_compat import engine_hooks, settings, vllm_info
from vllm_compat.errors import PlanConflictError, TargetError, TooLateError
from vllm_compat.patching import hooks, replace
from vllm_compat.patching.model import Entry, Patch
from vllm_compat.plan import Plan


class _Process:
    """What stands in this process. One object, so that undoing is complete."""

    def __init__(self) -> None:
        self.settings: settings.Settings | None = None  # None: not active
        self.generation = 0  # hooks cannot be taken back; a hook of an older generation does nothing
        self.plan: Plan | None = None
        self.frame: dict[str, Entry | TargetError] = {}
        self.patches: dict[str, Entry | TargetError] = {}  # by "behavior/patch", of `plan`
        self.cores: weakref.WeakSet[Any] = weakref.WeakSet()  # engine cores that run in this process


process = _Process()


def activate() -> None:
    """Hang the hooks that make engines of this process V0-equivalent; once, and cheap.

    Raises SettingsError, or TooLateError where an engine already exists. With profile ``off`` it does nothing.
    """
    if process.settings is not None or vllm_info.is_registry_probe():
        return
    found = settings.load()
    if found.profile == "off":
        return
    _refuse_running_engines()
    process.settings = found
    hooks.when_imported("vllm.envs", _register_variables)
    for patch in engine_hooks.FRAME:
        _hang(patch, patch.name, process.frame)


def deactivate() -> None:
    """Take everything out again. Leaves alone what somebody has wrapped on top of ours."""
    process.generation += 1
    for table in (process.patches, process.frame):
        for entry in table.values():
            if isinstance(entry, Entry):
                replace.undo(entry)
        table.clear()
    process.settings = process.plan = None


def receive(plan: Plan) -> None:
    """A plan has arrived with an engine's configuration: this process belongs to that engine."""
    activate()
    if process.plan is None:
        use(plan)


def use(plan: Plan) -> None:
    """Make this process hold exactly the plan's patches. Raises PlanConflictError where a live engine needs others."""
    from vllm_compat.behaviors import BY_NAME  # not needed by a process that only imports us

    hooks.flush()
    if process.plan is not None and process.plan.patch_names() == plan.patch_names():
        process.plan = plan
        return
    if any(process.cores):
        raise PlanConflictError(
            "an engine with other vllm_compat settings runs inside this process, and patches act on the whole process: "
            "give both engines the same settings, delete the first engine, or leave VLLM_ENABLE_V1_MULTIPROCESSING on"
        )
    process.generation += 1  # also silences hooks of the old plan that have not fired yet
    for entry in process.patches.values():
        if isinstance(entry, Entry):
            replace.undo(entry)
    process.patches.clear()
    process.plan = plan
    for decision in plan.decisions:
        for patch in BY_NAME[decision.behavior].patches():
            if patch.name in decision.patches:
                _hang(patch, f"{decision.behavior}/{patch.name}", process.patches)


def _hang(patch: Patch, key: str, table: dict[str, Entry | TargetError]) -> None:
    generation, frame = process.generation, table is process.frame

    def hook(module: ModuleType) -> None:
        if process.settings is None or key in table or (not frame and generation != process.generation):
            return
        installed = vllm_info.installed()
        if frame and installed is not None:
            from vllm_compat.resolve import within  # here: not needed by a process that only imports us

            if not within(installed.release, patch.versions) or replace.is_alias(module, patch.target):
                return  # an alias: with VLLM_USE_V1=1, V0's module up to 0.10.2 calls V1's engine by V0's name
        root = None if frame or installed is None else str(installed.root)
        try:
            table[key] = replace.install(module, patch, root)
        except TargetError as error:
            # A hook does not raise, since that aborts vLLM's import: what went wrong is a state, and the proof decides.
            # But without the frame there is no proof, and silence would be an unpatched engine.
            table[key] = error
            if frame and process.settings.strict:
                raise

    hooks.when_imported(patch.target.module, hook)


def _register_variables(module: Any) -> None:
    """Tell vLLM our variable names, so that it neither warns nor refuses, and old Ray executors carry them along.

    Their values are hidden from it on purpose: vLLM hashes them into its torch.compile cache key, where only the plan
    belongs (it is in the configuration).
    """
    for name in settings.variables():
        module.environment_variables.setdefault(name, lambda: None)


def _refuse_running_engines() -> None:
    loaded = [
        getattr(sys.modules[module], name, None)
        for module, name in (("vllm.v1.engine.llm_engine", "LLMEngine"), ("vllm.v1.engine.async_llm", "AsyncLLM"))
        if module in sys.modules
    ]
    classes = tuple(cls for cls in loaded if isinstance(cls, type))
    if not classes:
        return
    import gc

    # An engine core freezes the garbage collector's view of its process, but one inside this process leaves a group.
    inside = getattr(sys.modules.get("vllm.distributed.parallel_state"), "_WORLD", None) is not None
    # type(), not isinstance(): the latter asks objects for __class__, and some of torch's warn when asked anything.
    if inside or any(issubclass(type(thing), classes) for thing in gc.get_objects()):
        raise TooLateError(
            "an engine already runs in this process, unpatched: import vllm_compat before the engine is made, or set "
            "VLLM_COMPAT_PROFILE=auto in the environment"
        )
