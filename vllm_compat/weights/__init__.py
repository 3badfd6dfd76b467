"""In-flight weight updates: the lock (`update`), what each process does in it (`core`, `worker`), how weights travel
(`transports`), which weights made which token (`tokens`), calls without the lock (`guard`), and many engines at once (`fleet`,
`http`)."""

from vllm_compat.weights.fleet import (
    AsyncRayEngine,
    FleetUpdateError,
    RayEngine,
    ray_runtime_env,
    update_engines,
    update_engines_async,
)
from vllm_compat.weights.tokens import lag
from vllm_compat.weights.update import weight_update

__all__ = [
    "AsyncRayEngine", "FleetUpdateError", "RayEngine", "lag", "ray_runtime_env", "update_engines", "update_engines_async",
    "weight_update",
]  # fmt: skip
