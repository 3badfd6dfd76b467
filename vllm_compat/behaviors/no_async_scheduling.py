"""
One step at a time: schedule, run, sample, then schedule the next.

V0 had no scheduling ahead of the running step. vLLM turns it on by default from 0.14.0 where the platform allows
(``None`` is resolved in ``VllmConfig.__post_init__``, which runs again inside EngineCore: so the argument is never
left ``None`` here). A step that is already scheduled cannot be held back by a weight update.

Upstream: vllm/config/vllm.py, `VllmConfig.__post_init__`. Delete when: never, as long as the default is on.
"""

from __future__ import annotations

from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES, engine_arg
from vllm_compat.patching.model import Behavior, Check, CheckFailed, NotNeeded, Role


def _core(core: Any) -> str:
    if core.vllm_config.scheduler_config.async_scheduling is not False:
        raise CheckFailed(f"async_scheduling={core.vllm_config.scheduler_config.async_scheduling!r}")
    pipeline = core.vllm_config.parallel_config.pipeline_parallel_size
    if core.batch_queue is not None and pipeline == 1:
        raise CheckFailed("the engine queues batches ahead of the running step")
    return "async_scheduling=False" + ("" if core.batch_queue is None else f", batch queue for {pipeline} pipeline stages")


BEHAVIOR = Behavior(
    name="no_async_scheduling",
    v0="a step is scheduled after the one before it has been sampled",
    v1="the next step is scheduled while one runs (default from vLLM 0.14.0 where the platform allows)",
    cost="a step may already be scheduled when a weight update asks for quiet",
    routes=(
        NotNeeded(versions=V0_RELEASES, runners=("v0",), reason="this is V0: its steps are not asynchronous"),
        NotNeeded(versions=">=0.8.5,<0.10.0", reason="this release has no asynchronous scheduling"),
        engine_arg("async_scheduling", False, runners=("v1", "v2"), versions=">=0.10.0"),
    ),
    checks=(Check(name="batch_queue", role=Role.ENGINE_CORE, run=_core),),
)
