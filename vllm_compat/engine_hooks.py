"""The frame around every engine: where its configuration is made, where it starts, and who answers for it.

These patches belong to no behavior. They bring the plan into the configuration, ask for the proof before the first
token, and give the engine core and the workers a method that answers.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from vllm_compat.patching.model import Patch, Role
from vllm_compat.patching.model import frame_patch as _patch
from vllm_compat.weight_hooks import V0_ENGINE, WEIGHTS


def _create_engine_config(original: Any, module: Any) -> Any:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat import front

        return front.create_engine_config(self, lambda: original(self, *args, **kwargs))

    return create_engine_config


def _remember_given(original: Any, module: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # What the caller named himself: a value equal to vLLM's default cannot be told from no value otherwise.
        self.__dict__["_vllm_compat_given"] = frozenset(kwargs)
        original(self, *args, **kwargs)

    return __init__


def _from_command_line(original: Any, module: Any) -> Any:
    def from_cli_args(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, *args, **kwargs)
        # vLLM passes every field the parser knows: named are those whose flag the user typed
        typed = {word.partition("=")[0][2:].replace("-", "_") for word in sys.argv[1:] if word.startswith("--")}
        made.__dict__["_vllm_compat_given"] = frozenset(typed)
        return made

    return from_cli_args


def _llm_engine(original: Any, module: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_compat import proof
        from vllm_compat.weights import guard

        plan = proof.before_start(vllm_config)
        original(self, vllm_config, *args, **kwargs)
        proof.prove(self, plan)
        guard.watch(self)

    return __init__


def _v0_engine(original: Any, module: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_compat import bootstrap, proof
        from vllm_compat.weights import guard

        found = proof.before_start(vllm_config)
        if found is not None:
            bootstrap.use(found)  # its worker runs in this process, or inherits
        original(self, vllm_config, *args, **kwargs)
        bootstrap.process.cores.add(self)
        proof.prove(self, found)
        if getattr(kwargs.get("usage_context"), "name", "") != "OPENAI_API_SERVER":  # whose process runs no code of the caller's
            guard.watch(self)

    return __init__


def _async_llm(original: Any, module: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_compat import proof

        plan = proof.before_start(vllm_config)
        original(self, vllm_config, *args, **kwargs)
        proof.expect(self, plan)

    return __init__


def _proven_first(original: Any, module: Any) -> Any:
    async def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat import proof

        await proof.prove_async(self)
        return await original(self, *args, **kwargs)

    return method


def _proven_stream(original: Any, module: Any) -> Any:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat import proof
        from vllm_compat.weights import update

        update.before_step(self)
        if proof.is_proven(self):
            return original(self, *args, **kwargs)

        # vLLM's generate would hide our error inside its own, so ask in front of it
        async def stream() -> Any:
            await proof.prove_async(self)
            async with contextlib.aclosing(original(self, *args, **kwargs)) as outputs:
                async for output in outputs:
                    yield output

        return stream()

    return generate


def _engine_core(original: Any, module: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_compat import bootstrap, plan

        found = plan.of(vllm_config)
        if found is not None:
            bootstrap.use(found)
        original(self, vllm_config, *args, **kwargs)
        bootstrap.process.cores.add(self)

    return __init__


def _core_report(original: Any, module: Any) -> Any:
    def vllm_compat_report(self: Any) -> str:
        """Called by name over RPC: this engine core's report and those of its workers, as JSON."""
        from vllm_compat import proof

        return proof.core_report(self)

    return vllm_compat_report


def _worker_report(original: Any, module: Any) -> Any:
    def vllm_compat_report(self: Any) -> str:
        """Called by name over RPC: this worker's report, as JSON."""
        from vllm_compat import proof

        return proof.worker_report(self)

    return vllm_compat_report


FRAME: tuple[Patch, ...] = (
    _patch("engine_config", Role.FRONT, "vllm.engine.arg_utils:EngineArgs.create_engine_config", _create_engine_config),
    _patch("given", Role.FRONT, "vllm.engine.arg_utils:EngineArgs.__init__", _remember_given),
    _patch("given_async", Role.FRONT, "vllm.engine.arg_utils:AsyncEngineArgs.__init__", _remember_given),
    _patch("given_cli", Role.FRONT, "vllm.engine.arg_utils:EngineArgs.from_cli_args", _from_command_line),
    _patch("llm_engine", Role.FRONT, "vllm.v1.engine.llm_engine:LLMEngine.__init__", _llm_engine, "vllm_config"),
    _patch("async_llm", Role.FRONT, "vllm.v1.engine.async_llm:AsyncLLM.__init__", _async_llm, "vllm_config"),
    _patch("first_stream", Role.FRONT, "vllm.v1.engine.async_llm:AsyncLLM.generate", _proven_stream),
    _patch("first_request", Role.FRONT, "vllm.v1.engine.async_llm:AsyncLLM.add_request", _proven_first),
    _patch(
        "first_question", Role.FRONT, "vllm.v1.engine.async_llm:AsyncLLM.get_supported_tasks", _proven_first, versions=">=0.10.1"
    ),
    _patch(
        "v0_engine", Role.ENGINE_CORE, "vllm.engine.llm_engine:LLMEngine.__init__", _v0_engine, "vllm_config", versions=V0_ENGINE
    ),
    _patch(
        "v0_report", Role.ENGINE_CORE, "vllm.engine.llm_engine:LLMEngine.vllm_compat_report", _core_report,
        adds=True, versions=V0_ENGINE,
    ),
    _patch("engine_core", Role.ENGINE_CORE, "vllm.v1.engine.core:EngineCore.__init__", _engine_core, "vllm_config"),
    _patch("core_report", Role.ENGINE_CORE, "vllm.v1.engine.core:EngineCore.vllm_compat_report", _core_report, adds=True),
    # V1's workers inherit from V0's up to 0.11.0
    _patch(
        "worker_report", Role.WORKER, "vllm.worker.worker_base:WorkerBase.vllm_compat_report", _worker_report,
        adds=True, versions="<0.11.1",
    ),
    _patch(
        "worker_report", Role.WORKER, "vllm.v1.worker.worker_base:WorkerBase.vllm_compat_report", _worker_report,
        adds=True, versions=">=0.11.1",
    ),
    *WEIGHTS,
)  # fmt: skip
