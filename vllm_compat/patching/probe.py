"""Does a target still look as declared? Answered from source files, nothing is imported.

Only the block of the wanted function is parsed: parsing whole files of the library would cost a second.
"""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
from functools import lru_cache
from pathlib import Path

from vllm_compat.errors import TargetChangedError, TargetMissingError
from vllm_compat.patching.model import Target


def probe(target: Target, root: Path, *, absent: bool = False) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Find the target below ``root`` (the library's package folder) and check its parameters.

    ``absent`` asks the opposite, for attributes we add: the owner is there and the attribute is not.
    Returns the function's syntax tree. Raises TargetMissingError or TargetChangedError.
    """
    file = _file(target.module, root)
    if file is None:
        raise TargetMissingError(target.path, f"there is no module {target.module}")
    *owners, name = target.qualname.split(".")
    lines, indent = _lines(file), 0
    for owner in owners:
        block = _block(lines, rf"class {owner}\b", indent)
        if block is None:
            raise TargetMissingError(target.path, f"there is no class {owner}")
        lines, indent = block, indent + 4
    block = _block(lines, rf"(async )?def {name}\b", indent)
    if absent:
        if block is not None:
            raise TargetChangedError(target.path, "vLLM has an attribute of that name now")
        return None
    if block is None:
        raise TargetMissingError(target.path, f"there is no {name}")
    function = ast.parse(textwrap.dedent("\n".join(block))).body[0]
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    spec = function.args
    names = {arg.arg for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)}
    missing = set(target.params) - names
    if missing:
        raise TargetChangedError(target.path, f"it no longer takes {', '.join(sorted(missing))}")
    return function


def fingerprint(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """12 hex digits that change when the function does something else: layout, comments, docstring and annotations do
    not count. Made from the syntax tree by hand, since `ast.dump` differs between releases of Python."""
    return hashlib.sha256(repr(_shape(function)).encode()).hexdigest()[:12]


_NOT_CODE = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns", "simple"}


def _shape(node: object) -> object:
    if isinstance(node, ast.AST):
        fields = {name: getattr(node, name, None) for name in node._fields if name not in _NOT_CODE}
        body = fields.get("body")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            fields["body"] = body[1:] if isinstance(body, list) else body
        return (type(node).__name__, *((name, _shape(value)) for name, value in fields.items() if value not in (None, [])))
    if isinstance(node, list):
        return [_shape(item) for item in node]
    return repr(node)


@lru_cache(maxsize=64)
def _lines(file: Path) -> tuple[str, ...]:
    return tuple(file.read_text(encoding="utf-8").splitlines())


def _file(module: str, root: Path) -> Path | None:
    base = root.parent.joinpath(*module.split("."))
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    return None


def _block(lines: tuple[str, ...], head: str, indent: int) -> tuple[str, ...] | None:
    """The last definition at this indentation whose first line matches: later ones win at run time."""
    pattern = re.compile(rf" {{{indent}}}{head}")
    starts = [index for index, line in enumerate(lines) if pattern.match(line)]
    if not starts:
        return None
    start = starts[-1]
    for end in range(start + 1, len(lines)):
        line = lines[end]
        depth = len(line) - len(line.lstrip())
        # a closing bracket of a signature over several lines stands at the definition's own depth
        if line.strip() and depth <= indent and not line.lstrip().startswith((")", "]", "#")):
            break
    else:
        end = len(lines)
    # comments that trail it belong to what follows, and stand at any depth
    while not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#"):
        end -= 1
    return lines[start:end]
