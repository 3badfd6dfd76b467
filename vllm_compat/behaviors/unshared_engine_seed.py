"""
Every engine draws its own samples.

V0 did not seed when the user gave no seed. V1 seeds every engine with 0 (vLLM 0.9.0 on), so data-parallel
replicas answer one prompt with the same samples and a GRPO group collapses. ``seed=None`` no longer reaches the
engine, so every engine gets a fresh seed from the operating system instead, and the report shows it; replicas
inside one engine (``data_parallel_size``) share a configuration, so each adds its own index.

``seed=0`` is vLLM's default and cannot be told from no seed at all in `LLM`, which passes it always: to have 0,
switch this behavior off.

Upstream: vllm/engine/arg_utils.py (``seed: int = 0``). Delete when: vLLM stops seeding engines by default.
"""

from __future__ import annotations

import secrets
from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES
from vllm_compat.patching.model import Behavior, Check, CheckFailed, Native, NotNeeded, Patch, Role, Target

# Far more than any number of engines a run starts after one another: replica seeds do not meet.
_REPLICA_STRIDE = 1_000_003


def _write(args: Any) -> None:
    nodes = getattr(args, "nnodes", 1)  # from 0.11.1
    if (args.distributed_executor_backend == "external_launcher" or nodes > 1) and (
        args.tensor_parallel_size * args.pipeline_parallel_size > 1
    ):
        # Each of these processes builds its own configuration: a fresh seed in each would make the ranks of
        # one model draw different tokens.
        raise CheckFailed(
            "the ranks of this engine are started one by one and must share a seed that only you can give them: "
            "pass seed=<your own> to every rank; or, where your framework gives each engine its own and one of them cannot be "
            "told from vLLM's default (TRL's 0), set VLLM_COMPAT_UNSHARED_ENGINE_SEED=0"
        )
    args.seed = secrets.randbelow(2**31 - 1) + 1


def _replica(parallel: Any) -> int:
    """Which data-parallel replica this is. From 0.14.0 the rank of a dense model's replica is always 0."""
    return int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))


def _build(original: Any, module: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        replica = _replica(vllm_config.parallel_config)
        model = vllm_config.model_config
        # In-process executors hand the same object to every worker they start: add the index once.
        if replica and getattr(model, "_vllm_compat_replica", None) != replica:
            model.seed = (model.seed + replica * _REPLICA_STRIDE) % 2**31
            model._vllm_compat_replica = replica
        original(self, vllm_config, *args, **kwargs)

    return __init__


def _worker(worker: Any) -> str:
    seed, replica = worker.model_config.seed, _replica(worker.parallel_config)
    if not seed:
        raise CheckFailed(f"seed={seed!r}: shared with every other engine that was given none")
    return f"seed={seed}" + (f", replica {replica}" if replica else "")


BEHAVIOR = Behavior(
    name="unshared_engine_seed",
    v0="no seed given: nothing is seeded",
    v1="no seed given: every engine and replica is seeded with 0 and draws the same samples",
    cost="engines and replicas with the same seed draw the same samples",
    routes=(
        NotNeeded(versions=V0_RELEASES, runners=("v0",), reason="this is V0: without a seed it seeds nothing"),
        NotNeeded(versions=">=0.8.5,<0.9.0", reason="without a seed this release seeds nothing"),
        Native(
            versions=">=0.9.0",
            runners=("v1", "v2"),
            option="seed",
            value="seed=<fresh>",
            read=lambda args: args.explicit("seed"),
            write=_write,
            accepts=lambda given: False,
        ),
        Patch(
            name="replica_seed",
            versions=">=0.9.0",
            runners=("v1", "v2"),
            role=Role.WORKER,
            target=Target(path="vllm.v1.worker.worker_base:WorkerBase.__init__", params=("vllm_config",)),
            build=_build,
            upstream="vllm/v1/engine/core.py gives every replica the front's configuration, seed included",
            remove_when="vLLM offsets the seed by the data-parallel index itself",
        ),
    ),
    checks=(Check(name="seed", role=Role.WORKER, run=_worker),),
)
