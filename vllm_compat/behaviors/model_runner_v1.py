"""
Model Runner V1, not V2.

vLLM 0.22.0 began to choose Model Runner V2 by itself where Triton is present (from 0.29.0 for nearly every
model). V2 draws counter-based Gumbel noise and scores prompts elsewhere, so neither V0's noise nor its prompt rows
can be had on it. ``VLLM_USE_V2_MODEL_RUNNER=0`` still selects V1 in vLLM 0.33.0.

Upstream: vllm/config/vllm.py, `VllmConfig.use_v2_model_runner`. Delete when: vLLM removes Model Runner V1; the
releases from there on are refused until every behavior has a route on V2.
"""

from __future__ import annotations

from typing import Any

from vllm_compat.behaviors._common import V1_RELEASES
from vllm_compat.patching.model import UNSET, Behavior, Check, CheckFailed, Native, Role, Unsupported

_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def _read(environ: Any) -> Any:
    return environ.get(_VARIABLE, UNSET)


def _write(environ: Any) -> None:
    environ[_VARIABLE] = "0"


def _worker(worker: Any) -> str:
    module = type(worker.model_runner).__module__
    if worker.use_v2_model_runner or module.startswith(("vllm.v1.worker.gpu.", "vllm.v1.worker.cpu.")):
        raise CheckFailed(f"the worker runs {type(worker.model_runner).__qualname__} of {module}")
    return f"{type(worker.model_runner).__qualname__} of {module}"


BEHAVIOR = Behavior(
    name="model_runner_v1",
    v0="one sampler, torch's own noise, prompt rows through the sampler",
    v1="Model Runner V2 where Triton is present: other noise, prompt rows elsewhere",
    cost="processed prompt rows and V0's order of filters are not to be had on Model Runner V2",
    routes=(
        Native(
            versions=V1_RELEASES,
            option=_VARIABLE,
            value=f"{_VARIABLE}=0",
            read=_read,
            write=_write,
            accepts=lambda given: given.strip().lower() in ("0", "false"),
            env=True,
        ),
        Unsupported(
            versions=V1_RELEASES,
            runners=("v2",),
            reason="this engine insists on Model Runner V2 (watermarking and HiSparse do): turn that option off",
        ),
    ),
    checks=(Check(name="runner", role=Role.WORKER, run=_worker),),
)
