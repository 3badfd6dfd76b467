"""`weight_update`: V0's lock around an in-flight weight update."""

from __future__ import annotations

import asyncio
import json
import warnings
import weakref
from types import TracebackType
from typing import Any

from vllm_compat import report
from vllm_compat.errors import VllmCompatWarning, WeightUpdateError
from vllm_compat.patching.model import State
from vllm_compat.plan import of

_STAYS = (
    "The engine stays paused with its requests kept: run a complete update in a new `weight_update` block to go on, or shut "
    "the engine down."
)
_REPORT = "vllm_compat_report"

_updating: weakref.WeakSet[Any] = weakref.WeakSet()
_unfinished: weakref.WeakSet[Any] = weakref.WeakSet()  # paused by an update whose block raised: weights may be mixed


class weight_update:
    """Hold an engine between two steps while the weights change: ``with`` for `LLM` and `LLMEngine`, ``async with``
    for `AsyncLLM`. The block runs the user's own transport, usually ``engine.collective_rpc(...)``.

    Inside the block no step runs on any rank and none starts. Running requests keep their KV cache and continue
    after it: token k comes from the old weights, token k+1 from the new. New requests wait. No cache is cleared.
    Before the first of them every worker tests itself again, as it did at the start: the head against the new weights.

    Raises WeightUpdateError where the engine is not under vllm_compat, the behavior is off, another update is under
    way, or the engine does not come to rest. If the block raises, or a self-test fails after it (under strict; a warning
    otherwise), the weights may be mixed: the error goes on, and the engine stays paused, with all requests kept, until an
    update succeeds.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = getattr(engine, "llm_engine", engine)
        self._async = not hasattr(self.engine, "step")
        self._state = State.NATIVE

    def __enter__(self) -> weight_update:
        if self._async:
            raise WeightUpdateError("this engine is asynchronous: write `async with vllm_compat.weight_update(engine):`")
        self._begin()
        try:
            if self._state is State.NATIVE:
                self._call("pause_scheduler", "keep", False)
                self._rest(self._call("is_scheduler_paused"))
            elif self._state is State.PENDING:
                self._rest(self._call("vllm_compat_hold", True))
        except BaseException:  # also an interrupt
            _updating.discard(self.engine)
            if self.engine not in _unfinished:  # nothing has changed, so the engine may go on
                self._resume()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._finished(error):
            try:
                self._judge(self.engine.collective_rpc(_REPORT))
            except BaseException:  # also an interrupt
                _unfinished.add(self.engine)
                raise
            self._resume()

    async def __aenter__(self) -> weight_update:
        if not self._async:
            raise WeightUpdateError("this engine is synchronous: write `with vllm_compat.weight_update(engine):`")
        from vllm_compat.proof import prove_async

        await prove_async(self.engine)
        self._begin()
        try:
            if self._state is State.NATIVE:
                await self.engine.pause_generation(mode="keep", clear_cache=False)
                self._rest(await self.engine.is_paused())
            else:
                self._rest(await self.engine.engine_core.call_utility_async("vllm_compat_hold", True))
        except BaseException:  # also a cancelled task
            _updating.discard(self.engine)
            if self.engine not in _unfinished:  # nothing has changed, so the engine may go on
                await asyncio.shield(self._resume_async())
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._finished(error):
            try:
                self._judge(await self.engine.collective_rpc(_REPORT))
            except BaseException:  # also a cancelled task
                _unfinished.add(self.engine)
                raise
            await self._resume_async()

    def _begin(self) -> None:
        if self._async and not hasattr(self.engine, "engine_core"):
            raise WeightUpdateError("V0's AsyncLLMEngine is not supported: use LLM or LLMEngine, whose steps your own code runs")
        config = getattr(self.engine, "vllm_config", None)
        plan = of(config) if config is not None else None
        if plan is None:
            raise WeightUpdateError(
                f"{type(self.engine).__name__} is not an engine under vllm_compat: import vllm_compat before it is made"
            )
        decision = plan["synchronized_weight_update"]
        if not (decision.wanted or decision.state is State.NOT_NEEDED):
            raise WeightUpdateError(f"synchronized_weight_update is {decision.state.value}: {decision.reason}")
        if self.engine in _updating:
            raise WeightUpdateError("another weight update of this engine is under way: one at a time")
        self._state = decision.state
        _updating.add(self.engine)

    def _resume(self) -> None:
        if self._state is State.NATIVE:
            self._call("resume_scheduler")
        elif self._state is State.PENDING:
            self._call("vllm_compat_hold", False)

    async def _resume_async(self) -> None:
        if self._state is State.NATIVE:
            await self.engine.resume_generation()
        else:
            await self.engine.engine_core.call_utility_async("vllm_compat_hold", False)

    def _call(self, method: str, *args: Any) -> Any:
        client = self.engine.engine_core
        if hasattr(client, "call_utility"):
            return client.call_utility(method, *args)
        return getattr(client.engine_core, method)(*args)

    def _rest(self, paused: bool) -> None:
        if not paused:
            raise WeightUpdateError("the engine did not come to rest: nothing was changed")

    def _judge(self, answers: list[str]) -> None:
        # The workers alone, and not for the record: a paused engine core is not as it promised, and that is what is wanted.
        status = report.EngineStatus(report.engine(self.engine).plan, 0)
        status.take([json.loads(answer) for answer in answers])
        if not status.failures:
            return
        found = "; ".join(
            f"{name} in {role}{'' if rank is None else f' rank {rank}'}: {reason}" for name, role, rank, reason in status.failures
        )
        sentence = f"after the weight update the engine does not do what it was started with: {found}"
        if status.plan.strict:
            raise WeightUpdateError(f"{sentence}. {_STAYS}")
        warnings.warn(sentence, VllmCompatWarning, stacklevel=3)

    def _finished(self, error: BaseException | None) -> bool:
        _updating.discard(self.engine)
        if error is None:
            _unfinished.discard(self.engine)
            return True
        _unfinished.add(self.engine)
        error.add_note(f"vllm_compat: the weight update did not finish. {_STAYS}")
        return False
