"""
Model Runner V1, not V2.

vLLM has had a second model runner since 0.12.0, began to choose it by itself in 0.22.0 (for Qwen3; 0.23.0 Llama and
Mistral; 0.25.0 all dense models) and takes it for nearly every model where Triton is present from 0.29.0. V2 draws
counter-based Gumbel noise and scores prompts elsewhere, so neither V0's noise nor its prompt rows can be had on it.
``VLLM_USE_V2_MODEL_RUNNER=0`` still selects V1 in vLLM 0.33.0.

Upstream: vllm/config/vllm.py, `VllmConfig.use_v2_model_runner`. Delete when: vLLM removes Model Runner V1; the
releases from there on are refused until every behavior has a route on V2.
"""

from __future__ import annotations

from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES, V2_RELEASES
from vllm_compat.patching.model import UNSET, Behavior, Check, CheckFailed, Native, NotNeeded, Role, Unsupported

_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def _read(environ: Any) -> Any:
    return environ.get(_VARIABLE, UNSET)


def _write(environ: Any) -> None:
    environ[_VARIABLE] = "0"


def _worker(worker: Any) -> str:
    module = type(worker.model_runner).__module__
    if getattr(worker, "use_v2_model_runner", False) or module.startswith(("vllm.v1.worker.gpu.", "vllm.v1.worker.cpu.")):
        raise CheckFailed(f"the worker runs {type(worker.model_runner).__qualname__} of {module}")
    return f"{type(worker.model_runner).__qualname__} of {module}"


BEHAVIOR = Behavior(
    name="model_runner_v1",
    v0="one sampler, torch's own noise, prompt rows through the sampler",
    v1="Model Runner V2 where Triton is present: other noise, prompt rows elsewhere",
    cost="processed prompt rows and V0's order of filters are not to be had on Model Runner V2",
    routes=(
        NotNeeded(versions=V0_RELEASES, runners=("v0",), reason="this is V0"),
        NotNeeded(versions=">=0.8.5,<0.12.0", reason="this release has one model runner"),
        Native(
            versions=">=0.12.0",
            option=_VARIABLE,
            value=f"{_VARIABLE}=0",
            read=_read,
            write=_write,
            accepts=lambda given: given.strip().lower() in ("0", "false"),
            env=True,
        ),
        Unsupported(
            versions=V2_RELEASES,
            runners=("v2",),
            reason="this engine insists on Model Runner V2 (watermarking and HiSparse do): turn that option off",
        ),
    ),
    checks=(Check(name="runner", role=Role.WORKER, run=_worker),),
)
