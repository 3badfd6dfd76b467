"""What is in force: one status per engine, merged from the reports of its processes."""

from __future__ import annotations

import atexit
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_compat import bootstrap
from vllm_compat.patching.model import State
from vllm_compat.plan import Plan
from vllm_compat.version import __version__

_engines: weakref.WeakKeyDictionary[Any, EngineStatus] = weakref.WeakKeyDictionary()
_made = 0
# What only the front says about engines with a plan, by its digest. Not in the plan: that is in vLLM's compile cache key.
_front_notes: dict[str, tuple[str, ...]] = {}


def note(plan: Plan, notes: tuple[str, ...]) -> None:
    """Show ``notes`` with every engine of this process that has this plan."""
    _front_notes[plan.digest()] = notes


class EngineStatus:
    """One engine: its plan, and what each of its processes reported. ``print`` it, or use `to_dict`."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.number = plan, number
        self._file: Path | None = None
        self.processes: list[dict[str, Any]] = []
        self.failures: list[tuple[str, str, int | None, str]] = []

    def take(self, reports: list[dict[str, Any]]) -> None:
        """Merge the processes' answers and collect what is not in force, as ProofError wants it."""
        self.processes, self.failures = reports, []
        for found in reports:
            where = (found["role"], found.get("rank"))
            if "error" in found:
                self.failures.append(("vllm_compat", *where, found["error"]))
                continue
            if found["plan"] != self.plan.digest():
                self.failures.append(("vllm_compat", *where, f"runs plan {found['plan']}, not {self.plan.digest()}"))
            if found["vllm_compat"] != __version__:
                reason = f"runs vllm_compat {found['vllm_compat']}, the front {__version__}"
                self.failures.append(("vllm_compat", *where, reason))
            for name, problem in found["frame"].items():
                self.failures.append(("vllm_compat", *where, f"its own hook {name} is not in place: {problem}"))
            for behavior, seen in found["behaviors"].items():
                for patch, (state, reason) in seen["patches"].items():
                    if state not in (State.APPLIED.value, State.EXERCISED.value):
                        self.failures.append((behavior, *where, f"patch {patch}: {reason}"))
                for held, sentence in seen["checks"].values():
                    if not held:
                        self.failures.append((behavior, *where, sentence))

    def states(self) -> dict[str, tuple[State, str]]:
        """Behavior -> (state, sentence), over all processes."""
        failed = {behavior: reason for behavior, _, _, reason in reversed(self.failures)}
        result = {}
        for decision in self.plan.decisions:
            state, reason = decision.state, decision.reason
            if decision.behavior in failed:
                state, reason = State.FAILED, failed[decision.behavior]
            elif decision.wanted and decision.patches:
                words = {word for word, _ in self._patches(decision.behavior)}
                if State.EXERCISED.value in words:
                    state = State.EXERCISED
                elif words:
                    state = State.APPLIED
            result[decision.behavior] = (state, reason)
        return result

    def _patches(self, behavior: str) -> Iterable[list[str]]:
        for found in self.processes:
            yield from found.get("behaviors", {}).get(behavior, {}).get("patches", {}).values()

    @property
    def proven(self) -> bool:
        """Every process answered and nothing wanted is missing."""
        return bool(self.processes) and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON. ``evidence`` holds what each process's checks saw."""
        behaviors = {}
        for name, (state, reason) in self.states().items():
            decision = self.plan[name]
            behaviors[name] = {
                "state": state.value, "decided_by": decision.origin, "route": decision.route, "reason": reason,
                "sets": list(decision.sets), "evidence": self._evidence(name),
            }  # fmt: skip
        return {
            "vllm_compat": __version__, "vllm": self.plan.vllm, "model_runner": self.plan.runner,
            "profile": self.plan.profile, "strict": self.plan.strict, "plan": self.plan.digest(), "proven": self.proven,
            "notes": [*self.plan.notes, *_front_notes.get(self.plan.digest(), ())], "behaviors": behaviors,
            "processes": [{k: p.get(k) for k in ("role", "rank", "pid", "host", "error")} for p in self.processes],
            "failures": [dict(zip(("behavior", "process", "rank", "reason"), failure)) for failure in self.failures],
        }  # fmt: skip

    def _evidence(self, behavior: str) -> list[dict[str, Any]]:
        rows = []
        for found in self.processes:
            for held, sentence in found.get("behaviors", {}).get(behavior, {}).get("checks", {}).values():
                rows.append({k: found[k] for k in ("role", "rank", "pid", "host")} | {"held": held, "saw": sentence})
        return rows

    def line(self) -> str:
        """One sentence for the log."""
        states = [state for state, _ in self.states().values()]
        held = sum(state in (State.NATIVE, State.APPLIED, State.EXERCISED) for state in states)
        rest = len(states) - held
        return (
            f"vllm_compat: {held} behaviors of V0 {'in force' if self.proven else 'NOT PROVEN'} in "
            f"{len(self.processes)} processes (profile {self.plan.profile}"
            + (f"; {rest} given up: see vllm_compat.status()" if rest else "") + ")"
        )  # fmt: skip

    def __str__(self) -> str:
        return table(self.to_dict())

    def save(self) -> None:
        """Write the report file that `vllm-compat doctor` reads; it goes when this process ends."""
        folder = report_dir()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():  # the default name can be guessed by others of this machine
                raise PermissionError("the folder belongs to somebody else; set VLLM_COMPAT_REPORT_DIR")
            file = folder / f"engine-{os.getpid()}-{self.number}.json"
            draft = file.with_suffix(".tmp")
            draft.write_text(json.dumps(self.to_dict()), encoding="utf-8")
            draft.replace(file)
        except OSError as error:  # a report nobody can read must not stop an engine that is proven
            logging.getLogger("vllm.vllm_compat").warning("no report in %s: %s", folder, error)
            return
        if self._file is None:  # asked again, it is written again: one exit handler is enough
            self._file = file
            atexit.register(file.unlink, missing_ok=True)


def report_dir() -> Path:
    """Where reports of running engines lie."""
    current = bootstrap.process.settings
    if current is not None and current.report_dir:
        return Path(current.report_dir)
    return Path(tempfile.gettempdir()) / f"vllm_compat-{os.getuid()}"


def engine(owner: Any, plan: Plan | None = None) -> EngineStatus:
    """The status kept for an engine object; made where there is none yet."""
    global _made
    if owner not in _engines:
        assert plan is not None
        _made += 1
        _engines[owner] = EngineStatus(plan, _made)
    return _engines[owner]


def running() -> list[dict[str, Any]]:
    """The reports of all engines on this machine whose front still runs."""
    found = []
    for file in sorted(report_dir().glob("engine-*.json")):
        pid = int(file.stem.split("-")[1])
        try:
            os.kill(pid, 0)
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue
    return found


def status(engine_object: Any = None) -> Any:
    """What is in force, as the engines' own processes reported it.

    Without an argument: a list with the last known `EngineStatus` of every live engine of this process (empty before
    the first engine, or where vllm_compat is off). With an `LLM` or `LLMEngine`: that engine, asked again. With an
    `AsyncLLM`: a coroutine for the same.
    """
    if engine_object is None:
        return list(_engines.values())
    from vllm_compat import proof

    owner = getattr(engine_object, "llm_engine", engine_object)
    if owner not in _engines:
        raise ValueError("this engine is not under vllm_compat (profile off, or made in another process)")
    kept = _engines[owner]

    def take(answers: list[str]) -> EngineStatus:
        kept.take([proof._front_report(kept.plan), *(found for answer in answers for found in json.loads(answer))])
        kept.save()
        return kept

    if hasattr(owner, "step"):  # an AsyncLLM steps by itself
        return take(proof.ask(owner))

    async def again() -> EngineStatus:
        return take(await proof.ask_async(owner))

    return again()


def table(data: dict[str, Any]) -> str:
    """`EngineStatus.to_dict` for people."""
    head = (
        f"vllm_compat {data['vllm_compat']} on vLLM {data['vllm']}, model runner {data['model_runner']}, "
        f"profile {data['profile']}, {'strict' if data['strict'] else 'not strict'}"
    )
    rows = [("behavior", "state", "decided by", "why")]
    rows += [(name, row["state"], row["decided_by"], row["reason"]) for name, row in data["behaviors"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [head, *(f"note: {note}" for note in data["notes"])]
    for row in rows:
        lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[3])
    if data["processes"]:
        lines.append("processes, each asked over RPC:" if data["proven"] else "processes, NOT PROVEN:")
    for process in data["processes"]:
        name = process["role"] + ("" if process["rank"] is None else f" rank {process['rank']}")
        lines.append(f"  {name}, pid {process['pid']}" + (f": {process['error']}" if process["error"] else ""))
        for behavior, row in data["behaviors"].items():
            for seen in row.get("evidence", ()):
                if all(seen[key] == process[key] for key in ("role", "rank", "pid", "host")):
                    lines.append(f"    {'ok ' if seen['held'] else 'NOT'} {behavior}: {seen['saw']}")
    lines += [f"  FAILED {f['behavior']} in {f['process']}: {f['reason']}" for f in data["failures"]]
    return "\n".join(lines)
