"""Put one replacement in, take it out exactly. Replacements are plain functions.

Plain, because `torch.compile` traces through a wrapt proxy to the original without a word; and
``functools.wraps(..., updated=())``, because copying ``__dict__`` would carry Dynamo's marks over.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
from typing import Any

from vllm_compat.errors import PatchConflictError, TargetChangedError, TargetMissingError
from vllm_compat.patching.model import UNSET, Entry, Patch, Target


def install(module: types.ModuleType, patch: Patch, library_root: str | None) -> Entry:
    """Replace ``patch.target`` in an imported module.

    Raises TargetMissingError, TargetChangedError or PatchConflictError, with nothing changed.
    ``library_root`` is the folder the original must come from, since what a replacement does to somebody else's code
    cannot be proven; ``None`` wraps whatever is there, for replacements that only act before and after it.
    """
    *path, attribute = patch.target.qualname.split(".")
    owner: Any = module
    for step in path:
        owner = inspect.getattr_static(owner, step, UNSET)
        if owner is UNSET:
            raise TargetMissingError(patch.target.path, f"there is no {step}")
    own = vars(owner).get(attribute, UNSET)
    raw = inspect.getattr_static(owner, attribute, UNSET)
    if patch.adds:
        if raw is not UNSET:
            raise PatchConflictError(patch.target.path, _origin(raw))
        replacement = patch.build(None, module)
        setattr(owner, attribute, replacement)
        return Entry(patch, owner, attribute, UNSET, replacement)
    if raw is UNSET:
        raise TargetMissingError(patch.target.path, f"there is no {attribute}")
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
    original = raw.__func__ if kind else raw
    if library_root is not None and not _inside(original, owner, library_root):
        raise PatchConflictError(patch.target.path, _origin(original))
    missing = set(patch.target.params) - set(inspect.signature(original, follow_wrapped=False).parameters)
    if missing:
        raise TargetChangedError(patch.target.path, f"it no longer takes {', '.join(sorted(missing))}")
    entry = Entry(patch, owner, attribute, own, None)
    new = functools.wraps(original, updated=())(patch.build(original, module))
    if not patch.target.traced:
        new = _marking(entry, original, new)
    entry.replacement = kind(new) if kind else new
    setattr(owner, attribute, entry.replacement)
    return entry


def _marking(entry: Entry, original: Any, new: Any) -> Any:
    """One Python assignment per call, so that the report can tell "in place" from "used"."""

    @functools.wraps(original, updated=())
    def replacement(*args: Any, **kwargs: Any) -> Any:
        entry.exercised = True
        return new(*args, **kwargs)

    return replacement


def is_alias(module: types.ModuleType, target: Target) -> bool:
    """Whether the target's class is another module's, under a second name here."""
    owner = vars(module).get(target.qualname.partition(".")[0])
    return isinstance(owner, type) and owner.__module__ != module.__name__


def undo(entry: Entry) -> bool:
    """Put back what stood there. False, and nothing done, where somebody has wrapped on top."""
    if vars(entry.owner).get(entry.attribute) is not entry.replacement:
        return False
    if entry.own is UNSET:
        delattr(entry.owner, entry.attribute)
    else:
        setattr(entry.owner, entry.attribute, entry.own)
    return True


def in_place(entry: Entry) -> bool:
    """Whether our replacement is still the one that callers reach."""
    return vars(entry.owner).get(entry.attribute) is entry.replacement


def _inside(function: Any, owner: Any, root: str) -> bool:
    if not isinstance(function, types.FunctionType):
        return False
    # functools.wraps makes a foreign wrapper look like the original; its code object does not.
    if function.__code__.co_filename == "<string>" and dataclasses.is_dataclass(owner):
        return True  # written by @dataclass itself
    path = os.path.realpath(function.__code__.co_filename)
    return path.startswith(os.path.realpath(root) + os.sep)


def _origin(found: Any) -> str:
    code = getattr(found, "__code__", None)
    if code is not None:
        return f"{getattr(found, '__module__', '?')}.{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
    return f"{type(found).__module__}.{type(found).__qualname__} object"
