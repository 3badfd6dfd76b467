"""
No reuse of KV blocks between requests.

V0 had prefix caching off unless asked for; V1 turns it on when the argument is left alone. In online RL the
weights change while blocks stay: a hit then serves keys and values of older weights (NeMo-RL saw blocks up to 17
steps old), and a prefill that is shorter by the hit rounds differently.

Upstream: vllm/engine/arg_utils.py, `_set_default_chunked_prefill_and_prefix_caching_args` (vLLM 0.12.0 on; V1's
default since 0.8.5). Delete when: vLLM keys its blocks by weight version by default.
"""

from __future__ import annotations

from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES, engine_arg
from vllm_compat.patching.model import Behavior, Check, CheckFailed, Role


def _core(core: Any) -> str:
    if core.vllm_config.cache_config.enable_prefix_caching is not False:
        raise CheckFailed(f"enable_prefix_caching={core.vllm_config.cache_config.enable_prefix_caching!r}")
    if isinstance(core.scheduler, list):  # V0: the engine is its own core
        return "enable_prefix_caching=False"
    connected = getattr(core.scheduler, "get_kv_connector", lambda: None)() is not None
    if getattr(core, "request_block_hasher", None) is not None and not connected:  # from 0.10.1
        raise CheckFailed("the engine hashes blocks although prefix caching is off")
    manager = core.scheduler.kv_cache_manager
    if getattr(manager, "enable_caching", False):
        raise CheckFailed("the KV cache manager caches blocks although prefix caching is off")
    return "enable_prefix_caching=False, no block hasher"


BEHAVIOR = Behavior(
    name="no_prefix_caching",
    v0="KV blocks are not shared between requests",
    v1="prefix caching is on by default; a hit can reuse KV of older weights",
    cost="a prompt may be served from KV blocks that older weights wrote",
    routes=(
        engine_arg("enable_prefix_caching", False, runners=("v1", "v2")),
        engine_arg("enable_prefix_caching", False, runners=("v0",), versions=V0_RELEASES),
    ),
    checks=(Check(name="block_hasher", role=Role.ENGINE_CORE, run=_core),),
)
