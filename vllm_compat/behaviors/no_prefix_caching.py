"""
No reuse of KV blocks between requests.

V0 had prefix caching off unless asked for; V1 turns it on when the argument is left alone. In online RL the
weights change while blocks stay: a hit then serves keys and values of older weights (NeMo-RL saw blocks up to 17
steps old), and a prefill that is shorter by the hit rounds differently.

Modes: ``v0`` (the default) is V0's: off. ``per_version`` goes beyond V0: vLLM's prefix caching, where a block is only
found by requests of the weight version that wrote it, so the samples of a group share their prompt. ``v1`` is off: plain.

Per version, a request is pinned to a version of the weights: it stands in its cache salt, which vLLM hashes with the first
block and so with every block that is chained to it, of whatever size or attention. A request is pinned when it is made, and
again when it is admitted if the weights have changed since (it waited, or was preempted and starts anew). What makes that
correct, since versions only grow: a request looks for blocks once, when it is admitted, and is then pinned to the version
in force; and the blocks that it writes later, also after an update, stay under the version it is pinned to, for which
nobody looks from then on. A version is what `vllm_compat.weight_update` finishes with: weights that change behind its back
are not seen here.

Refused: KV connectors, which bring blocks from outside by keys of their own; vLLM 0.8.5, which has no salt; V0.

Upstream: vllm/engine/arg_utils.py, `_set_default_chunked_prefill_and_prefix_caching_args` (vLLM 0.12.0 on; V1's
default since 0.8.5). Delete when: vLLM keys its blocks by weight version by default.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES, engine_arg
from vllm_compat.patching.model import Behavior, Check, CheckFailed, Patch, Role, Target

_SALTED = ">=0.9.0"  # cache_salt
_PINNED = "_vllm_compat_pinned"
_UPSTREAM = "vLLM's blocks know tokens, adapters, images and a salt, and no weights"


def _off(core: Any) -> str:
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


# --- caching per version ------------------------------------------------------------------------------------------------


def _salt(given: str | None, version: int) -> str:
    """The cache salt of a request under a weight version; ``given`` is the user's own."""
    return f"weights {version}" if given is None else f"weights {version}, {given}"


def _pin(manager: Any, request: Any, version: int) -> None:
    """Pin a request that has no KV yet to a version, and have its blocks hashed again."""
    given, _ = getattr(request, _PINNED, (request.cache_salt, None))
    request.cache_salt = _salt(given, version)
    setattr(request, _PINNED, (given, version))
    if hasattr(request, "block_hashes"):
        request.block_hashes.clear()
        request.append_output_token_ids([])  # hashes what is not hashed yet
    else:
        manager.req_to_block_hashes.pop(request.request_id, None)


def _build_request(original: Any, module: Any) -> Any:
    from vllm_compat.weights.version import current

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given, version = kwargs.get("cache_salt"), current()
        original(self, *args, **{**kwargs, "cache_salt": _salt(given, version)})
        setattr(self, _PINNED, (given, version))

    return __init__


def _build_lookup(original: Any, module: Any) -> Any:
    from vllm_compat.weights.version import current

    def get_computed_blocks(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        # asked for requests without KV: new ones, and those that were preempted
        version = current()
        if getattr(request, _PINNED, (None, None))[1] != version:
            _pin(self, request, version)
        return original(self, request, *args, **kwargs)

    return get_computed_blocks


def _made_up(core: Any) -> Any:
    """A request of some full blocks that no scheduler ever sees."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    takes = inspect.signature(Request.__init__).parameters
    given: dict[str, Any] = {name: None for name, one in takes.items() if one.default is one.empty and name != "self"}
    given |= {"request_id": "vllm_compat", "prompt_token_ids": [0] * (3 * core.scheduler.block_size)}
    given["sampling_params"] = SamplingParams(max_tokens=1)
    if "block_hasher" in takes:
        given["block_hasher"] = core.request_block_hasher
    return Request(**given)


def _per_version(core: Any) -> str:
    from vllm_compat.weights.version import current

    for name in ("connector", "aux_output_connector"):
        found = getattr(core.scheduler, name, None)
        if found is not None:
            raise CheckFailed(
                f"{type(found).__name__} keeps blocks outside the engine, by keys that know no weight version: run without it, "
                f"or without prefix caching (VLLM_COMPAT_NO_PREFIX_CACHING=1)"
            )
    manager = core.scheduler.kv_cache_manager
    if not manager.enable_caching:
        return "prefix caching is off in this engine: no block is shared"
    stats, version, request = copy.copy(manager.prefix_cache_stats), current(), _made_up(core)
    lookup = type(manager).get_computed_blocks

    def hashes(lookup: Any) -> list[Any]:
        lookup(manager, request)
        if hasattr(request, "block_hashes"):
            return list(request.block_hashes)
        return list(manager.req_to_block_hashes[request.request_id])

    try:
        if getattr(request, _PINNED, None) != (None, version):
            raise CheckFailed("a new request is not pinned to the weight version in force")
        new = hashes(lookup)
        _pin(manager, request, version - 1)  # it waited through an update
        old = hashes(lookup.__wrapped__)  # vLLM's own
        admitted = hashes(lookup)
    finally:
        manager.prefix_cache_stats = stats  # it was nobody's request
        if hasattr(manager, "req_to_block_hashes"):
            manager.req_to_block_hashes.pop(request.request_id, None)
    if not new or not set(new).isdisjoint(old):
        raise CheckFailed("a block has the same hash under two weight versions")
    if admitted != new:
        raise CheckFailed("a request that waited through a weight update keeps its hashes")
    return f"under weight version {version} a prompt's {len(new)} blocks have other hashes than under {version - 1}"


def _patch(name: str, target: Target, build: Any) -> Patch:
    return Patch(
        name=name, versions=_SALTED, runners=("v1", "v2"), modes=("per_version",), role=Role.ENGINE_CORE, target=target,
        build=build, upstream=_UPSTREAM, remove_when="vLLM keys its blocks by weight version",
    )  # fmt: skip


BEHAVIOR = Behavior(
    name="no_prefix_caching",
    v0="KV blocks are not shared between requests",
    v1="prefix caching is on by default; a hit can reuse KV of older weights",
    cost="a prompt may be served from KV blocks that older weights wrote",
    modes=("v0", "per_version"),
    off="v1",
    routes=(
        replace(engine_arg("enable_prefix_caching", False, runners=("v1", "v2")), modes=("v0",)),
        replace(engine_arg("enable_prefix_caching", False, runners=("v0",), versions=V0_RELEASES), modes=("v0",)),
        # Whether to cache at all stays vLLM's and the user's choice. No route before 0.9.0, where there is no salt, and on V0.
        _patch("pinned_request", Target(path="vllm.v1.request:Request.__init__", params=("cache_salt",)), _build_request),
        _patch(
            "pinned_lookup",
            Target(path="vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks", params=("request",)),
            _build_lookup,
        ),
    ),
    checks=(
        Check(name="block_hasher", role=Role.ENGINE_CORE, run=_off, modes=("v0",)),
        Check(name="block_hashes", role=Role.ENGINE_CORE, run=_per_version, modes=("per_version",)),
    ),
)
