"""The weight updates' part of the frame around every engine: a door into each process, versions on the outputs, calls and code
that change weights on their own, endpoints. Like the rest of the frame (`engine_hooks`), these patches belong to no behavior."""

from __future__ import annotations

import inspect
from typing import Any

from vllm_compat.patching.model import Role
from vllm_compat.patching.model import frame_patch as _patch

V0_ENGINE = "<0.11.0"  # V0's own engine class; from 0.11.0 its module holds another name for V1's


def _core_update(original: Any, module: Any) -> Any:
    def vllm_compat_update(self: Any, command: str, argument: str) -> Any:
        """Called by name over RPC: one phase of a weight update (vllm_compat.weights.core)."""
        from vllm_compat.weights import core

        return core.handle(self, command, argument)

    return vllm_compat_update


def _worker_weights(original: Any, module: Any) -> Any:
    def vllm_compat_weights(self: Any, command: str, argument: str) -> str:
        """Called by name over RPC: a worker's part in a weight update (vllm_compat.weights.worker)."""
        from vllm_compat.weights import worker

        return worker.handle(self, command, argument)

    return vllm_compat_weights


def _stamped(original: Any, module: Any) -> Any:
    def update_from_output(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import tokens

        found = original(self, scheduler_output, *args, **kwargs)
        tokens.stamp(self, scheduler_output, found, module.EngineCoreOutput)
        return found

    return update_from_output


def _read_stamp(original: Any, module: Any) -> Any:
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import tokens

        tokens.read(self, engine_core_outputs)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def _completion(original: Any, module: Any) -> Any:
    def _new_completion_output(self: Any, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import tokens

        delta = self.output_kind is module.RequestOutputKind.DELTA
        return tokens.attach(self, original(self, token_ids, *args, **kwargs), delta)

    return _new_completion_output


def _token_weight_versions(original: Any, module: Any) -> Any:
    from vllm_compat.weights import tokens

    return property(tokens.token_weight_versions)


def _kv_weight_versions(original: Any, module: Any) -> Any:
    from vllm_compat.weights import tokens

    return property(tokens.kv_weight_versions)


def _v0_output(original: Any, module: Any) -> Any:
    def from_seq_group(cls: Any, seq_group: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import tokens

        return tokens.attach_v0(seq_group, original(cls, seq_group, *args, **kwargs))

    return from_seq_group


def _v0_preempted(original: Any, module: Any) -> Any:
    def _preempt_by_recompute(self: Any, seq_group: Any) -> Any:
        from vllm_compat.weights import tokens

        original(self, seq_group)
        tokens.preempted_v0(seq_group)

    return _preempt_by_recompute


def _completion_response(original: Any, module: Any) -> Any:
    def request_output_to_completion_response(self: Any, final_res_batch: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import tokens

        return tokens.answered(original(self, final_res_batch, *args, **kwargs), final_res_batch)

    return request_output_to_completion_response


def _chat_response(original: Any, module: Any) -> Any:
    async def chat_completion_full_generator(self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import tokens

        last: list[Any] = []

        async def watched() -> Any:
            async for output in result_generator:
                last[:] = [output]
                yield output

        return tokens.answered(await original(self, request, watched(), *args, **kwargs), last)

    return chat_completion_full_generator


def _stream(original: Any, module: Any) -> Any:
    signature = inspect.signature(original)

    def stream_generator(*args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import tokens

        given = signature.bind(*args, **kwargs)

        def make(results: Any) -> Any:
            given.arguments["result_generator"] = results
            return original(*given.args, **given.kwargs)

        return tokens.streamed(given.arguments["result_generator"], make, given.arguments["request"].n or 1)

    return stream_generator


def _step_or_refuse(original: Any, module: Any) -> Any:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import update

        update.before_step(self)
        found = original(self, *args, **kwargs)
        update.after_step(self)
        return found

    return step


def _guarded(original: Any, module: Any) -> Any:
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import guard

        return guard.call(self, method, lambda: original(self, method, *args, **kwargs))

    return collective_rpc


def _guarded_async(original: Any, module: Any) -> Any:
    async def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import guard

        return await guard.call_async(self, method, lambda: original(self, method, *args, **kwargs))

    return collective_rpc


def _resuming(original: Any, module: Any) -> Any:
    async def resume_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import guard

        if await guard.resuming(self):
            await original(self, *args, **kwargs)

    return resume_generation


def _serve_weights(original: Any, module: Any) -> Any:
    def build_app(args: Any, *more: Any, **kwargs: Any) -> Any:
        from vllm_compat.weights import http

        endpoints = http.endpoints(args)  # refuses a wrong setting before anything is built
        app = original(args, *more, **kwargs)
        if endpoints is not None:
            endpoints.mount(app)
        return app

    return build_app


def _serve_weights_split(original: Any, module: Any) -> Any:
    async def build_and_serve(*args: Any, **kwargs: Any) -> Any:
        # build_app is another module's, and this one took its name before the environment activated us
        whole = module.build_app
        module.build_app = _serve_weights(whole, module)
        try:
            return await original(*args, **kwargs)
        finally:
            module.build_app = whole

    return build_and_serve


WEIGHTS = (
    _patch("core_update", Role.ENGINE_CORE, "vllm.v1.engine.core:EngineCore.vllm_compat_update", _core_update, adds=True),
    _patch(
        "v0_update", Role.ENGINE_CORE, "vllm.engine.llm_engine:LLMEngine.vllm_compat_update", _core_update,
        adds=True, versions=V0_ENGINE,
    ),
    _patch(
        "worker_weights", Role.WORKER, "vllm.worker.worker_base:WorkerBase.vllm_compat_weights", _worker_weights,
        adds=True, versions="<0.11.1",
    ),
    _patch(
        "worker_weights", Role.WORKER, "vllm.v1.worker.worker_base:WorkerBase.vllm_compat_weights", _worker_weights,
        adds=True, versions=">=0.11.1",
    ),
    _patch(
        "stamped", Role.ENGINE_CORE, "vllm.v1.core.sched.scheduler:Scheduler.update_from_output", _stamped, "scheduler_output"
    ),
    _patch(
        "read_stamp", Role.FRONT, "vllm.v1.engine.output_processor:OutputProcessor.process_outputs", _read_stamp,
        "engine_core_outputs",
    ),
    _patch(
        "output_versions", Role.FRONT, "vllm.v1.engine.output_processor:RequestState._new_completion_output", _completion,
        "token_ids",
    ),
    _patch(
        "token_versions", Role.FRONT, "vllm.outputs:CompletionOutput.token_weight_versions", _token_weight_versions, adds=True
    ),
    _patch("kv_versions", Role.FRONT, "vllm.outputs:CompletionOutput.kv_weight_versions", _kv_weight_versions, adds=True),
    _patch(
        "v0_output_versions", Role.FRONT, "vllm.outputs:RequestOutput.from_seq_group", _v0_output, "seq_group", versions=V0_ENGINE
    ),
    _patch(
        "v0_preempted", Role.ENGINE_CORE, "vllm.core.scheduler:Scheduler._preempt_by_recompute", _v0_preempted, "seq_group",
        versions=V0_ENGINE,
    ),
    *(
        _patch(name, Role.FRONT, f"vllm.entrypoints.openai.{module}:{path}", build, *params, versions=versions)
        for versions, completion, chat in (
            ("<0.15.0", "serving_completion", "serving_chat"), (">=0.15.0", "completion.serving", "chat_completion.serving")
        )
        for name, module, path, build, params in (
            (
                "completion_versions", completion, "OpenAIServingCompletion.request_output_to_completion_response",
                _completion_response, ("final_res_batch",),
            ),
            (
                "completion_stream_versions", completion, "OpenAIServingCompletion.completion_stream_generator", _stream,
                ("request", "result_generator"),
            ),
            (
                "chat_stream_versions", chat, "OpenAIServingChat.chat_completion_stream_generator", _stream,
                ("request", "result_generator"),
            ),
            (
                "chat_versions", chat, "OpenAIServingChat.chat_completion_full_generator", _chat_response,
                ("request", "result_generator"),
            ),
        )
    ),
    _patch("step", Role.FRONT, "vllm.v1.engine.llm_engine:LLMEngine.step", _step_or_refuse),
    _patch("v0_step", Role.FRONT, "vllm.engine.llm_engine:LLMEngine.step", _step_or_refuse, versions=V0_ENGINE),
    _patch("guard", Role.FRONT, "vllm.v1.engine.llm_engine:LLMEngine.collective_rpc", _guarded, "method"),
    _patch("v0_guard", Role.FRONT, "vllm.engine.llm_engine:LLMEngine.collective_rpc", _guarded, "method", versions=V0_ENGINE),
    _patch("guard_async", Role.FRONT, "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", _guarded_async, "method"),
    _patch("resuming", Role.FRONT, "vllm.v1.engine.async_llm:AsyncLLM.resume_generation", _resuming, versions=">=0.12.0"),
    _patch(
        "serve_weights", Role.FRONT, "vllm.entrypoints.openai.api_server:build_app", _serve_weights, "args", versions="<0.29.0"
    ),
    _patch(
        "serve_weights", Role.FRONT, "vllm.entrypoints.launchers.api_server.entry:build_and_serve", _serve_weights_split,
        versions=">=0.29.0",
    ),
)  # fmt: skip
