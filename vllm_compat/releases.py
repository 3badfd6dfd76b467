"""What is known about each vLLM release: whether it was run, or only read, and what was measured on it.

The data lies in ``tests/releases/``: ``releases.toml`` (one row per release), ``sources.json`` (what `make sources` read)
and ``live.json`` (what `make matrix` measured).
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.version import Version


def folder() -> Path:
    """Where the data lies: in the installed package, or in the checkout an editable install points to."""
    inside = Path(__file__).parent / "_releases"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "tests" / "releases"


@cache
def rows() -> dict[str, dict[str, Any]]:
    """The rows of ``releases.toml`` by version, oldest first."""
    with (folder() / "releases.toml").open("rb") as file:
        return {row["version"]: row for row in tomllib.load(file)["release"]}


@cache
def live() -> dict[str, dict[str, Any]]:
    """What was measured on real engines, by release."""
    file = folder() / "live.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def tier(release: Version) -> str:
    """``live`` (a real engine met the V0 recording), ``sources`` (only read) or ``refused``."""
    if refused(release):
        return "refused"
    return "live" if live().get(str(release), {}).get("passed") else "sources"


def shown(release: Version, runner: str) -> str:
    """A note where the engine that is about to start was never run on this release, else empty."""
    if _ran(str(release), runner):
        return ""
    engine = {"v0": "V0", "v1": "V1", "v2": "Model Runner V2"}[runner]
    return (
        f"vLLM {release} on {engine} was checked by its sources, not run: the self-tests of this engine's processes speak for it"
    )


def refused(release: Version) -> str:
    """Why a release is refused, for the middle of a sentence; empty where it is not."""
    known = list(rows())
    if str(release) in known:
        return ""
    what = "development builds and candidates have not been read" if release.is_prerelease else "this release has not been read"
    return f"{what}, so nothing is known about it. Install one from {known[0]} to {known[-1]} (`vllm-compat releases`)"


@cache
def sources() -> dict[str, dict[str, str]]:
    """What was read of every release: function -> release -> fingerprint of its body (`patching.probe.fingerprint`)."""
    file = folder() / "sources.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {
        path: {release: group["fingerprint"] for group in groups for release in group["releases"]}
        for path, groups in data.items()
    }


def changed_locally(path: str, release: Version, fingerprint: str) -> bool:
    """Whether an installed function is not the one that this release was read with."""
    known = sources().get(path, {}).get(str(release))
    return known is not None and known != fingerprint


def never_run(path: str, release: Version, runner: str) -> bool:
    """Whether no release with this very body of the function has been run on this runner: it was read only."""
    bodies = sources().get(path, {})
    body = bodies.get(str(release))
    return not any(_ran(other, runner) for other, found in bodies.items() if found == body)


def _ran(release: str, runner: str) -> bool:
    found = live().get(release, {})
    return bool(found.get("passed")) and runner == str(found["engine"]).lower()
