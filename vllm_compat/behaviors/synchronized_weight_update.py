"""
All parameters change between two engine steps.

V0's in-flight update, as PipelineRL ran it: one lock around the engine step, taken by the update as well. So token
k comes from the old weights and token k+1 from the new ones over the KV cache as it stands; running requests go
on, new ones wait, no cache is cleared. V1 lets RPCs in between any two steps, one parameter at a time if the
trainer sends them so. `vllm_compat.weight_update(engine)` is V0's lock: it brackets the user's own transport with
the engine core's own pause, ``mode="keep"`` and ``clear_cache=False``, which is synchronized on this release (the
future completes when no batch is in flight and the device is idle).

Upstream: vllm/v1/engine/core.py, `EngineCoreProc.pause_scheduler` (0.17.0 on; waits for the device from 0.29.0).
Delete when: vLLM's own weight-transfer API pauses by itself, keeping the cache.
"""

from __future__ import annotations

from typing import Any

from vllm_compat.behaviors._common import V1_RELEASES
from vllm_compat.patching.model import UNSET, Behavior, Check, CheckFailed, Native, Role, Target


def _core(core: Any) -> str:
    if core.is_scheduler_paused():
        raise CheckFailed("the engine is paused before its first step")
    return "pause_scheduler(mode='keep', clear_cache=False) between two steps"


BEHAVIOR = Behavior(
    name="synchronized_weight_update",
    v0="an update takes the engine's lock: all parameters between two steps, KV kept, new requests wait",
    v1="an RPC runs between any two steps; pausing is the trainer's business, and clears the cache by default",
    cost="vllm_compat.weight_update(engine) refuses to run",
    routes=(
        Native(
            versions=V1_RELEASES,
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
        Target(path="vllm.v1.engine.core:EngineCore.pause_scheduler", params=("mode", "clear_cache")),
        Target(path="vllm.v1.engine.core:EngineCoreProc.pause_scheduler", params=("mode", "clear_cache")),
        Target(path="vllm.v1.engine.core:EngineCore.resume_scheduler"),
        Target(path="vllm.v1.engine.core:EngineCore.is_scheduler_paused"),
    ),
)
