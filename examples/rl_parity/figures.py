"""
Draw the study's ``results.json``: docs/rl_parity-<workload>.png, and the part of docs/rl_parity.md between its marks.

    python examples/rl_parity/figures.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from objectives import OBJECTIVES
from parity import LEVEL, POWER, least_shift, p_value, windows
from study import ARMS, RESULTS, ROOT, Arm
from train import CURVES, WORKLOADS, Settings

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = ROOT / "docs"
PAGE = DOCS / "rl_parity.md"
BEGIN, END = "<!-- results: made by `make rl-parity` -->\n", "<!-- end -->\n"
TITLES = {"clip_rate": "clip rate", "kl_new_old": "KL new/old (k3, nats)", "entropy": "entropy (nats)", "reward": "reward"}
LABELS = {arm.name: arm.label for arm in ARMS}
# In the pictures; the ablations are in the table.
STYLES = {
    "v0": {"color": "black", "linewidth": 2.2},
    "0.18.1": {"color": "#d95f02", "linestyle": "--"},
    "0.32.0": {"color": "#e7298a", "linestyle": "--"},
    "0.18.1-import": {"color": "#1b9e77"},
    "0.32.0-import": {"color": "#7570b3"},
}
PARITY = ("0.18.1-import", "0.32.0-import")
Runs = dict[str, list[dict[str, Any]]]


def curves(runs: Runs, arm: str, metric: str) -> list[list[float]]:
    return [[row[metric] for row in run["rows"]] for run in runs[arm]]


def name(workload: str) -> str:
    algorithm, changed = WORKLOADS[workload]
    settings = Settings(**changed)
    return f"{algorithm.upper()}, T={settings.temperature:g}, top-p {settings.top_p:g}"


def draw(workload: str, runs: Runs) -> None:
    figure, places = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for metric, axes in zip(CURVES, places.flat):
        for arm, style in STYLES.items():
            if arm not in runs:
                continue
            found = np.asarray(curves(runs, arm, metric))
            steps = np.arange(1, found.shape[1] + 1)
            label = f"{LABELS[arm]} ({len(found)} seeds)"
            axes.plot(steps, found.mean(0), label=label, **style)
            if arm == "v0":
                axes.fill_between(
                    steps, found.min(0), found.max(0), color="black", alpha=0.15, linewidth=0, label="V0, all seeds"
                )
        if metric in ("clip_rate", "kl_new_old"):  # zeros happen: linear below, logarithmic above
            axes.set_yscale("symlog", linthresh=1e-3 if metric == "clip_rate" else 1e-5)
            axes.set_ylim(bottom=0)
        axes.set_title(TITLES[metric])
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    handles, labels = places[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False)
    figure.suptitle(f"{name(workload)}: mean over seeds; bfloat16, updates inside running requests")
    figure.savefig(DOCS / f"rl_parity-{workload}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def verdict(runs: Runs, arm: str, metric: str, reference: str) -> dict[str, Any]:
    """How an arm's curve lies to the reference's."""
    wanted, mine = windows(curves(runs, reference, metric)), windows(curves(runs, arm, metric))
    mean = mine.mean(0)
    return {
        "p": p_value(wanted, mine), "mean": float(mean.mean()), "windows": len(mean),
        "inside": int(((mean >= wanted.min(0)) & (mean <= wanted.max(0))).sum()),
    }  # fmt: skip


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.1e}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(runs: Runs, arms: Iterable[Arm], reference: str = "v0") -> Iterable[list[str]]:
    for arm in arms:
        cells = [f"{arm.label} ({len(runs[arm.name])})"]
        for metric in CURVES:
            found = verdict(runs, arm.name, metric, reference)
            told = f"**p={found['p']:.3f}**" if found["p"] < LEVEL else f"p={found['p']:.2f}"
            cells.append(f"{number(found['mean'])}, {found['inside']}/{found['windows']}, {told}")
        yield [*cells, equal_weights(runs, arm.name)]


def equal_weights(runs: Runs, arm: str) -> str:
    """Mean |trainer - engine| in nats over the first batch: no update has been made, so nothing of it is lag."""
    return number(float(np.mean([run["rows"][0]["abs_dlogprob"] for run in runs[arm]])))


def section(workload: str, runs: Runs) -> str:
    have = [arm for arm in ARMS if arm.name in runs]
    objective = OBJECTIVES[WORKLOADS[workload][0]]
    clipped = "sequence" if objective.by_sequence else "token"
    power = []
    for metric in CURVES:
        v0 = windows(curves(runs, "v0", metric))
        alike = [windows(curves(runs, arm, metric)) for arm in PARITY if arm in runs and len(runs[arm]) > 1]
        power.append([TITLES[metric], number(float(v0.mean())), *(number(least_shift(v0, alike, count)) for count in (5, 3))])
    header = ["arm (seeds)", *(TITLES[metric] for metric in CURVES), "Δ at equal weights"]
    means = [number(float(np.mean(curves(runs, "v0", metric)))) for metric in CURVES]
    first = [f"{LABELS['v0']} ({len(runs['v0'])})", *means, equal_weights(runs, "v0")]
    plain = [arm for arm in have if arm.name != "v0" and "-no-" not in arm.name]
    ablations = [arm for arm in have if "-no-" in arm.name]
    title = name(workload)
    text = (
        f"### {title}\n\n![{title}: clip rate, KL, entropy and reward of the arms](rl_parity-{workload}.png)\n\n"
        f"Clip range {objective.low:g} by {clipped}. Cells: mean over the run, windows of the mean curve inside V0's seeds, p "
        f"against V0 (bold: < {LEVEL}). Last column: mean absolute Δ of the first batch, nats.\n\n"
        + table(header, [first, *rows_of(runs, plain)])
        + "\n"
        f"The least constant shift of a curve that the test finds in {POWER:.0%} of repetitions:\n\n"
        + table(["metric", "V0's mean", "5 seeds against 5", "3 against 5"], power)
    )
    if ablations and "0.32.0-import" in runs:
        text += "\nOne behavior given up at a time, on 0.32.0, against 0.32.0 + import:\n\n"
        text += table(header, rows_of(runs, ablations, "0.32.0-import"))
    return text


def main() -> None:
    results = json.loads(RESULTS.read_text())
    parts = []
    for workload in WORKLOADS:
        runs = results.get(workload, {})
        if len(runs.get("v0", ())) > 1:
            draw(workload, runs)
            parts.append(section(workload, runs))
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n".join(parts) + END + rest.split(END, 1)[1], encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)} and the pictures beside it")


if __name__ == "__main__":
    main()
