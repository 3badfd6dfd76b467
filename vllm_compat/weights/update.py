"""`weight_update`: V0's lock around an in-flight weight update, and the version that each one carries."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import warnings
import weakref
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any

from vllm_compat.errors import VllmCompatWarning, WeightUpdateError
from vllm_compat.patching.model import State
from vllm_compat.plan import of

_STAYS = (
    "The engine stays paused with its requests kept: run a complete update in a new `weight_update` block to go on, or shut "
    "the engine down."
)
_DOOR = "vllm_compat_update"
_VERSION = "_vllm_compat_weight_version"
_TIMEOUT = 600.0

_updating: weakref.WeakKeyDictionary[Any, weight_update] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[Any] = weakref.WeakSet()  # their workers have a fingerprint to compare with
_unfinished: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # weights may be mixed: engine -> why

# A phase of an update: yields ("core", command, argument) or ("workers", command, argument), is sent the answers.
Steps = Generator[tuple[str, str, dict[str, Any]], list[dict[str, Any]], None]


def version_of(owner: Any) -> int:
    """The weight version that the front of an engine knows. ``owner``: the engine, or its OutputProcessor."""
    owner = getattr(owner, "llm_engine", owner)
    return int(vars(getattr(owner, "output_processor", owner)).get(_VERSION, 0))


def is_updating(engine: Any) -> bool:
    """Whether an update of this engine is under way."""
    return engine in _updating


def paused_for(engine: Any) -> str | None:
    """Why the engine stays paused: its last update left weights that may be mixed. None where it does not."""
    return _unfinished.get(engine)


def resumed(engine: Any) -> bool:
    """The caller of an `AsyncLLM` ends a pause of his own. False where his resume must not reach the engine core now: it would
    let steps run inside an update, whose end resumes the engine. Raises WeightUpdateError where the last update left weights
    that may be mixed."""
    plan = of(engine.vllm_config)
    if plan is None or plan["synchronized_weight_update"].state is not State.NATIVE:
        return True  # before 0.17.0 vLLM's pause is not the one that holds the steps
    if engine in _updating:
        _updating[engine]._paused_before = False
        return False
    if engine in _unfinished:
        raise WeightUpdateError(f"{_unfinished[engine]} {_STAYS}")
    return True


def before_step(engine: Any) -> None:
    """Raises WeightUpdateError where the last update left weights that may be mixed; ends what a guarded call began, and makes
    an update of what the caller's own code did to the model."""
    from vllm_compat.weights import guard

    guard.settle(engine)
    guard.look(engine)
    if engine in _unfinished and engine not in _updating:
        raise WeightUpdateError(f"{_unfinished[engine]} {_STAYS}")


def after_step(engine: Any) -> None:
    """A synchronous engine has done a step."""
    from vllm_compat.weights import guard

    guard.stepped(engine)


class weight_update:
    """Hold an engine between two steps while the weights change: ``with`` for `LLM` and `LLMEngine`, ``async with``
    for `AsyncLLM`. The block runs the user's own transport, usually ``engine.collective_rpc(...)``, or `load`.

    Inside the block no step runs on any rank and none starts. Running requests keep their KV cache and continue
    after it: token k comes from the old weights, token k+1 from the new. New requests wait. No cache is cleared.
    Before the first of them every worker tests itself again, as it did at the start: the head against the new weights;
    tensor-parallel ranks compare checksums of what they hold alike. Then the engine has weight version ``version``
    (default: the last one + 1), which its outputs carry per token (`vllm_compat.weights.tokens`).

    Raises WeightUpdateError where the engine is not under vllm_compat, the behavior is off, the version is not newer,
    another update is under way, or the engine does not come to rest. If the block raises, each worker compares the bytes of its
    weights with those before: untouched, the engine goes on with them; changed, or a self-test fails after the block (under
    strict; a warning otherwise), the weights may be mixed. Then the error goes on, and the engine stays paused until an update
    succeeds: its synchronous steps and new requests raise, open streams of `AsyncLLM` end with the error (their requests are
    gone), requests of `LLMEngine` are kept.
    """

    def __init__(self, engine: Any, version: int | None = None) -> None:
        self.engine = getattr(engine, "llm_engine", engine)
        self.version = version
        self._asked = version
        self._async = not hasattr(self.engine, "step")
        self._paused_before = False
        self.changed: frozenset[str] = frozenset()  # once it is over: the parameters that are not what they were
        self._failed: BaseException | None = None  # a `load` that changed nothing in the end, and that nobody repeated

    def load(
        self, source: Any, *, finite: bool = False, partial: bool = False, keep_old: bool = True, timeout: float = _TIMEOUT
    ) -> Any:
        """Take in new weights and put them in: on every rank, or on none. Under ``async with``: a coroutine.

        ``source``: the path of a safetensors file or a folder of them, or a transport's dict (`vllm_compat.weights.transports`).
        Every tensor is received beside the model and checked (name, shape, dtype; with ``finite`` its values too; all of the
        checkpoint's, unless ``partial``) before the first byte of the model changes, and all ranks must have received the same
        bytes. Costs, on each rank's host: the new weights once where the transport cannot read them twice (a process group),
        the old weights once (``keep_old``), until the block ends.

        Raises WeightUpdateError naming the tensor; then nothing has changed, or the old weights are back, byte by byte, and the
        engine goes on with them when the block ends; or, if they are not, it stays paused.
        """
        if isinstance(source, (str, os.PathLike)):
            source = {"transport": "files", "path": os.path.abspath(source)}
        if not isinstance(source, Mapping):
            raise WeightUpdateError(f"a source is a path or a transport's dict, not {type(source).__name__}")
        if self.engine not in _updating:
            raise WeightUpdateError("load belongs inside the block: `with weight_update(engine) as update: update.load(source)`")
        steps = self._load(dict(source), finite, partial, keep_old, timeout)
        return self._drive_async(steps) if self._async else self._drive(steps)

    def __enter__(self) -> weight_update:
        if self._async:
            raise WeightUpdateError("this engine is asynchronous: write `async with vllm_compat.weight_update(engine):`")
        self._drive(self._enter())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._drive(self._exit(error))

    async def __aenter__(self) -> weight_update:
        if not self._async:
            raise WeightUpdateError("this engine is synchronous: write `with vllm_compat.weight_update(engine):`")
        from vllm_compat.proof import prove_async

        await prove_async(self.engine)
        await self._drive_async(self._enter())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._drive_async(self._exit(error))

    # --- the phases ----------------------------------------------------------------------------------------------------

    def _enter(self) -> Steps:
        self.check()
        _updating[self.engine] = self
        try:
            answers = yield "core", "begin", {}
            if not all(answer["resting"] for answer in answers):
                raise WeightUpdateError("the engine did not come to rest: nothing was changed")
            self._paused_before = any(answer.get("before", False) for answer in answers) and self.engine not in _unfinished
            known = max(answer["version"] for answer in answers)
            if self._asked is not None and self._asked <= known:
                raise WeightUpdateError(f"weight version {self._asked} is not newer than the engine's, {known}")
            self.version = known + 1 if self._asked is None else self._asked
            if self.engine not in _seen or self.engine in _unfinished:
                raise_first((yield "workers", "baseline", {}))
                _seen.add(self.engine)
        except BaseException:  # also an interrupt, or a cancelled task
            _updating.pop(self.engine, None)
            if self.engine not in _unfinished and not self._paused_before:  # nothing has changed, so the engine may go on
                yield "core", "resume", {}
            raise

    def _load(self, source: dict[str, Any], finite: bool, partial: bool, keep_old: bool, timeout: float) -> Steps:
        try:
            yield from staging({"source": source, "timeout": timeout, "finite": finite, "partial": partial}, {})
            yield from committing(keep_old)
            self._failed = None
        except BaseException as error:
            self._failed = error
            raise

    def _exit(self, error: BaseException | None) -> Steps:
        try:
            failed = error or self._failed  # also where the block swallowed what `load` raised: there is no new version
            if failed is None:
                yield from self._finish()
            else:
                yield from self._broken(failed)
        finally:
            _updating.pop(self.engine, None)

    def _finish(self) -> Steps:
        try:
            alone = not self._paused_before and self._cores() == 1
            answers = yield "core", "finish", {"version": self.version, "resume": alone}
            problems = [answer["problem"] for answer in answers if answer["problem"]]
            if problems:
                raise WeightUpdateError(f"{problems[0]}. {_STAYS}")
        except BaseException as error:  # also an interrupt
            self._stuck(str(error) or type(error).__name__)
            raise
        for answer in answers:
            if answer["warning"]:
                warnings.warn(f"after the weight update: {answer['warning']}", VllmCompatWarning, stacklevel=5)
        assert self.version is not None
        self.changed = frozenset(name for answer in answers for name in answer["changed"])
        setattr(getattr(self.engine, "output_processor", self.engine), _VERSION, self.version)
        _unfinished.pop(self.engine, None)
        if not (alone or self._paused_before):
            yield "core", "resume", {}

    def _broken(self, error: BaseException) -> Steps:
        """The block raised: go on with the old weights if they are all there."""
        if self.engine in _unfinished:
            error.add_note(f"vllm_compat: the weight update did not finish. {_STAYS}")
            return
        try:
            answers = yield "workers", "changes", {}
            changed = sorted({name for answer in answers for name in answer.get("changed", ())})
            unknown = [answer["error"] for answer in answers if "error" in answer]
        except BaseException as lost:
            self._stuck(f"the engine does not answer ({lost})")
            error.add_note(f"vllm_compat: the weight update did not finish, and the engine does not answer: {lost}")
            return
        if changed or unknown:
            what = unknown[0] if unknown else f"{changed[0]} and {len(changed) - 1} more parameters had changed"
            self._stuck(f"a weight update did not finish ({type(error).__name__}: {error}); {what}.")
            error.add_note(f"vllm_compat: the weight update did not finish: {what}. {_STAYS}")
            return
        error.add_note(
            "vllm_compat: the weight update did not finish; the weights are as before, and the engine goes on with them."
        )
        if not self._paused_before:
            yield "core", "resume", {}

    def check(self) -> None:
        """Raises WeightUpdateError where this block would be refused before the engine is asked."""
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
        if self._asked is not None and (isinstance(self._asked, bool) or not isinstance(self._asked, int)):
            raise WeightUpdateError(f"a weight version is an int, not {self._asked!r}")
        if self.engine in _updating:
            raise WeightUpdateError("another weight update of this engine is under way: one at a time")

    def _stuck(self, why: str) -> None:
        """The engine stays paused. Whoever waits for a token is told; on a synchronous engine the next step tells."""
        _unfinished[self.engine] = why
        if self._async:
            error = WeightUpdateError(f"{why} The engine stays paused until an update succeeds; this request is over.")
            for state in list(self.engine.output_processor.request_states.values()):
                if state.queue is not None:
                    state.queue.put(error)

    # --- how they reach the engine -------------------------------------------------------------------------------------

    def _cores(self) -> int:
        return len(getattr(getattr(self.engine, "engine_core", None), "core_engines", None) or (1,))

    def _drive(self, steps: Steps) -> None:
        def ask(command: str, argument: str) -> list[Any]:
            client = getattr(self.engine, "engine_core", None)
            if client is None:  # V0: the engine is its own core
                return [getattr(self.engine, _DOOR)(command, argument)]
            if hasattr(client, "call_utility"):
                return [client.call_utility(_DOOR, command, argument)]
            return [getattr(client.engine_core, _DOOR)(command, argument)]

        try:
            call = next(steps)
            while True:
                try:
                    answers = _answers(call, ask(*_message(call)))
                except BaseException as error:  # the phase decides what becomes of the engine
                    call = steps.throw(error)
                else:
                    call = steps.send(answers)
        except StopIteration:
            return

    async def _drive_async(self, steps: Steps) -> None:
        async def ask(command: str, argument: str) -> list[Any]:
            client = self.engine.engine_core
            if hasattr(client, "call_utility_all_async"):  # from 0.32.0
                return list(await client.call_utility_all_async(_DOOR, command, argument))
            cores = getattr(client, "core_engines", None)
            if not cores:
                return [await client.call_utility_async(_DOOR, command, argument)]
            every = (client._call_utility_async(_DOOR, command, argument, engine=core) for core in cores)
            return list(await asyncio.gather(*every))

        cancelled: BaseException | None = None
        try:
            call = next(steps)
            while True:
                asking = asyncio.ensure_future(ask(*_message(call)))
                try:
                    # A cancelled task does not take the engine's answer with it: what began is waited for.
                    answers = _answers(call, await asyncio.shield(asking))
                except BaseException as error:
                    while not asking.done():
                        with contextlib.suppress(asyncio.CancelledError):  # cancelled again
                            await asyncio.wait([asking])
                    if call[1] == "finish" and isinstance(error, asyncio.CancelledError) and asking.exception() is None:
                        cancelled = error  # the update is complete, and the engine goes on
                        call = steps.send(_answers(call, asking.result()))
                    else:
                        call = steps.throw(error)
                else:
                    call = steps.send(answers)
        except StopIteration:
            if cancelled is not None:
                raise cancelled from None


def staging(given: dict[str, Any], found: dict[str, Any]) -> Steps:
    """The new weights beside the model, the same bytes on all ranks, or nowhere. ``found`` gets their checksum and number."""
    try:
        staged = yield "workers", "stage", given
        raise_first(staged)
        sums = {(answer["checksum"], answer["tensors"]) for answer in staged}
        if len(sums) > 1:
            raise WeightUpdateError(f"the ranks received different bytes: {[answer['checksum'] for answer in staged]}")
    except BaseException:
        yield from dropping()
        raise
    found["checksum"], found["tensors"] = sums.pop()


def dropping() -> Steps:
    """Forget what is staged."""
    yield "workers", "drop", {}


def committing(keep_old: bool = True) -> Steps:
    """What is staged goes in on all ranks, or the old weights come back on all."""
    try:
        raise_first((yield "workers", "commit", {"keep_old": keep_old}))
    except BaseException as error:
        back = yield "workers", "rollback", {}
        lost = [answer["error"] for answer in back if "error" in answer]
        what = f"the old weights could not be put back: {lost[0]}" if lost else "the old weights are back"
        error.add_note(f"vllm_compat: {what}")
        raise


def _message(call: tuple[str, str, dict[str, Any]]) -> tuple[str, str]:
    to, command, argument = call
    if to == "core":
        return command, json.dumps(argument)
    return "workers", json.dumps({"command": command, "argument": argument})


def _answers(call: tuple[str, str, dict[str, Any]], raw: list[Any]) -> list[dict[str, Any]]:
    """One per core; of workers, those of all cores."""
    found = [json.loads(answer.result() if hasattr(answer, "result") else answer) for answer in raw]
    return found if call[0] == "core" else [one for answers in found for one in answers]


def raise_first(answers: list[dict[str, Any]]) -> None:
    """WeightUpdateError for the first worker that answers with an error."""
    for number, answer in enumerate(answers):
        if "error" in answer:
            where = f" (rank {number} of {len(answers)})" if len(answers) > 1 else ""
            raise WeightUpdateError(answer["error"] + where)
