"""
What the engine core does in a weight update, called by name over RPC, one call per phase.

`begin` brings the scheduler to rest between two steps, keeping every cache; `finish` has each worker test itself, compares the
ranks, notes how many tokens every request had, takes the new version, and lets the steps go on: vLLM's own pause and resume
are as many calls, and AsyncLLM's sleeps 20 ms on top.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm_compat import plan as plans
from vllm_compat import report
from vllm_compat.patching.model import State
from vllm_compat.weights import version as versions

_WORKER = "vllm_compat_weights"
_VERSION = "_vllm_compat_weight_version"


def handle(core: Any, command: str, argument: str) -> Any:
    """One command, as JSON, or a future of it where the core has to come to rest first."""
    found = _COMMANDS[command](core, **json.loads(argument))
    if not isinstance(found, Future):
        return json.dumps(found)
    answer: Future[str] = Future()

    def done(finished: Future[Any]) -> None:
        error = finished.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(json.dumps(_resting(core)))

    found.add_done_callback(done)
    return answer


def version_of(core: Any) -> int:
    """The weight version of one engine core."""
    return int(vars(core).get(_VERSION, 0))


def _held_by(core: Any) -> State:
    plan = plans.of(core.vllm_config)
    return State.NOT_NEEDED if plan is None else plan["synchronized_weight_update"].state


def _resting(core: Any) -> dict[str, Any]:
    paused = core.is_scheduler_paused() if hasattr(core, "is_scheduler_paused") else True
    return {"resting": bool(paused), "version": version_of(core)}


def _begin(core: Any) -> Any:
    state = _held_by(core)
    if state is State.NATIVE:
        before = core.is_scheduler_paused()
        waiting = core.pause_scheduler("keep", False)
        return waiting if isinstance(waiting, Future) else {**_resting(core), "before": before}
    if state is State.PENDING:
        return {**_resting(core), "resting": core.vllm_compat_hold(True)}
    return _resting(core)


def _resume(core: Any) -> dict[str, Any]:
    state = _held_by(core)
    if state is State.NATIVE:
        core.resume_scheduler()
    elif state is State.PENDING:
        core.vllm_compat_hold(False)
    return {}


def _workers(core: Any, command: str, argument: dict[str, Any]) -> list[dict[str, Any]]:
    answers = core.model_executor.collective_rpc(_WORKER, args=(command, json.dumps(argument)))
    return [json.loads(answer) for answer in answers]


def _finish(core: Any, version: int, resume: bool) -> dict[str, Any]:
    answers = _workers(core, "finish", {})
    errors = [f"worker {i}: {answer['error']}" for i, answer in enumerate(answers) if "error" in answer]
    plan = plans.of(core.vllm_config)
    problem, warning = "; ".join(errors), ""
    if not errors and plan is not None:
        # The workers alone: a paused engine core is not as it promised, and that is what is wanted.
        status = report.EngineStatus(plan, 0)
        status.take([json.loads(answer["report"]) for answer in answers])
        found = "; ".join(
            f"{name} in {role}{'' if rank is None else f' rank {rank}'}: {reason}" for name, role, rank, reason in status.failures
        )
        problem, warning = (found, "") if plan.strict else ("", found)
        if problem:
            problem = f"after the weight update the engine does not do what it was started with: {problem}"
        elif any(answer["replicated"] != answers[0]["replicated"] for answer in answers):
            problem = "the tensor-parallel ranks hold different weights where they must hold the same"
    if problem:
        return {"problem": problem, "warning": "", "version": version_of(core), "changed": []}
    _advance_tokens(core, version)
    setattr(core, _VERSION, version)
    versions.advance(max(version, versions.current() + 1))  # engines in one process share it
    if hasattr(core, "set_weight_version"):  # vLLM's own, 0.27.0 on
        core.set_weight_version(str(version))
    if resume:
        _resume(core)
    changed = sorted({name for answer in answers for name in answer["changed"]})
    return {"problem": "", "warning": warning, "version": version, "changed": changed}


def _advance_tokens(core: Any, version: int) -> None:
    from vllm_compat.weights import tokens

    v1 = hasattr(core, "model_executor") and not isinstance(core.scheduler, list)
    (tokens.advance if v1 else tokens.advance_v0)(core, version)


_COMMANDS: dict[str, Callable[..., Any]] = {"begin": _begin, "resume": _resume, "workers": _workers, "finish": _finish}
