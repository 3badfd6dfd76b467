"""The machinery on made-up libraries: exact undo, broken targets, half-imported modules, torch.compile, pickling."""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import types
from pathlib import Path

import pytest
from support import run_script

from vllm_compat import errors, vllm_info
from vllm_compat.behaviors import ALL
from vllm_compat.engine_hooks import FRAME
from vllm_compat.patching import hooks, replace
from vllm_compat.patching.model import Entry, Patch, Role, Target
from vllm_compat.patching.probe import probe
from vllm_compat.resolve import within

SOURCE = """
from functools import wraps

class Base:
    def inherited(self, a):
        return ("inherited", a)

class Thing(Base):
    def method(self, a, b=1):
        return ("method", a, b)
    @staticmethod
    def static(a):
        return ("static", a)
    @classmethod
    def built(cls, a):
        return ("class", cls.__name__, a)
    async def later(
        self,
        a,
    ):
        return ("later", a)

class Child(Thing):
    pass

def function(a):
    return ("function", a)

def function(a, *, c=2):
    return ("second", a, c)
"""
CALLS = {
    "Thing.method": lambda m: m.Thing().method(1),
    "Thing.static": lambda m: m.Thing.static(1),
    "Thing.built": lambda m: m.Child.built(1),
    "Thing.inherited": lambda m: m.Thing().inherited(1),
    "function": lambda m: m.function(1),
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch):
    """A package `fakelib` with a module `things`, importable and readable."""
    folder = tmp_path / "fakelib"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "things.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "fakelib"]:
        del sys.modules[name]


def patch(qualname: str, *params: str, adds: bool = False, traced: bool = False, build=None) -> Patch:
    def marked(original, module):
        def new(*args, **kwargs):
            return ("patched", original(*args, **kwargs) if original else None)

        return new

    return Patch(
        name="p",
        versions=">=0",
        role=Role.FRONT,
        build=build or marked,
        adds=adds,
        target=Target(path=f"fakelib.things:{qualname}", params=params, traced=traced),
    )


@pytest.mark.parametrize("qualname", list(CALLS))
def test_install_and_undo_are_exact(library, qualname):
    """Method, static, class, inherited, function: replaced, then the raw attribute is back, absent where it was absent."""
    module = importlib.import_module("fakelib.things")
    owner = module.Thing if "." in qualname else module
    name = qualname.rpartition(".")[2]
    before, plain = dict(vars(owner)), CALLS[qualname](module)
    signature = inspect.signature(getattr(owner, name))
    entry = replace.install(module, patch(qualname), str(library))
    assert CALLS[qualname](module) == ("patched", plain)
    assert inspect.signature(getattr(owner, name)) == signature
    assert isinstance(
        inspect.getattr_static(owner, name), types.FunctionType | staticmethod | classmethod
    )  # never a proxy: Dynamo would skip it
    assert entry.exercised
    assert replace.undo(entry)
    assert dict(vars(owner)) == before
    assert CALLS[qualname](module) == plain
    assert not replace.undo(entry)  # twice does nothing
    again = replace.install(module, patch(qualname), str(library))
    assert CALLS[qualname](module) == ("patched", plain)
    replace.undo(again)


def test_a_wrapper_on_top_is_reported_and_left(library):
    """Undo takes out only what is still ours."""
    module = importlib.import_module("fakelib.things")
    entry = replace.install(module, patch("Thing.method"), str(library))
    ours = module.Thing.method
    module.Thing.method = lambda self, *args: ours(self, *args)
    assert not replace.in_place(entry)
    assert not replace.undo(entry)
    assert module.Thing().method(1)[0] == "patched"


def test_broken_targets(library):
    """Missing class, missing function, missing parameter: named errors, nothing changed."""
    module = importlib.import_module("fakelib.things")
    before = dict(vars(module.Thing))
    with pytest.raises(errors.TargetMissingError, match="there is no Nothing"):
        replace.install(module, patch("Nothing.method"), str(library))
    with pytest.raises(errors.TargetMissingError, match="there is no nothing"):
        replace.install(module, patch("Thing.nothing"), str(library))
    with pytest.raises(errors.TargetChangedError, match="no longer takes z"):
        replace.install(module, patch("Thing.method", "a", "z"), str(library))
    assert dict(vars(module.Thing)) == before


@pytest.mark.parametrize("foreign", ["wrapped", "object"])
def test_somebody_else_was_first(library, foreign):
    """A foreign wrapper (even one that copies names) or object is refused with its place, unless wrapping is allowed."""
    import functools

    module = importlib.import_module("fakelib.things")
    original = module.Thing.method
    if foreign == "wrapped":
        module.Thing.method = functools.wraps(original)(lambda *args: original(*args))
    else:
        module.Thing.method = functools.partialmethod(original)
    with pytest.raises(errors.PatchConflictError) as caught:
        replace.install(module, patch("Thing.method"), str(library))
    assert ("test_patching.py" in str(caught.value)) == (foreign == "wrapped")
    if foreign == "wrapped":
        replace.install(module, patch("Thing.method"), None)
        assert module.Thing().method(1) == ("patched", ("method", 1, 1))


def test_adding_an_attribute(library):
    """Added where nothing is; a conflict where something is; gone after undo."""
    module = importlib.import_module("fakelib.things")
    entry = replace.install(module, patch("Thing.extra", adds=True), str(library))
    assert module.Thing().extra() == ("patched", None)
    with pytest.raises(errors.PatchConflictError):
        replace.install(module, patch("Thing.extra", adds=True), str(library))
    replace.undo(entry)
    assert not hasattr(module.Thing, "extra")


def test_replacements_pickle_by_name(library):
    """What `multiprocessing` sends is the name; the child finds what it has there."""
    module = importlib.import_module("fakelib.things")
    replace.install(module, patch("function"), str(library))
    assert pickle.loads(pickle.dumps(module.function)) is module.function


def test_torch_compile_sees_the_replacement(library):
    """A compiled caller runs our code, and a compiled original's marks are not carried over."""
    import torch

    module = importlib.import_module("fakelib.things")

    def build(original, module):
        def method(self, a, b=1):
            return a + 10

        return method

    module.Thing.method = torch._dynamo.disable(module.Thing.method)
    replace.install(module, patch("Thing.method", traced=True, build=build), None)
    thing = module.Thing()
    compiled = torch.compile(lambda x: thing.method(x) * 2, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [22.0, 22.0]


def test_probe_reads_the_same_facts_from_source(library):
    """Found with parameters (the later definition wins), missing, changed, inherited not followed; nothing is imported."""
    for qualname, params in (("Thing.method", ("a", "b")), ("Thing.later", ("a",)), ("function", ("c",)), ("Thing.built", ())):
        assert probe(Target(path=f"fakelib.things:{qualname}", params=params), library) is not None
    for qualname in ("Thing.nothing", "Nothing.method", "Thing.inherited"):
        with pytest.raises(errors.TargetMissingError):
            probe(Target(path=f"fakelib.things:{qualname}"), library)
    with pytest.raises(errors.TargetMissingError, match="no module"):
        probe(Target(path="fakelib.nothing:x"), library)
    with pytest.raises(errors.TargetChangedError):
        probe(Target(path="fakelib.things:function", params=("b",)), library)
    assert probe(Target(path="fakelib.things:Thing.extra"), library, absent=True) is None
    with pytest.raises(errors.TargetChangedError):
        probe(Target(path="fakelib.things:Thing.method"), library, absent=True)
    assert "fakelib" not in sys.modules


def test_hook_before_and_after_import(library):
    """Fires once per hook, with a module whose body has run, whichever comes first."""
    seen = []
    hooks.when_imported("fakelib.things", lambda module: seen.append(("before", module.function(1)[0])))
    assert seen == []
    importlib.import_module("fakelib.things")
    hooks.when_imported("fakelib.things", lambda module: seen.append(("after", module.function(1)[0])))
    assert seen == [("before", "second"), ("after", "second")]


def test_hook_on_a_half_imported_module(library, tmp_path):
    """Registered while the module's body runs: not called until it has run."""
    (library / "half.py").write_text(
        "from vllm_compat.patching import hooks\nimport builtins\n"
        "hooks.when_imported('fakelib.half', lambda module: builtins.seen_half.append(module.late))\nlate = 1\n"
    )
    import builtins

    builtins.seen_half = []
    importlib.import_module("fakelib.half")
    hooks.flush()
    hooks.flush()
    assert builtins.seen_half == [1]
    del builtins.seen_half


HERE = vllm_info.installed().release
# those of the installed release; the others meet their sources in test_sources.py, and their engines in `make matrix`
PATCHES = [p for p in (*FRAME, *(p for behavior in ALL for p in behavior.patches())) if within(HERE, p.versions)]
RELIED_ON = [t for behavior in ALL for t in behavior.relies_on if within(HERE, t.versions)]


@pytest.mark.parametrize("declared", PATCHES, ids=lambda p: p.name)
def test_every_patch_against_the_installed_sources(declared):
    """Contract: each declared target is where the installed vLLM's files have it, with the parameters relied on."""
    installed = vllm_info.installed()
    if declared.name in ("given", "given_async"):  # written by @dataclass: the class is in the source, __init__ is not
        with pytest.raises(errors.TargetMissingError, match="there is no __init__"):
            probe(declared.target, installed.root)
        return
    assert (probe(declared.target, installed.root, absent=declared.adds) is None) == declared.adds


@pytest.mark.parametrize("target", RELIED_ON, ids=lambda t: t.qualname)
def test_every_relied_on_function_against_the_installed_sources(target):
    """Functions a behavior calls or reads, and does not replace."""
    assert probe(target, vllm_info.installed().root) is not None


CONTRACT = """
import importlib, inspect, json, traceback, types
import vllm_compat_entry
from vllm_compat import vllm_info
from vllm_compat.behaviors import ALL
from vllm_compat.engine_hooks import FRAME
from vllm_compat.errors import PatchConflictError
from vllm_compat.patching import replace
from vllm_compat.resolve import within

installed = vllm_info.installed()

def meet(patch):
    module = importlib.import_module(patch.target.module)
    root = str(installed.root)
    owner = getattr(module, patch.target.qualname.split(".")[0]) if "." in patch.target.qualname else module
    before = dict(vars(owner))
    entry = replace.install(module, patch, root)
    raw = inspect.getattr_static(owner, entry.attribute)
    assert isinstance(raw, (types.FunctionType, classmethod, property) if patch.adds else (types.FunctionType, classmethod)), raw
    signature = None if isinstance(raw, property) else inspect.signature(getattr(owner, entry.attribute))
    try:
        replace.install(module, patch, root)
    except PatchConflictError:
        pass
    else:
        raise AssertionError("a second install was not refused")
    assert replace.undo(entry) and not replace.undo(entry)
    assert dict(vars(owner)) == before
    if not patch.adds:
        assert inspect.signature(getattr(owner, entry.attribute)) == signature
    assert replace.undo(replace.install(module, patch, root))

found = {}
for patch in (*FRAME, *(p for b in ALL for p in b.patches())):
    if within(installed.release, patch.versions):
        try:
            meet(patch)
            found[patch.name + " " + patch.target.path] = ""
        except Exception:
            found[patch.name + " " + patch.target.path] = traceback.format_exc()
print("RESULT " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def contract(tmp_path_factory) -> dict[str, str]:
    """What went wrong with each patch on the real modules, one after the other in one clean process."""
    ran = run_script(sys.executable, tmp_path_factory.mktemp("contract"), CONTRACT, environment={"VLLM_COMPAT_PROFILE": "off"})
    return ran.ok().result


@pytest.mark.parametrize("declared", PATCHES, ids=lambda p: p.name)
def test_every_patch_survives_the_live_contract(declared, contract):
    """Import, apply, undo exactly, apply again, a second apply conflicts: on the real module, in a clean process."""
    assert contract[f"{declared.name} {declared.target.path}"] == ""


def test_entry_is_what_the_report_reads():
    """The ledger's row starts unused."""
    assert Entry(PATCHES[0], object, "x", None, None).exercised is False
