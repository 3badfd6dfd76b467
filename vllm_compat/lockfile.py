"""The lock: what an engine is, written down as text; two locks compared; and an engine held to one.

A lock says what decides the values of an engine: the versions, the model runner, each behavior with its route, the
fingerprint of every function that the plan's patches replace or its behaviors rely on, and a digest of what the
self-test demands. The frame around every engine (`engine_hooks`) is not in it: it changes no value.

Only effects are compared. Whether V0's value was set by us or given by the user is a note, not a difference. So is a
function that only one side lists: then a behavior's route differs as well, or vllm_compat relies on more than before.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_compat import releases, settings, vllm_info
from vllm_compat.behaviors import BY_NAME, processed_logprobs
from vllm_compat.errors import LockError, LockMismatchError
from vllm_compat.patching.model import Native, State
from vllm_compat.patching.probe import fingerprint, probe
from vllm_compat.plan import Decision, Plan
from vllm_compat.resolve import routes, targets
from vllm_compat.version import __version__

NAME = "vllm-compat.lock"
FORMAT = 1
_SELF_TESTED = processed_logprobs.BEHAVIOR.name
_GIVEN_UP = {state.value for state in (State.DISABLED, State.OVERRIDDEN, State.UNSUPPORTED, State.FAILED)}
_LOGIT_GRID = 16


class Row(BaseModel):
    """One behavior. ``sets`` are vLLM's options in force for it, whoever set them, also against it; ``decided_by`` says who."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    state: str
    route: str
    decided_by: str
    sets: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()

    @property
    def given_up(self) -> bool:
        """Whether the engine is without it."""
        return self.route in _GIVEN_UP


class Lock(BaseModel):
    """The file. ``engine_arguments`` are those of vLLM's options that the program sets itself, as `lock` was told."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    vllm_compat: str
    vllm: str
    torch: str
    cuda: str
    model_runner: str
    profile: str
    self_test: str | None
    engine_arguments: dict[str, bool | int | float | str] = {}
    behaviors: dict[str, Row]
    functions: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """What is different, as sentences, and what else changed without a difference to the engine."""

    differences: tuple[str, ...]
    notes: tuple[str, ...]


# --- from a plan ------------------------------------------------------------------------------------------------


def build(plan: Plan, self_test: str | None, engine_arguments: Mapping[str, Any] | None = None) -> Lock:
    """The lock of an engine with this plan in this environment. ``self_test``: `self_test_digest`; None: not compared."""
    installed = vllm_info.installed()
    assert installed is not None
    torch, cuda = _torch()
    functions = {}
    for decision in plan.decisions:
        behavior = BY_NAME[decision.behavior]
        if decision.wanted:
            adds = {patch.target for patch in behavior.patches() if patch.adds}
            for target in targets(behavior, installed.release, plan.runner, decision.patches):
                found = probe(target, installed.root, absent=target in adds)
                if found is not None:
                    functions[target.path] = fingerprint(found)
    return Lock(
        vllm_compat=__version__,
        vllm=plan.vllm,
        torch=torch,
        cuda=cuda,
        model_runner=plan.runner,
        profile=plan.profile,
        self_test=self_test,
        engine_arguments=dict(engine_arguments or {}),
        behaviors={decision.behavior: _row(decision, plan) for decision in plan.decisions},
        functions=dict(sorted(functions.items())),
    )


def _row(decision: Decision, plan: Plan) -> Row:
    """`Decision.sets` lacks what the user set to V0's value himself; the routes of the release do not."""
    found = routes(BY_NAME[decision.behavior], Version(plan.vllm), plan.runner) if decision.wanted else ()
    sets = tuple(route.value for route in found if isinstance(route, Native))
    # each engine of a program may have a seed of its own: that one was chosen is locked, which is not
    if decision.given and not decision.given.startswith("seed="):
        sets = (decision.given,)
    parts = [word for word, used in (("native", sets), ("patch", decision.patches)) if used]
    return Row(
        state=decision.state.value,
        route=" + ".join(parts) if decision.wanted else decision.state.value,
        decided_by=decision.origin,
        sets=sets,
        patches=decision.patches,
    )


def _torch() -> tuple[str, str]:
    """The versions of torch and of its CUDA (``none`` without), from torch's own file: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    if file is None or not file.is_file():
        raise LockError("torch is not installed in this environment, and a lock names it: use the environment of the engine")
    text = file.read_text(encoding="utf-8")
    version, cuda = (re.search(rf"^{name}\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE) for name in ("__version__", "cuda"))
    return version[1] if version else "unknown", cuda[1] if cuda else "none"


def self_test_digest() -> str:
    """12 hex digits of what the self-test of processed_logprobs demands: its settings, and V0's formula on its logits.

    torch's noise differs in its last bits between processors (by 3e-6 with and without AVX2). So the logits are rounded to
    a grid first, with a little of each token's index on top, since equal logits would leave their order open.
    """
    import torch

    from vllm_compat.v0_formula import Setting
    from vllm_compat.v0_formula import processed_logprobs as formula

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # a trainer may have chosen others for its own model
    try:
        with torch.device("cpu"):
            logits = processed_logprobs.self_test_logits()
            logits = (logits * _LOGIT_GRID).round() / _LOGIT_GRID + torch.arange(logits.shape[-1]) / 4096
            demands = []
            for row, given in enumerate(processed_logprobs._SETTINGS.values()):
                setting = Setting(**given)
                sampled = formula(logits[row], setting, processed_logprobs._PROMPT, processed_logprobs._OUTPUT)
                prompt = [formula(other, setting, prompt_row=True) for other in logits[:-1]]
                demands.append([given, *([round(value, 6) + 0.0 for value in part.tolist()] for part in (sampled, *prompt))])
    finally:
        torch.set_default_dtype(before)
    text = json.dumps([processed_logprobs._PROMPT, processed_logprobs._OUTPUT, demands], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- the file ---------------------------------------------------------------------------------------------------


def find(named: str | None) -> Path | None:
    """The lock to hold engines to: ``VLLM_COMPAT_LOCK``, or the one in the working directory; None where there is none."""
    file = Path(named or NAME)
    if file.is_file():
        return file
    if named:
        raise LockError(f"VLLM_COMPAT_LOCK={named}: there is no such file; write it with `vllm-compat lock MODEL`, or unset it")
    return None


def read(file: Path) -> Lock:
    """Parse and check. Raises LockError naming the file, the key and what to do."""
    again = "restore it, or remove it and run `vllm-compat lock MODEL`"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LockError(f"{file}: cannot be read as a lock: {error}; {again}") from None
    made = data.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise LockError(
            f"{file}: format {made} is of a newer vllm_compat than {__version__}, which reads {FORMAT}: update vllm_compat"
        )
    try:
        return Lock.model_validate(data if made is not None else {**data, "format": "none"})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise LockError(f"{file}: is not a lock of vllm_compat, or is damaged: {key}: {first['msg']}; {again}") from None


def write(lock: Lock, file: Path, command: str) -> None:
    """Write the text, with the command that made it in its head. Raises LockError where the place cannot be written."""
    try:
        file.write_text(text(lock, command), encoding="utf-8")
    except OSError as error:
        raise LockError(f"{file}: cannot be written: {error}; name another place with --file") from None


def text(lock: Lock, command: str) -> str:
    """The lock as TOML. A basic string of TOML is a string of JSON."""
    data = lock.model_dump()
    tables = {
        "engine_arguments": data.pop("engine_arguments"),
        **{f"behaviors.{name}": row for name, row in data.pop("behaviors").items()},
        "functions": data.pop("functions"),
    }
    lines = [
        "# The lock of vllm_compat: what the engines of this program are. An engine that would differ does not start.",
        f"# Made by `{command}`.",
        "# Compare: `vllm-compat lock --check`. Accept a new state: `vllm-compat lock MODEL --update`.",
        *_assignments(data),
    ]
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", *_assignments(table)]
    return "\n".join(lines) + "\n"


def _assignments(table: Mapping[str, Any]) -> list[str]:
    plain = re.compile(r"[A-Za-z0-9_-]+")
    keys = {key: key if plain.fullmatch(key) else json.dumps(key, ensure_ascii=False) for key in table}
    return [f"{keys[key]} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()]


# --- two locks --------------------------------------------------------------------------------------------------


def compare(old: Lock, new: Lock) -> Comparison:
    """What would be different in an engine that is ``new``, for people who know what their trainer does."""
    differences, notes = [], []
    demand = ""
    if old.self_test and new.self_test:
        demand = "the same values as before (digest equal)" if old.self_test == new.self_test else "other values than before"
    if old.vllm != new.vllm:
        differences.append(f"vLLM: {old.vllm} -> {new.vllm}; {_measured(old, new)}")
    if _public(old.torch) != _public(new.torch):
        differences.append(f"torch: {old.torch} -> {new.torch}; its kernels may round, and its noise may draw, otherwise")
    elif old.torch != new.torch:
        notes.append(f"torch: {old.torch} -> {new.torch}: another build of the same release")
    if old.cuda != new.cuda:
        differences.append(f"CUDA: {old.cuda} -> {new.cuda}; kernels may round otherwise")
    if old.model_runner != new.model_runner:
        differences.append(f"model runner: {old.model_runner} -> {new.model_runner}; another sampler and other prompt rows")
    if old.profile != new.profile:
        differences.append(f"profile: {old.profile} -> {new.profile}; what it decides otherwise is named by behavior")
    if demand.startswith("other"):
        differences.append(
            f"self-test of {_SELF_TESTED}: it demands {demand} (digest {old.self_test} -> {new.self_test}): vllm_compat's "
            f"formula or test changed, or the noise that torch makes the test from"
        )
    for name in [*new.behaviors, *(name for name in old.behaviors if name not in new.behaviors)]:
        _compare_behavior(name, old.behaviors.get(name), new.behaviors.get(name), demand, differences, notes)
    for path in sorted({*old.functions, *new.functions}):
        was, is_now = old.functions.get(path), new.functions.get(path)
        if was is None or is_now is None:
            notes.append(f"{path}: {'no longer' if is_now is None else 'now'} replaced or relied on")
        elif was != is_now:
            differences.append(f"{path}: its body changed ({was} -> {is_now}); {_who_tests(path, demand)}")
    if old.vllm_compat != new.vllm_compat:
        notes.append(f"vllm_compat: {old.vllm_compat} -> {new.vllm_compat}")
    return Comparison(tuple(differences), tuple(notes))


def _compare_behavior(name: str, old: Row | None, new: Row | None, demand: str, differences: list[str], notes: list[str]) -> None:
    behavior = BY_NAME.get(name)
    if new is None or behavior is None:
        differences.append(f"{name}: is in the lock, and this vllm_compat {__version__} does not know it")
        return
    if old is None:
        (notes if new.given_up else differences).append(f"{name}: the lock does not know it, now {new.route}; V0: {behavior.v0}")
        return
    if (old.route, old.sets, old.patches) == (new.route, new.sets, new.patches):
        if old.decided_by != new.decided_by:
            notes.append(f"{name}: decided by the {new.decided_by}, before by the {old.decided_by}; the effect is the same")
        return
    sentence = f"{name} ({settings.Settings.model_fields[name].description}): "
    sentence += f"{old.route} -> {new.route}" if old.route != new.route else f"{new.route} as before, in another way"
    if new.given_up:
        if old.route == new.route:
            sentence += f" ({', '.join(old.sets) or 'none'} -> {', '.join(new.sets) or 'none'})"
        sentence += f", decided by the {new.decided_by}; lost: {behavior.cost}"
    else:
        if old.given_up:
            sentence += f"; in force now: {behavior.v0}"
        for word, was, is_now in (("patches", old.patches, new.patches), ("options", old.sets, new.sets)):
            if was != is_now:
                sentence += f"; {word}: {', '.join(was) or 'none'} -> {', '.join(is_now) or 'none'}"
        if new.route == State.NOT_NEEDED.value:
            sentence += "; this vLLM does it by itself"
        else:
            sentence += f"; {_test_of(name, demand)}"
    differences.append(sentence)


def _test_of(name: str, demand: str) -> str:
    if name == _SELF_TESTED and demand:
        return f"the self-test of {name} demands {demand}"
    roles = sorted({check.role.value.replace("_", " ") for check in BY_NAME[name].checks})
    return f"the check of {name} must hold in every {' and '.join(roles)} before the first token"


def _who_tests(path: str, demand: str) -> str:
    owners = [
        behavior.name
        for behavior in BY_NAME.values()
        if any(target.path == path for target in (*behavior.relies_on, *(patch.target for patch in behavior.patches())))
    ]
    return "; ".join(_test_of(name, demand) for name in owners) or "this vllm_compat does not use it"


def _public(version: str) -> str:
    """Without the local part, which names a build."""
    return version.partition("+")[0]


def _measured(old: Lock, new: Lock) -> str:
    """What is known of two releases' values; nothing is said that was not measured on both."""
    first, second = _worst(old), _worst(new)
    if first is not None and second is not None:
        return f"both met the V0 recording within {max(first, second):.1e} nats (float32, all behaviors on, the shipped model)"
    unknown = ", ".join(lock.vllm for lock, gap in ((old, first), (new, second)) if gap is None)
    return f"not measured against V0 in float32: {unknown}; only the self-tests speak for the values"


def _worst(lock: Lock) -> float | None:
    """The largest |Δlogprob| against V0, sampled or prompt row, that was measured on this release and runner in float32."""
    found = releases.live().get(lock.vllm, {})
    rows = found.get("with", {})
    ran = {"V0": "v0", "V1": "v1"}.get(found.get("engine", ""))
    if not found.get("passed") or ran != lock.model_runner or rows.get("dtype") != "float32":
        return None
    return max(float(rows[kind]["worst"]) for kind in ("sampled", "prompt"))


# --- an engine --------------------------------------------------------------------------------------------------


def hold(plan: Plan, file: Path, locked: Lock) -> tuple[str, ...]:
    """Raise LockMismatchError where an engine with this plan is not what is locked; else what the report says about it.

    A lock is asked for, so VLLM_COMPAT_STRICT=0 does not soften it.
    """
    found = compare(locked, build(plan, self_test_digest()))
    if found.differences:
        raise LockMismatchError(str(file), found.differences)
    return (f"the lock {file} is met", *(f"lock: {note}" for note in found.notes))
