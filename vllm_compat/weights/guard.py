"""
Weights that change outside a `weight_update` block, and without a change to the caller's code.

Every ``collective_rpc`` of an engine (its own ``update_weights``, ``reload_weights``, ``start_weight_update`` and so on are such
calls) is recognised by what it does: the workers compare checksums of their weights; those whose method the profile names
(``[weight_update] methods``) are known to change them. ``VLLM_COMPAT_UNBRACKETED_UPDATES``:

- ``bracket`` (default): the engine comes to rest before the call. Where it changed weights, the engine stays at rest, so that
  further calls belong to the same update (one parameter a call is a common transport), and goes on, with a new version, once
  none came for `SETTLE` seconds, or the caller ends a pause of his own; a synchronous engine, at its next step. What earlier
  updates had changed and this one did not is logged: part of it may be missing.
- ``refuse``: WeightUpdateError, before the call where its name says what it does, else after it, with the engine left at rest.
- ``allow``: as vLLM does it.

A call costs one pass over the weights; calls of vllm_compat, and those that are known to change them, or nothing, cost none.

Where the engine core is in the caller's process (V0; ``VLLM_ENABLE_V1_MULTIPROCESSING=0``; an external launcher), the caller can
reach the model without a call, as TRL does: ``llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(...)``.
No step runs meanwhile, so all that happens between two steps is one update. `look` finds it before the next step: the model's
loader is watched, and checksums are compared when the engine had nothing to do before. (torch's version counters would not do:
what is written through ``param.data``, as vLLM's own loaders do, moves none.) So what is written past the loader while requests
run is found when they are done.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from typing import Any

from vllm_compat import bootstrap
from vllm_compat.errors import WeightUpdateError
from vllm_compat.patching.model import State
from vllm_compat.plan import of
from vllm_compat.weights import update as updates
from vllm_compat.weights import worker

SETTLE = 0.5  # seconds without a further call after which an update of an AsyncLLM is taken to be complete
CHANGES = ("update_weights", "reload_weights", "load_weights", "start_weight_update", "finish_weight_update")
_HARMLESS = (
    "check_health",
    "profile",
    "get_model",
    "determine_available_memory",
    "get_kv_cache_spec",
    "sleep",
    "wake_up",
    "list_loras",
    "add_lora",
)
_log = logging.getLogger("vllm.vllm_compat")
_inside: weakref.WeakKeyDictionary[Any, _Watched] = weakref.WeakKeyDictionary()  # engines whose core is in this process
_open: weakref.WeakKeyDictionary[Any, _Series] = weakref.WeakKeyDictionary()
_last: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()  # what the last such update changed


class _Series:
    """Calls that belong to one update, and the block around them."""

    def __init__(self, engine: Any) -> None:
        self.block = updates.weight_update(engine)
        self.named = False  # one of the calls is known to change weights
        self.changed: set[str] = set()  # as far as it was looked at
        self.lock = asyncio.Lock()
        self.timer: asyncio.TimerHandle | None = None
        self.running = 0


class _Watched:
    """What is known of an engine whose core is in this process."""

    def __init__(self) -> None:
        self.loads = worker.loads
        self.idle = True  # no request since the weights were last looked at


def _mode(engine: Any, method: Any) -> tuple[str, bool]:
    """What is to be done about this call: nothing ("allow") for those that are ours, harmless, or inside a block; and whether
    it is known to change weights."""
    name = method if isinstance(method, str) else getattr(method, "__name__", "")
    plan = of(engine.vllm_config) if hasattr(engine, "vllm_config") else None
    if plan is None or name.startswith("vllm_compat") or name in _HARMLESS:
        return "allow", False
    decision = plan["synchronized_weight_update"]
    if not (decision.wanted or decision.state is State.NOT_NEEDED) or hasattr(engine, "step_async"):  # V0's AsyncLLMEngine
        return "allow", False
    if engine in updates._updating and engine not in _open:
        return "allow", False  # the user's own block
    mode = bootstrap.process.settings.unbracketed_updates if bootstrap.process.settings else "allow"
    if mode == "refuse" and name in (*CHANGES, *plan.methods):
        raise WeightUpdateError(
            f"{name} changes weights outside a weight update, and VLLM_COMPAT_UNBRACKETED_UPDATES=refuse: write `with "
            f"vllm_compat.weight_update(engine):` around it"
        )
    return mode, name in plan.methods


def call(engine: Any, method: Any, run: Callable[[], Any]) -> Any:
    """A synchronous engine's ``collective_rpc``."""
    mode, named = _mode(engine, method)
    if mode == "allow":
        return run()
    series = _open.get(engine)
    if series is None:
        series = _Series(engine)
        series.block._drive(series.block._enter())
        _open[engine] = series
    try:
        found = run()
    except BaseException as error:
        _open.pop(engine, None)
        series.block._drive(series.block._exit(error))
        raise
    series.named |= named
    if not series.named:
        series.block._drive(_look(series))
    if not (series.named or series.changed):
        _open.pop(engine, None)
        series.block._drive(_untouched(series.block))
    elif mode == "refuse":
        _open.pop(engine, None)
        raise _refused(series, method)
    return found


def settle(engine: Any) -> None:
    """A synchronous engine is about to step: the calls before it were one update."""
    series = _open.get(engine)
    if series is not None and not series.block._async:
        _open.pop(engine, None)
        series.block._drive(series.block._exit(None))
        _tell(engine, series.block)


def watch(engine: Any) -> None:
    """An engine has started. Where its core is in this process, know its weights: `look` will ask what became of them."""
    client = getattr(engine, "engine_core", None)
    if _mode(engine, "")[0] != "allow" and (client is None or not hasattr(client, "call_utility")):
        updates.weight_update(engine)._drive(_known(engine))
        _inside[engine] = _Watched()


def look(engine: Any) -> None:
    """A synchronous engine is about to step: what the caller's own code did to its weights is one update."""
    watched = _inside.get(engine)
    if watched is None or (watched.loads == worker.loads and not watched.idle) or updates.paused_for(engine):
        return
    watched.loads, watched.idle = worker.loads, False
    mode, _ = _mode(engine, "")
    if mode == "allow":
        return
    series = _Series(engine)
    series.block._drive(_look(series, parameters=True))
    if not series.changed:
        return
    if mode == "refuse":
        raise _refused(series, "code in the engine's process")
    series.block._drive(series.block._enter())
    series.block._drive(series.block._exit(None))
    _tell(engine, series.block)


def stepped(engine: Any) -> None:
    """A synchronous engine has done a step."""
    watched = _inside.get(engine)
    if watched is not None:
        # V1's engine would ask its data-parallel peers
        front = engine.output_processor if hasattr(engine, "engine_core") else engine
        watched.idle = not front.has_unfinished_requests()


def _known(engine: Any) -> updates.Steps:
    updates.raise_first((yield "workers", "watch", {}))
    updates._seen.add(engine)


async def call_async(engine: Any, method: Any, run: Callable[[], Any]) -> Any:
    """An `AsyncLLM`'s ``collective_rpc``."""
    mode, named = _mode(engine, method)
    if mode == "allow":
        return await run()
    from vllm_compat.proof import prove_async

    await prove_async(engine)
    series = _open.get(engine)
    if series is None:
        series = _open[engine] = _Series(engine)
    async with series.lock:
        if engine not in updates._updating:
            try:
                await series.block._drive_async(series.block._enter())
            except BaseException:
                _open.pop(engine, None)
                raise
        if series.timer is not None:
            series.timer.cancel()
        try:
            found = await run()
        except BaseException as error:
            _open.pop(engine, None)
            await series.block._drive_async(series.block._exit(error))
            raise
        series.named |= named
        if not series.named:
            await series.block._drive_async(_look(series))
        if not (series.named or series.changed):
            _open.pop(engine, None)
            await series.block._drive_async(_untouched(series.block))
        elif mode == "refuse":
            _open.pop(engine, None)
            raise _refused(series, method)
        else:
            loop = asyncio.get_running_loop()
            series.timer = loop.call_later(SETTLE, lambda: _keep(loop.create_task(_settle_async(engine, series))))
    return found


_tasks: set[Any] = set()


def _keep(task: Any) -> None:
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _settle_async(engine: Any, series: _Series) -> None:
    try:
        await _complete(engine, series)
    except WeightUpdateError as error:
        _log.error("vllm_compat: %s", error)  # nobody waits for this task; whoever waits for a token has been told


async def resuming(engine: Any) -> bool:
    """The caller ends a pause of his own: what was called before it is one update, complete now. Returns and raises as
    `update.resumed`; also where that update cannot be completed, before anything goes on."""
    series = _open.get(engine)
    if series is not None:
        await _complete(engine, series)
    return updates.resumed(engine)


async def _complete(engine: Any, series: _Series) -> None:
    async with series.lock:
        if _open.get(engine) is not series:
            return
        _open.pop(engine, None)
        await series.block._drive_async(series.block._exit(None))
        _tell(engine, series.block)


def _look(series: _Series, parameters: bool = False) -> updates.Steps:
    answers = yield "workers", "changes", {"parameters": parameters}
    for answer in answers:
        series.changed |= set(answer.get("changed", ()))


def _untouched(block: updates.weight_update) -> updates.Steps:
    """Nothing changed: as if the call had not been bracketed."""
    updates._updating.pop(block.engine, None)
    if not block._paused_before and block.engine not in updates._unfinished:
        yield "core", "resume", {}


def _refused(series: _Series, method: Any) -> WeightUpdateError:
    updates._updating.pop(series.block.engine, None)
    names = sorted(series.changed)
    series.block._stuck(f"{method} changed {names[0]} and {len(names) - 1} more parameters outside a weight update.")
    return WeightUpdateError(f"{updates._unfinished[series.block.engine]} {updates._STAYS}")


def _tell(engine: Any, block: updates.weight_update) -> None:
    before = _last.get(engine, frozenset())
    missing = sorted(before - block.changed)
    _last[engine] = block.changed | before
    _log.info(
        "vllm_compat: %d parameters changed outside a weight_update block, bracketed: weight version %s",
        len(block.changed), block.version,
    )  # fmt: skip
    if missing:
        _log.warning(
            "vllm_compat: %d parameters that earlier updates changed were not changed by this one, so it may be incomplete: %s%s",
            len(missing), ", ".join(missing[:5]), " …" if len(missing) > 5 else "",
        )  # fmt: skip
