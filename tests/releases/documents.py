"""Write what is known about the releases into the documents: the table in README.md, and docs/releases.md.

python tests/releases/documents.py           write          (`make releases`)
python tests/releases/documents.py --check   exit code 1 where a document is not what the data says
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

os.environ["VLLM_COMPAT_PROFILE"] = "off"  # this program only reads

from environment import ROOT

from vllm_compat import releases
from vllm_compat.behaviors import ALL
from vllm_compat.cli.releases import describe

README, PAGE = ROOT / "README.md", ROOT / "docs" / "releases.md"
_MARK = re.compile(r"(<!-- releases: made by `make releases` -->\n).*?(<!-- end -->)", re.DOTALL)
_SHORT = {"native": "option", "patch": "patch", "native + patch": "option + patch", "not_needed": "not needed"}


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(row) + " |" for row in (head, tuple("---" for _ in head), *body)]
    return "\n".join(lines) + "\n"


def _nats(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1e}" if 0 < value < 0.01 else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _update(row: dict[str, Any]) -> tuple[str, str]:
    found = row["weight_update"]
    return (_nats(found["worst"]), _nats(found["without_the_hook"])) if isinstance(found, dict) else ("not measured", "–")


def readme(found: list[dict[str, Any]]) -> str:
    """The section of the README: live releases with figures, then the others by name."""
    rows = [
        ("vLLM", "engine", "worst Δ, with", "as it comes", "weight update, with", "without", "how: logprobs", "head", "update")
    ]
    for row in found:
        if row["tier"] == "live":
            route = row["routes"][row["ran"]["engine"].lower()]
            how = [_SHORT[route[name]] for name in ("processed_logprobs", "fp32_lm_head", "synchronized_weight_update")]
            dtype = "" if row["dtype"] == "float32" else f" ({row['dtype']})"
            worst = row["worst"]
            figures = (_nats(worst["with"]) + dtype, _nats(worst["without"]), *_update(row))
            rows.append((f"**{row['version']}**", row["ran"]["engine"], *figures, *how))
    read = ", ".join(row["version"] for row in found if row["tier"] == "sources")
    return (
        _table(rows)
        + f"\nSources checked, no engine run: {read}.\n\n"
        + f"Refused by name: every other version, older than {found[0]['version']}, newer than {found[-1]['version']}, "
        + "candidates and development builds.\n"
    )


def page(found: list[dict[str, Any]]) -> str:
    """docs/releases.md, whole."""
    names = [behavior.name for behavior in ALL]
    routes = [("vLLM", "tier", "runner", *(f"`{name}`" for name in names))]
    for row in found:
        for runner, route in sorted(row["routes"].items()):
            ran = row["ran"] and row["tier"] == "live" and row["ran"]["engine"].lower() == runner
            tier = "live" if ran else "sources"
            cells = (_SHORT.get(route[name], route[name]) for name in names)
            routes.append((row["version"], tier, runner.upper(), *cells))
    measured = [("vLLM", "engine", "torch", "date", "dtype", "worst Δ, with", "as it comes", "states")]
    for row in found:
        if row["ran"] and row["worst"]:
            states = ", ".join(f"{name} {state}" for name, state in (row["states"] or {}).items())
            figures = (_nats(row["worst"]["with"]), _nats(row["worst"]["without"]))
            ran = row["ran"]
            measured.append((row["version"], ran["engine"], ran["torch"], ran["date"], row["dtype"], *figures, states))
    unread = [("vLLM", "functions whose body no live release has")]
    for row in found:
        if row["only_read"]:
            unread.append((row["version"], ", ".join(f"`{path.partition(':')[2]}`" for path in row["only_read"])))
    return (
        "# vLLM releases\n\n"
        "Made by `make releases` from `tests/releases/`; `vllm-compat releases [--json]` prints the same. How a release gets in: "
        "[a-new-release.md](a-new-release.md).\n\n"
        "## What was measured\n\n"
        "On the CPU build of each release, in an environment of its own, by `make matrix`: the shipped tiny model, 21 sampling "
        "settings in one batch, whole distributions and prompt rows against the recording of vLLM 0.8.5's V0 engine; |Δlogprob| in "
        "nats, worst cell. On releases up to 0.10.2 V1 was asked for with `VLLM_USE_V1=1`. 0.9.1 refuses float32 on V1, so its "
        "figures are bfloat16 rounding, and its bound is twice the mean gap of V0's own bfloat16 engine.\n\n"
        + _table(measured)
        + "\n## The routes\n\n"
        "`option` is vLLM's own, `patch` is ours. V2 is Model Runner V2: never chosen, since `model_runner_v1` pins V1; an engine "
        "that insists on V2 is refused.\n\n" + _table(routes) + "\n## Read, not run\n\n"
        "A release that was not run is supported by its sources: every function we replace or rely on is there, takes what we "
        "pass, and is overridden by no subclass. These are the functions (Model Runner V1) whose body is none that was run; what "
        "they do was not seen, and the self-tests of your engine's processes decide.\n\n" + _table(unread)
    )


def main() -> int:
    """Write, or check."""
    found = [describe(version) for version in releases.rows()]
    text = README.read_text()
    new = {README: _MARK.sub(lambda match: match[1] + readme(found) + match[2], text), PAGE: page(found)}
    stale = [file for file, content in new.items() if not file.is_file() or file.read_text() != content]
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is not what the data says: run `make releases`")
        return int(bool(stale))
    for file in stale:
        file.write_text(new[file])
    return 0


if __name__ == "__main__":
    sys.exit(main())
