"""Proof, not hope: every process of a started engine says what is in force in it, and the front compares.

The front asks the engine core by name over vLLM's own utility calls; the core asks its workers over
``collective_rpc``. The checks that run there belong to the behaviors.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import warnings
import weakref
from typing import Any

from vllm_compat import bootstrap, report
from vllm_compat import plan as plans
from vllm_compat.behaviors import BY_NAME
from vllm_compat.engine_hooks import FRAME
from vllm_compat.errors import ProofError, TooLateError, VllmCompatWarning
from vllm_compat.patching import replace
from vllm_compat.patching.model import CheckFailed, Entry, Role, State
from vllm_compat.plan import Plan
from vllm_compat.version import __version__

_log = logging.getLogger("vllm.vllm_compat")  # below vLLM's own logger, so that it shows where vLLM's lines show
_METHOD = "vllm_compat_report"
_unproven: weakref.WeakKeyDictionary[Any, asyncio.Lock] = weakref.WeakKeyDictionary()


# --- in the front -----------------------------------------------------------------------------------------------


def before_start(vllm_config: Any) -> Plan | None:
    """The plan of the configuration an engine is about to start from. Raises TooLateError where it has none."""
    if bootstrap.process.settings is None:
        return None
    found = plans.of(vllm_config)
    if found is None:
        raise TooLateError(
            "this engine's configuration was made before vllm_compat was active, or without "
            "EngineArgs.create_engine_config: import vllm_compat first, then make the configuration again"
        )
    return found


def prove(engine: Any, plan: Plan | None) -> None:
    """Ask a started `LLMEngine`, V1's or V0's. Under strict raises ProofError, with the engine shut down."""
    if plan is not None:
        try:
            _judge(engine, plan, ask(engine))
        except ProofError:
            (engine.engine_core if hasattr(engine, "engine_core") else engine.model_executor).shutdown()
            raise


def expect(engine: Any, plan: Plan | None) -> None:
    """An `AsyncLLM` cannot be asked while it is being made; it is before it answers its first question."""
    if plan is not None:
        report.engine(engine, plan)
        _unproven[engine] = asyncio.Lock()


def is_proven(engine: Any) -> bool:
    """Whether nothing is left to ask of an `AsyncLLM`."""
    return engine not in _unproven


async def prove_async(engine: Any) -> None:
    """Ask an `AsyncLLM` once; all its callers wait. Under strict raises ProofError, with the engine shut down."""
    lock = _unproven.get(engine)
    if lock is None:
        return
    async with lock:
        if is_proven(engine):
            return
        status = report.engine(engine)
        if status.failures:  # asked before, and shut down
            raise ProofError(status.failures)
        try:
            _judge(engine, status.plan, await ask_async(engine))
        except ProofError:
            engine.shutdown()
            raise
        del _unproven[engine]


def ask(engine: Any) -> list[str]:
    """The answer of each engine core behind a synchronous engine, as JSON; a failure to answer is an answer."""
    try:
        client = getattr(engine, "engine_core", None)
        if client is None:  # V0: the engine is its own core
            return [getattr(engine, _METHOD)()]
        if hasattr(client, "call_utility"):
            return [client.call_utility(_METHOD)]
        return [getattr(client.engine_core, _METHOD)()]
    except Exception as error:
        return [_no_answer(error)]


async def ask_async(engine: Any) -> list[str]:
    """The same behind an `AsyncLLM`: one answer per data-parallel replica."""
    client = engine.engine_core
    try:
        if hasattr(client, "call_utility_all_async"):  # from 0.32.0
            return list(await client.call_utility_all_async(_METHOD))
        identities = getattr(client, "core_engines", None)
        if not identities:
            return [await client.call_utility_async(_METHOD)]
        return list(await asyncio.gather(*(client._call_utility_async(_METHOD, engine=identity) for identity in identities)))
    except Exception as error:
        return [_no_answer(error)]


def _no_answer(error: Exception) -> str:
    reason = f"it does not answer: vllm_compat is not active there ({type(error).__name__}: {str(error)[:300]})"
    return json.dumps([{"role": Role.ENGINE_CORE.value, "error": reason}])


def _judge(engine: Any, plan: Plan, answers: list[str]) -> None:
    reports = [_front_report(plan), *(found for answer in answers for found in json.loads(answer))]
    status = report.engine(engine, plan)
    status.take(reports)
    if status.failures:
        error = ProofError(status.failures)
        if plan.strict:
            raise error
        warnings.warn(str(error), VllmCompatWarning, stacklevel=4)
    status.save()
    _log.info("%s", status.line())


def _front_report(plan: Plan) -> dict[str, Any]:
    return _process_report(Role.FRONT, None, plan, None)


# --- in every process -------------------------------------------------------------------------------------------


def core_report(core: Any) -> str:
    """JSON list: the engine core's report, then one per worker."""
    found = plans.of(core.vllm_config)
    reports = [_process_report(Role.ENGINE_CORE, core, found, None)]
    try:
        answers = core.model_executor.collective_rpc(_METHOD)
        reports += [json.loads(answer) for answer in answers]
        parallel = core.vllm_config.parallel_config
        # Under an external launcher every rank has a front of its own, which asks for itself.
        missing = (1 if parallel.distributed_executor_backend == "external_launcher" else parallel.world_size) - len(answers)
        if missing:
            reports.append({"role": Role.WORKER.value, "error": f"{missing} workers did not answer"})
    except Exception as error:
        reason = f"no answer: {type(error).__name__}: {str(error)[:500]}"
        reports.append({"role": Role.WORKER.value, "error": reason})
    return json.dumps(reports)


def worker_report(worker: Any, updated: bool = False) -> str:
    """JSON: one worker's report, self-test included. ``updated``: after a weight update, of which only some checks can tell."""
    return json.dumps(_process_report(Role.WORKER, worker, plans.of(worker.vllm_config), worker.rank, updated))


def _process_report(role: Role, subject: Any, plan: Plan | None, rank: int | None, updated: bool = False) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "role": role.value,
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "vllm_compat": __version__,
        "plan": plan.digest() if plan else None,
        "frame": _frame_problems(role),
        "behaviors": {},
    }
    if plan is None:
        return {**facts, "error": "its configuration carries no plan"}
    if subject is not None and (bootstrap.process.plan is None or bootstrap.process.plan.text() != plan.text()):
        return {**facts, "error": "the patches in this process belong to another engine's plan"}
    for decision in plan.decisions:
        behavior = BY_NAME[decision.behavior]
        patches, checks = {}, {}
        for patch in behavior.patches():
            if patch.name in decision.patches and patch.role is role:
                entry = bootstrap.process.patches.get(f"{behavior.name}/{patch.name}")
                if entry is not None or not patch.lazy:
                    patches[patch.name] = _patch_state(entry)
        if decision.wanted:
            used = {key: e.exercised for key, e in bootstrap.process.patches.items() if isinstance(e, Entry)}
            for check in behavior.checks:
                if check.role is role and (not check.modes or decision.mode in check.modes) and (check.of_weights or not updated):
                    checks[check.name] = _run(check, subject)
            for key, exercised in used.items():  # a self-test is not a request
                tested = bootstrap.process.patches[key]
                if isinstance(tested, Entry):
                    tested.exercised = exercised
        if patches or checks:
            facts["behaviors"][behavior.name] = {"patches": patches, "checks": checks}
    return facts


def _run(check: Any, subject: Any) -> list[Any]:
    try:
        return [True, check.run(subject)]
    except CheckFailed as failed:
        return [False, str(failed)]
    except Exception as error:  # a check that cannot run proves nothing
        return [False, f"the self-test stopped: {type(error).__name__}: {str(error)[:300]}"]


def _patch_state(entry: Any) -> list[str]:
    if entry is None:
        return [State.PENDING.value, "its module is not imported in this process"]
    if not isinstance(entry, Entry):
        return [State.FAILED.value, str(entry)]
    if not replace.in_place(entry):
        return [State.FAILED.value, f"somebody replaced {entry.patch.target.path} after vllm_compat"]
    return [State.EXERCISED.value if entry.exercised else State.APPLIED.value, entry.patch.target.path]


def _frame_problems(role: Role) -> dict[str, str]:
    """What of our own frame this process imported and does not have in place."""
    states = {
        p.name: _patch_state(bootstrap.process.frame[p.name])
        for p in FRAME
        if p.role is role and p.name in bootstrap.process.frame
    }
    return {name: reason for name, (state, reason) in states.items() if state == State.FAILED.value}
