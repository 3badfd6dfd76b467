"""``vllm-compat profiles``: every profile, what it matches, and the validations behind it."""

from __future__ import annotations

import argparse
import json
from datetime import date
from typing import Any

from vllm_compat import profiles


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "profiles",
        help="every profile: what it matches, and the validations behind it",
        description="Reads the profiles that come with vllm_compat; vLLM need not be installed.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list; always 0."""
    found = [describe(profile) for profile in profiles.shipped().values()]
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0


def describe(profile: profiles.Profile) -> dict[str, Any]:
    """One profile; ``age_days`` counts from its newest entry."""
    entries = [one.model_dump(mode="json") for one in profile.evidence]
    newest = max((one.date for one in profile.evidence), default=None)
    return {
        "name": profile.name,
        "description": profile.description,
        "match": profile.match.model_dump(mode="json"),
        "behaviors": profile.behaviors,
        "bands": {name: band.model_dump() for name, band in profile.all_bands().items()},
        "age_days": None if newest is None else (date.today() - newest).days,
        "evidence": entries,
    }


def _text(found: list[dict[str, Any]]) -> str:
    rows = [("profile", "matches", "age", "evidence")]
    for row in found:
        age = "-" if row["age_days"] is None else f"{row['age_days']} d"
        rows.append((row["name"], ", ".join(row["match"]["architectures"]) or "everything else", age, _evidence(row["evidence"])))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) + "  " + row[3] for row in rows]
    meaning = "architecture: seeded weights of that shape; checkpoint: a real model. --json has every entry with its figures."
    return "\n".join([*lines, "", meaning])


def _evidence(entries: list[dict[str, Any]]) -> str:
    """Releases by what they are evidence for; one that did not hold says so."""
    groups: dict[str, list[str]] = {}
    for one in entries:
        name = one["vllm"] + ("" if one["held"] else " FAILED")
        groups.setdefault(f"{one['kind']}, {one['device']}, {one['dtype']}", []).append(name)
    return "; ".join(f"{what}: {', '.join(sorted(set(names)))}" for what, names in sorted(groups.items())) or "none"
