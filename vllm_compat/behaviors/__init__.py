"""What V0 did, one file per trait: its words, its routes, its checks. `ALL` is the order of application."""

from __future__ import annotations

from vllm_compat.behaviors import (
    fp32_lm_head,
    model_runner_v1,
    no_async_scheduling,
    no_prefix_caching,
    processed_logprobs,
    seeded_sampling,
    synchronized_weight_update,
    unshared_engine_seed,
)
from vllm_compat.patching.model import Behavior

# model_runner_v1 first: which routes the others have depends on the runner.
ALL: tuple[Behavior, ...] = (
    model_runner_v1.BEHAVIOR,
    processed_logprobs.BEHAVIOR,
    seeded_sampling.BEHAVIOR,
    no_prefix_caching.BEHAVIOR,
    no_async_scheduling.BEHAVIOR,
    fp32_lm_head.BEHAVIOR,
    synchronized_weight_update.BEHAVIOR,
    unshared_engine_seed.BEHAVIOR,
)
BY_NAME: dict[str, Behavior] = {behavior.name: behavior for behavior in ALL}
