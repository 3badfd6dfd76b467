"""
V0-equivalent rollouts from vLLM, with one line: ``import vllm_compat`` before the engine is made.

Import it at the top of a training script, before or after ``import vllm``; or set ``VLLM_COMPAT_PROFILE=auto`` for
``vllm serve`` and programs you cannot change. Neither vllm nor torch is imported here. Raises SettingsError for a
``VLLM_COMPAT_*`` variable it does not know, and TooLateError where an engine already runs in this process.
"""

from vllm_compat import bootstrap
from vllm_compat.errors import VllmCompatError, VllmCompatWarning
from vllm_compat.report import status
from vllm_compat.version import __version__
from vllm_compat.weights import (
    AsyncRayEngine,
    FleetUpdateError,
    RayEngine,
    lag,
    ray_runtime_env,
    update_engines,
    update_engines_async,
    weight_update,
)

__all__ = [
    "AsyncRayEngine", "FleetUpdateError", "RayEngine", "VllmCompatError", "VllmCompatWarning", "__version__", "lag",
    "ray_runtime_env", "status", "update_engines", "update_engines_async", "weight_update",
]  # fmt: skip

bootstrap.activate()
