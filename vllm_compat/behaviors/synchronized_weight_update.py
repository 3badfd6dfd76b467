"""
All parameters change between two engine steps.

V0's in-flight update, as PipelineRL ran it: one lock around the engine step, taken by the update as well. So token
k comes from the old weights and token k+1 from the new ones over the KV cache as it stands; running requests go
on, new ones wait, no cache is cleared. V1 lets RPCs in between any two steps, one parameter at a time if the
trainer sends them so. `vllm_compat.weight_update(engine)` is V0's lock: it brackets the user's own transport.

From 0.17.0 with the engine core's own pause, ``mode="keep"`` and ``clear_cache=False``: its future completes when no batch
is in flight (and, from 0.29.0, the device is idle). Before, vLLM has no such pause: 0.12.0 to 0.15.1 abort or drain, and
0.16.0 forgets batches that are queued. There, the core's loop gets a place to wait in front of each step (`hold`):
held, it serves calls and takes requests in, and starts no step. On V0 itself the caller's own thread runs the steps.

Upstream: vllm/v1/engine/core.py, `EngineCoreProc.pause_scheduler` (0.17.0 on; waits for the device from 0.29.0).
Delete when: vLLM's own weight-transfer API pauses by itself, keeping the cache.
"""

from __future__ import annotations

from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES
from vllm_compat.patching.model import UNSET, Behavior, Check, CheckFailed, Native, NotNeeded, Patch, Role, Target

_HELD = "_vllm_compat_held"
_OLD = ">=0.8.5,<0.17.0"
_UPSTREAM = "https://github.com/vllm-project/vllm/pull/28037 began pausing; synchronized and keeping the cache from 0.17.0"


def _build_set_held(original: Any, module: Any) -> Any:
    def vllm_compat_hold(self: Any, held: bool) -> bool:
        """Called by name over RPC, between two steps: from now on start none, or go on. Returns whether held."""
        if held and self.batch_queue is not None:
            raise RuntimeError(
                "this engine queues batches ahead of the running step (async scheduling or pipeline parallelism), and "
                "vLLM before 0.17.0 cannot bring them to rest"
            )
        if held and self.vllm_config.parallel_config.data_parallel_size > 1:
            raise RuntimeError("data-parallel replicas run in step, and vLLM before 0.17.0 cannot stop them together")
        setattr(self, _HELD, held)
        return bool(getattr(self, _HELD))

    return vllm_compat_hold


def _build_loop(original: Any, module: Any) -> Any:
    def _process_engine_step(self: Any) -> Any:
        while getattr(self, _HELD, False):  # calls are served and requests taken in; no step is started
            self._handle_client_request(*self.input_queue.get())
        return original(self)

    return _process_engine_step


def _build_step(original: Any, module: Any) -> Any:
    def step(self: Any) -> Any:
        if getattr(self, _HELD, False):  # an engine inside its caller's process has no loop that could wait
            raise RuntimeError("vllm_compat: a weight update of this engine did not finish, so no step runs; finish one first")
        return original(self)

    return step


def _core(core: Any) -> str:
    if hasattr(core, "is_scheduler_paused"):
        if core.is_scheduler_paused():
            raise CheckFailed("the engine is paused before its first step")
        return "pause_scheduler(mode='keep', clear_cache=False) between two steps"
    if getattr(core, _HELD, False):
        raise CheckFailed("the engine is held before its first step")
    return "the core's loop can be held between two steps"


BEHAVIOR = Behavior(
    name="synchronized_weight_update",
    v0="an update takes the engine's lock: all parameters between two steps, KV kept, new requests wait",
    v1="an RPC runs between any two steps; pausing is the trainer's business, and clears the cache by default",
    cost="vllm_compat.weight_update(engine) refuses to run",
    routes=(
        NotNeeded(versions=V0_RELEASES, runners=("v0",), reason="this is V0: no step runs while its caller does something else"),
        Patch(
            name="hold",
            versions=_OLD,
            runners=("v1", "v2"),
            role=Role.ENGINE_CORE,
            target=Target(path="vllm.v1.engine.core:EngineCore.vllm_compat_hold"),
            build=_build_set_held,
            adds=True,
            upstream=_UPSTREAM,
            remove_when="the floor is vLLM 0.17.0",
        ),
        Patch(
            name="held_loop",
            versions=_OLD,
            runners=("v1", "v2"),
            role=Role.ENGINE_CORE,
            target=Target(path="vllm.v1.engine.core:EngineCoreProc._process_engine_step"),
            build=_build_loop,
            upstream=_UPSTREAM,
            remove_when="the floor is vLLM 0.17.0",
        ),
        Patch(
            name="held_step",
            versions=_OLD,
            runners=("v1", "v2"),
            role=Role.ENGINE_CORE,
            target=Target(path="vllm.v1.engine.core:EngineCore.step"),
            build=_build_step,
            upstream=_UPSTREAM,
            remove_when="the floor is vLLM 0.17.0",
        ),
        Native(
            versions=">=0.17.0",
            runners=("v1", "v2"),
            option="weight_update",
            value="pause_scheduler(mode='keep', clear_cache=False)",
            read=lambda args: UNSET,
            write=lambda args: None,
            accepts=lambda given: True,
        ),
    ),
    checks=(Check(name="pause", role=Role.ENGINE_CORE, run=_core),),
    relies_on=(
        Target(
            path="vllm.v1.engine.core:EngineCoreProc._handle_client_request",
            params=("request_type", "request"),
            versions="<0.17.0",
        ),
        Target(path="vllm.v1.engine.core:EngineCore.pause_scheduler", params=("mode", "clear_cache"), versions=">=0.17.0"),
        Target(path="vllm.v1.engine.core:EngineCoreProc.pause_scheduler", params=("mode", "clear_cache"), versions=">=0.17.0"),
        Target(path="vllm.v1.engine.core:EngineCore.resume_scheduler", versions=">=0.17.0"),
        Target(path="vllm.v1.engine.core:EngineCore.is_scheduler_paused", versions=">=0.17.0"),
    ),
)
