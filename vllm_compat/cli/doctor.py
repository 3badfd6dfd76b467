"""``vllm-compat doctor``: what would be applied here and why, and what is in force in engines that run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_compat import lockfile, profiles, releases, report, settings, vllm_info
from vllm_compat.cli.lock import planned
from vllm_compat.engine_hooks import FRAME
from vllm_compat.errors import LockError, ProfileError, TargetError
from vllm_compat.front import asked_runner, given_by_user, probe_all, resolved
from vllm_compat.patching.model import State
from vllm_compat.patching.probe import probe
from vllm_compat.plan import KEY
from vllm_compat.resolve import within


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    fields = settings.Settings.model_fields.values()
    lines = [f"  {name:40} {field.description}" for name, field in zip(settings.variables(), fields)]
    parser = commands.add_parser(
        "doctor",
        help="what would be applied here, and what running engines report",
        description="Reads files and the environment only; neither vllm nor torch is imported.",
        epilog="environment variables:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="a model folder, to match a profile by its config.json")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 1 where something would be refused, or a running engine is not proven."""
    data = diagnose(args.model)
    if args.json:
        print(json.dumps(data, indent=2))
    else:
        print(_text(data))
    return 1 if data["findings"] else 0


def diagnose(model: str | None) -> dict[str, Any]:
    """Everything doctor knows, as data."""
    current, installed = settings.load(), vllm_info.installed()
    findings: list[str] = []
    data: dict[str, Any] = {"vllm": None, "profile": current.profile, "strict": current.strict, "behaviors": {}}
    engines = report.running()
    data.update(engines=engines, findings=findings)
    if current.profile == "off":
        data["note"] = "VLLM_COMPAT_PROFILE=off: vllm_compat does nothing here"
        return data
    if installed is None:
        findings.append("vLLM is not installed in this environment: nothing to do here")
        return data
    data["vllm"] = installed.version
    why = releases.refused(installed.release)
    if why:
        findings.append(f"vLLM {installed.version} is not supported: {why}")
        return data
    allowed = settings.vllm_plugins()
    if allowed is not None and KEY not in allowed:
        findings.append(
            f"VLLM_PLUGINS={','.join(allowed)!r} excludes vllm_compat: `vllm serve` would run unpatched, and an engine "
            f"made after `import vllm_compat` is refused. Add vllm_compat to it, or unset it."
        )
    profile, notes = profiles.choose(current.profile, _config(model))
    user = given_by_user(None, installed.release)
    plan = resolved(current, installed.release, profile, user, runner=asked_runner())
    wrong, seen = probe_all(plan)
    for patch in FRAME:
        try:
            # what @dataclass made is not in the source
            if patch.name not in ("given", "given_async") and within(installed.release, patch.versions):
                probe(patch.target, installed.root, absent=patch.adds)
        except TargetError as error:
            findings.append(str(error))
    for decision in plan.decisions:
        state, reason = decision.state, decision.reason
        if decision.behavior in wrong:
            state, reason = State.FAILED, str(wrong[decision.behavior])
        if state in (State.FAILED, State.UNSUPPORTED):
            findings.append(f"{decision.behavior}: {reason}")
        data["behaviors"][decision.behavior] = {
            "state": state.value, "decided_by": decision.origin, "route": decision.route, "reason": reason,
            "sets": list(decision.sets), "patches": list(decision.patches),
        }  # fmt: skip
    data.update(profile=profile.name, notes=[*seen, *(notes if model else ["no model given: `doctor MODEL` matches a profile"])])
    data["lock"] = _lock(current, model, findings)
    for engine in engines:
        findings += [f"engine: {f['behavior']} in {f['process']}: {f['reason']}" for f in engine["failures"]]
    return data


def _lock(current: settings.Settings, model: str | None, findings: list[str]) -> dict[str, Any] | None:
    """The lock that engines would be held to here. The self-test's digest needs torch: `vllm-compat lock --check` compares it."""
    try:
        file = lockfile.find(current.lock)
        if file is None:
            return None
        locked = lockfile.read(file)
        plan, user = planned(current, _config(model), locked)
        found = lockfile.compare(locked, lockfile.build(plan, None, user))
    except (LockError, ProfileError) as error:
        findings.append(str(error))
        return None
    findings += [f"lock {file}: {sentence}" for sentence in found.differences]
    return {"file": str(file), "differences": list(found.differences), "notes": list(found.notes)}


def _config(model: str | None) -> dict[str, Any] | None:
    if model is None:
        return None
    file = Path(model) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _text(data: dict[str, Any]) -> str:
    lines = [f"vLLM {data['vllm'] or 'not found'}, profile {data['profile']}, {'strict' if data['strict'] else 'not strict'}"]
    if "note" in data:
        lines.append(data["note"])
    lines += [f"note: {note}" for note in data.get("notes", ())]
    lock = data.get("lock")
    if lock:
        met = "an engine would differ" if lock["differences"] else "met; its self-test is compared by `vllm-compat lock --check`"
        lines += [f"lock {lock['file']}: {met}", *(f"note: lock: {note}" for note in lock["notes"])]
    rows = [("behavior", "would be", "route", "decided by", "why")] if data["behaviors"] else []
    for name, row in data["behaviors"].items():
        does = [*row["sets"], *(f"patch {patch}" for patch in row["patches"])]
        why = row["reason"] + (f"; {', '.join(does)}" if does else "")
        rows.append((name, row["state"], row["route"], row["decided_by"], why))
    widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
    lines += ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)) + "  " + row[4] for row in rows]
    for engine in data["engines"]:
        lines += ["", "running engine:", report.table(engine)]
    lines += [f"FINDING: {finding}" for finding in data["findings"]]
    if not data["findings"]:
        lines.append("no findings" + ("" if data["engines"] else "; no engine of yours runs here now"))
    return "\n".join(lines)
