"""``vllm-compat lock``: write down what the engines of a program are, compare with it, accept a new state."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_compat import lockfile, profiles, releases, settings, vllm_info
from vllm_compat.errors import LockError, UnsupportedVLLMError
from vllm_compat.front import asked_runner, given_by_user, probe_all, resolved
from vllm_compat.patching.model import UNSET, State
from vllm_compat.plan import Plan


class Named:
    """Engine arguments that are only named: what `given_by_user` asks of real ones."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self.hf_overrides = given.get("hf_overrides")

    def explicit(self, name: str) -> Any:
        """The value of an argument that was named, or UNSET."""
        value = self._given.get(name)
        return UNSET if value is None else value


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "lock",
        help="write, check or update vllm-compat.lock: an engine that would differ from it does not start",
        description="Starts no engine. Exit code 0: written, or no difference; 1: --check found a difference; 2: no or bad lock.",
    )
    parser.add_argument("model", nargs="?", type=Path, help="a model folder, to match a profile by its config.json")
    parser.add_argument("--file", type=Path, help=f"the lock (default: VLLM_COMPAT_LOCK, or {lockfile.NAME} in this folder)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare only")
    what.add_argument("--update", action="store_true", help="write the state of now, and say what changed")
    parser.add_argument(
        "--engine-args",
        type=_object,
        metavar="JSON",
        help="arguments your program gives the engine, for those that decide a behavior (default: none; then those in the lock)",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError("it must be a JSON object")
    return found


def run(args: argparse.Namespace) -> int:
    """Write, check or update, and say what differs."""
    current = settings.load()
    file = args.file or Path(current.lock or lockfile.NAME)
    old = lockfile.read(file) if file.exists() else None
    if old is None and (args.check or args.update):
        raise LockError(f"{file}: there is no such lock: write it with `vllm-compat lock MODEL`")
    arguments = args.engine_args
    plan, user = planned(current, _config(args.model), old if args.check or args.update else None, arguments)
    new = lockfile.build(plan, lockfile.self_test_digest(), user)
    found = lockfile.compare(old, new) if old else lockfile.Comparison((), ())
    if not args.check:
        _refuse_what_cannot_start(plan, current)
        if old and found.differences and not args.update:
            listed = "\n".join(f"  - {sentence}" for sentence in found.differences)
            raise LockError(f"{file} exists and is different; --update would accept:\n{listed}")
        if old is None or args.update:
            lockfile.write(new, file, _command(args, user))
    if args.json:
        data = {"file": str(file), "differences": found.differences, "notes": found.notes, "lock": new.model_dump()}
        print(json.dumps(data, indent=2))
    else:
        print(_text(args, file, old is not None, found))
    return int(args.check and bool(found.differences))


def planned(
    current: settings.Settings,
    config: dict[str, Any] | None,
    locked: lockfile.Lock | None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan an engine would get here, and the arguments in it that are the program's own.

    What nobody says is taken from the lock: the profile where no model is given, and the engine's arguments.
    """
    installed = vllm_info.installed()
    if installed is None:
        raise UnsupportedVLLMError("vLLM is not installed in this environment: use the one your engines run in")
    why = releases.refused(installed.release)
    if why:
        raise UnsupportedVLLMError(f"vLLM {installed.version}: {why}")
    if current.profile == "off":
        raise LockError("VLLM_COMPAT_PROFILE=off: vllm_compat does nothing here, so there is nothing to lock")
    wanted = current.profile
    if wanted == "auto" and config is None:
        if locked is None:
            raise LockError("a profile is matched by the model's config.json: give MODEL, or name one with VLLM_COMPAT_PROFILE")
        wanted = locked.profile
    profile, _ = profiles.choose(wanted, config)
    variables = given_by_user(None, installed.release)
    if arguments is None:
        user = dict(locked.engine_arguments) if locked else {}
    else:
        given = given_by_user(Named(arguments), installed.release)
        user = {option: value for option, value in given.items() if option not in variables}
    plan = resolved(current, installed.release, profile, {**user, **variables}, runner=asked_runner())
    wrong, _ = probe_all(plan)
    for name, error in wrong.items():
        plan = plan.given_up(name, State.FAILED, str(error))
    return plan, user


def _refuse_what_cannot_start(plan: Plan, current: settings.Settings) -> None:
    refused = [d for d in plan.decisions if current.strict and d.state in (State.FAILED, State.UNSUPPORTED)]
    if refused:
        raise LockError(f"no engine would start here, so nothing is locked: {refused[0].behavior}: {refused[0].reason}")


def _config(model: Path | None) -> dict[str, Any] | None:
    if model is None:
        return None
    file = model / "config.json"
    if not file.is_file():
        raise LockError(
            f"{model}: there is no config.json in it: give a model folder, or name a profile with VLLM_COMPAT_PROFILE"
        )
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _command(args: argparse.Namespace, user: dict[str, Any]) -> str:
    """What was typed, without places of this machine."""
    words = ["vllm-compat", "lock", *([args.model.resolve().name] if args.model else []), *(["--update"] if args.update else [])]
    return shlex.join([*words, *(["--engine-args", json.dumps(user)] if user and args.engine_args else [])])


def _text(args: argparse.Namespace, file: Path, existed: bool, found: lockfile.Comparison) -> str:
    if args.update:
        head = f"{file}: " + ("accepted:" if found.differences else "written again; no engine would differ")
    elif existed:
        head = f"{file}: " + ("an engine would differ and not start:" if found.differences else "no difference")
    else:
        head = f"{file}: written"
    lines = [head, *(f"  - {sentence}" for sentence in found.differences), *(f"  note: {note}" for note in found.notes)]
    if args.check and found.differences:
        lines.append(
            "`vllm-compat lock MODEL --update` accepts the new state; else install the locked versions and take back what changed"
        )
    return "\n".join(lines)
