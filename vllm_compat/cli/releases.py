"""``vllm-compat releases``: every vLLM release, how it was checked, each behavior's route, and what was measured."""

from __future__ import annotations

import argparse
import json
from typing import Any

from packaging.version import Version

from vllm_compat import releases
from vllm_compat.behaviors import ALL
from vllm_compat.behaviors._common import V0_RELEASES, V2_RELEASES
from vllm_compat.recording import KINDS
from vllm_compat.resolve import resolve, targets, within

_TIERS = (
    "live: a real engine of this release met the V0 recording",
    "sources: every function was read in its sources, no engine was run; the self-tests decide when yours starts",
    "refused: not known, an engine start raises",
)


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "releases",
        help="every vLLM release: how it was checked, the routes, what was measured",
        description="Reads the data that comes with vllm_compat; vLLM need not be installed.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; always 0."""
    found = [describe(version) for version in releases.rows()]
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


def describe(version: str) -> dict[str, Any]:
    """One release: tier, runners, route of each behavior by runner, what was measured, bodies that were only read."""
    release, measured = Version(version), releases.live().get(version, {})
    runners = ["v1"]
    runners += ["v0"] if within(release, V0_RELEASES) else []
    runners += ["v2"] if within(release, V2_RELEASES) else []
    plans = {runner: resolve(ALL, version=release, runner=runner) for runner in runners}
    only_read = {
        target.path for b in ALL for target in targets(b, release, "v1") if releases.never_run(target.path, release, "v1")
    } & set(releases.sources())
    return {
        "version": version,
        "tier": releases.tier(release),
        "routes": {runner: {d.behavior: d.route for d in plan.decisions} for runner, plan in plans.items()},
        "ran": {key: measured.get(key) for key in ("engine", "device", "torch", "date", "platform")} if measured else None,
        "states": measured.get("behaviors"),
        "worst": {word: _worst(measured.get(word)) for word in ("with", "without")} if measured else None,
        "dtype": measured.get("with", {}).get("dtype"),
        "weight_update": measured.get("weight_update"),
        "only_read": sorted(only_read),
    }


def _worst(figures: dict[str, Any] | None) -> float | None:
    return max(figures[kind]["worst"] for kind in KINDS if kind in figures) if figures else None


def _text(found: list[dict[str, Any]]) -> str:
    names = [behavior.name for behavior in ALL]
    rows = [("release", "tier", "engine", "worst |dlogprob| with", "without", *names)]
    for row in found:
        ran, worst = row["ran"] or {}, row["worst"] or {}
        figures = [f"{worst[word]:.1e}" if worst.get(word) is not None else "-" for word in ("with", "without")]
        if row["dtype"] not in (None, "float32"):
            figures[0] += f" ({row['dtype']})"
        route = row["routes"]["v0" if ran.get("engine") == "V0" else "v1"]
        rows.append((row["version"], row["tier"], ran.get("engine") or "-", *figures, *(route[name] for name in names)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    v2 = "Model Runner V2 (0.12.0 on) is not used: model_runner_v1 pins V1, and an engine that insists on V2 is refused."
    return "\n".join([*lines, "", *_TIERS, v2, "Any other version is refused."])
