"""The rules of the house, read from the source: who may import what, one reader of the environment, docs equal code."""

from __future__ import annotations

import ast
import re

from support import ROOT

from vllm_compat.behaviors import ALL, BY_NAME

PACKAGE = ROOT / "vllm_compat"
FILES = {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST, *, top_level: bool = False) -> set[str]:
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_nothing_heavy_at_module_level():
    """vllm, torch, numpy and transformers are imported inside functions only."""
    for name, tree in FILES.items():
        heavy = {i for i in imported(tree, top_level=True) if i.split(".")[0] in ("vllm", "torch", "numpy", "transformers")}
        assert not heavy, f"{name} imports {heavy}"


def test_layers():
    """patching knows errors only; behaviors know patching; resolve is pure; nobody imports cli."""
    for name, tree in FILES.items():
        ours = {i for i in imported(tree) if i.startswith("vllm_compat.")}
        if name.startswith("patching/"):
            assert all(i.startswith(("vllm_compat.errors", "vllm_compat.patching")) for i in ours), name
        if name.startswith("behaviors/"):
            # what a behavior computes is shared with the trainer's side, its two formulas; and the number of the weights it uses
            shared = ("vllm_compat.v0_formula", "vllm_compat.head", "vllm_compat.weights.version")
            assert all(i.startswith(("vllm_compat.patching", "vllm_compat.behaviors", *shared)) for i in ours), name
        if name == "resolve.py":
            assert all(i.startswith(("vllm_compat.patching.model", "vllm_compat.plan")) for i in ours)
        if not name.startswith(("cli/", "__main__", "_entry/")):
            assert not any(i.startswith("vllm_compat.cli") for i in ours), name


def test_wrapt_and_the_environment_have_one_place_each():
    """wrapt in hooks.py; os.environ in settings.py (and in the entry that must not import it)."""
    for name, tree in FILES.items():
        assert ("wrapt" in imported(tree)) == (name == "patching/hooks.py"), name
        reads = any(
            isinstance(n, ast.Attribute)
            and n.attr in ("environ", "getenv")
            and isinstance(n.value, ast.Name)
            and n.value.id == "os"
            for n in ast.walk(tree)
        )
        assert reads == (name in ("settings.py", "_entry/vllm_compat_entry.py")), name


def test_one_file_per_behavior():
    """The folder, the names and `ALL` are the same list."""
    files = {
        name.removesuffix(".py") for name in (p.name for p in (PACKAGE / "behaviors").glob("*.py")) if not name.startswith("_")
    }
    assert files == set(BY_NAME)
    assert len(ALL) == len(BY_NAME)


def test_readme_table_is_the_code():
    """The README's behavior table holds each behavior's own words and switch."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| `(\w+)` \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(BY_NAME)
    for name, v0, v1, variable in rows:
        assert (v0, v1, variable) == (BY_NAME[name].v0, BY_NAME[name].v1, BY_NAME[name].variable)


def test_readme_names_the_commands():
    """The two commands of a fresh clone, and the license."""
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
    assert "Apache License" in (ROOT / "LICENSE").read_text()
