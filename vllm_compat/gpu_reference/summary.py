"""The report of a reference run: every step with its outcome, the pictures of what was validated, and others' figures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vllm_compat.gpu_reference.models import SHOWS
from vllm_compat.gpu_reference.steps import BENCHMARKS, Choice, Step
from vllm_compat.html_page import frame, picture, section, table
from vllm_compat.pictures import histogram, number

# Ours of the same kinds: metric of `vllm_compat.metrics` -> column
OURS = {
    "pearson_probs": "Pearson r", "ratio_outside_0.9_1.1": "outside [0.9, 1.1]", "kl_rollout_trainer_k3": "KL k3",
    "abs_dlogprob_mean": "mean |Δlogprob|",
}  # fmt: skip
_LOG = re.compile(r" (?:INFO|WARNING|ERROR) \d|it/s\]|\[W\d|Warning")  # an engine's lines between a benchmark's own
_LAST = 150  # lines of a benchmark's

# What others have published: (what, figure, source). Their models, cards and engines are not ours.
ANCHORS = (
    ("rollout/trainer probabilities, Pearson r, before and after a float32 head (MiniMax-M1)", "0.987319 → 0.997135",
     "arXiv 2506.13585, Fig. 3"),
    ("importance ratios outside [0.9, 1.1], vLLM against transformers, Qwen2.5-0.5B-Instruct", "7.5 %", "trl#6789"),
    ("the same, float32 trainer", "3.7 %", "trl#6789"),
    ("the same, the trainer against itself at another batch size (the floor)", "8.0 %", "trl#6789"),
    ("batch invariance, Qwen3-8B, 1000 sequences: default, deterministic, improved", "26 s, 55 s, 42 s",
     "Thinking Machines, 2025-09-10"),
    ("batch invariance, vLLM and TorchTitan, Qwen3-1.7B", "KL 0, 2.4 × slower", "vLLM blog, 2025-11-10"),
    ("batch invariance, TorchTitan's RL, 8 H100, Qwen3-8B: ms between tokens without and with", "9.6 → 22.8",
     "torchtitan, experiments/rl/docs/bitwise_parity.md"),
)  # fmt: skip


def build(choice: Choice, steps: Sequence[Step], state: Mapping[str, Any], run_by: Mapping[str, Any]) -> dict[str, Any]:
    """report.json's content: plain data."""
    rows = []
    for step in steps:
        row = {"step": step.name, "shows": step.shows, "shows_not": step.shows_not, "judged": step.judged,
               "state": "to do", "reason": None, "seconds": None, "used": [], **run_by, **state.get(step.name, {})}  # fmt: skip
        if step.out is not None and row["state"] in ("done", "a band failed"):
            found = json.loads((step.out / "report.json").read_text(encoding="utf-8"))
            row |= {"bands": {band["metric"]: [band["value"], band["limit"], band["held"]] for band in found["bands"]}}
            row |= {"made_by_device": found["found"]["made_by"]["device"]}
            # the floor is the reference against itself in another batch
            row["figures"] = {
                metric["name"]: [metric["value"], metric["batch_floor"]]
                for metric in found.get("metrics", ())
                if metric["name"] in OURS
            }
        elif row["state"] == "done" and str(step.words[0]).startswith(str(BENCHMARKS)):
            log = (choice.out / "logs" / f"{step.name.replace(':', '-')}.txt").read_text(encoding="utf-8", errors="replace")
            row["said"] = [line for line in log.splitlines() if line.strip() and not _LOG.search(line)][-_LAST:]
        rows.append(row)
    notes = []
    if choice.device == "cpu":
        notes.append("A rehearsal on a CPU: nothing here is evidence about a GPU.")
    if run_by["vllm"] is None:
        notes.append("No vLLM is installed here: only the steps that need torch alone ran.")
    return {**run_by, "notes": notes, "steps": rows, "anchors": [list(row) for row in ANCHORS]}


def write(choice: Choice, steps: Sequence[Step], data: Mapping[str, Any]) -> None:
    """report.json and report.html into the run's folder."""
    (choice.out / "report.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    title = f"Reference run on {data['device']}, " + (f"vLLM {data['vllm']}" if data["vllm"] else "no vLLM")
    rows = [
        [escape(row["step"]), escape(row["state"]), escape(row["reason"] or ", ".join(row["used"])),
         "" if row["seconds"] is None else f"{row['seconds']:.0f}", escape(row["shows"]),
         "" if row["shows_not"] in SHOWS.values() else escape(row["shows_not"])]
        for row in data["steps"]
    ]  # fmt: skip
    pictures, checks = [], []
    for step, row in zip(steps, data["steps"]):
        if row.get("figures") and step.out is not None:
            found = json.loads((step.out / "report.json").read_text(encoding="utf-8"))
            held = sum(band[2] for band in row["bands"].values())
            caption = f"{step.name}: {held} of {len(row['bands'])} bands held, on {row['made_by_device']}"
            pictures.append(picture(histogram(found["histogram"]), caption))
        elif "bands" in row:
            checks += [
                [
                    escape(step.name),
                    escape(name),
                    number(value),
                    number(limit),
                    "" if limit is None else "held" if held else "not held",
                ]
                for name, (value, limit, held) in row["bands"].items()
            ]
    figures = [
        [escape(row["step"]), *(number(row["figures"][name][side]) for name in OURS for side in (0, 1))]
        for row in data["steps"]
        if row.get("figures")
    ]
    columns = [word for column in OURS.values() for word in (escape(column), "its floor")]
    said = [
        f"<h3>{escape(row['step'])}</h3><pre class=scroll>{escape(chr(10).join(row['said']))}</pre>"
        for row in data["steps"]
        if row.get("said")
    ]
    body = [
        f"<header><h1>{escape(title)}</h1>", *(f'<p class="note">{escape(note)}</p>' for note in data["notes"]), "</header>",
        section("Models", "", *(f"<p>{escape(text[0].upper() + text[1:])}</p>" for text in SHOWS.values())),
        section("Steps", "A step that was not run says why; what a model's step does not show stands above.", table(
            ("step", "outcome", "why; used, by vLLM's log", "seconds", "shows", "does not show"), rows, (3,))),
        section("Rollout against trainer", "The floor: the trainer against itself in another batch.", table(
            ("step", *columns), figures, range(1, 1 + len(columns)))),
        section("Figures of others", "For comparison: other models, cards and engines.", table(
            ("what", "figure", "source"), [[escape(cell) for cell in row] for row in data["anchors"]])),
        section("Checks without a trainer", "Values in nats, or shares.", table(
            ("step", "what", "value", "limit", "outcome"), checks, (2, 3))),
        section("Benchmarks", "As they said it.", *said),
        section("What was validated", "|Δlogprob| in nats; each step's own report.html lies in its folder.", *pictures),
    ]  # fmt: skip
    (choice.out / "report.html").write_text(frame(title, body), encoding="utf-8")
