"""``vllm-compat validate``: does this vLLM compute what the reference computed? A verdict a band, an HTML report, JSON."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TextIO

from vllm_compat import html_report, profiles, recording, settings, validation, validation_report
from vllm_compat.cli import record
from vllm_compat.cli.lock import planned
from vllm_compat.errors import RecordingError, VllmCompatError
from vllm_compat.html_report import limit, place, who
from vllm_compat.patching.model import State
from vllm_compat.pictures import number
from vllm_compat.recording import Recording
from vllm_compat.version import __version__

_WORST = 8  # rows that are printed where a band failed


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "validate",
        help="compare this vLLM with a recorded reference, position by position, and judge by the profile's bands",
        description="Asks the installed vLLM what the reference was asked (docs/validate.md), compares teacher-forced, and "
        "writes found.safetensors, report.html and report.json. Exit code 0: every band held; 1: a band failed; 2: could not be "
        "done.",
    )
    parser.add_argument("model", nargs="?", type=Path, help="the model folder; not with --found")
    parser.add_argument("--reference", type=Path, required=True, metavar="REF", help="a recording: `vllm-compat record`")
    parser.add_argument("--exact", type=Path, metavar="REC", help="the same in float64 (record --engine trainer --dtype float64 "
        "--like REF): gives a float32 engine's recording a rounding floor")  # fmt: skip
    parser.add_argument("--profile", default="auto", metavar="P", help="as VLLM_COMPAT_PROFILE (default auto); off: the engine "
        "as it is, judged by the bands of auto")  # fmt: skip
    parser.add_argument("--found", type=Path, metavar="REC", help="judge this recording (made --like REF) and start no engine")
    parser.add_argument("--out", type=Path, default=Path("validation"), metavar="FOLDER", help="default: ./validation")
    parser.add_argument("--engine-args", metavar="JSON", help="more arguments for vLLM's LLM(...)")
    parser.add_argument("--unseeded", action="store_true", help="as in `vllm-compat record`")
    parser.add_argument("--json", action="store_true", help="print report.json instead of text")
    parser.add_argument("--evidence", type=Path, metavar="PROFILE.toml", help="write the outcome into a profile's file")
    parser.add_argument("--kind", choices=("architecture", "checkpoint"), help="of --evidence: seeded weights, or a real model")
    parser.add_argument("--note", default="", metavar="TEXT", help="of --evidence")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record where needed, judge, print, write; 0 held, 1 not."""
    _check(args)
    reference = recording.load(args.reference)
    if not reference.header["floor"]:
        raise RecordingError(f"{args.reference}: recorded with --no-floor, and a band is a multiple of that: record it again")
    exact = recording.load(args.exact) if args.exact else None
    judged = reference if exact is None else validation.with_exact(reference, exact)
    profile, notes = profiles.choose("auto" if args.profile == "off" else args.profile, reference.header["model"]["config"])
    args.out.mkdir(parents=True, exist_ok=True)
    found, stdout = (_load(args.found, reference), sys.stdout) if args.found else _record(args, reference)
    if found is None:
        return 2
    if args.evidence and found.header["made_by"]["side"] != "vllm":
        raise RecordingError(f"evidence is about an engine, and {args.found} was made by a trainer")
    validation.same_head(found, reference)
    bands = {name: (band.batch, band.rounding) for name, band in profile.all_bands().items()}
    print("comparing, position by position", file=sys.stderr)
    measured = validation.measure(found, reference)
    verdicts = validation.judge(measured.metrics, judged, bands)
    data = validation_report.build(found, judged, measured, verdicts, profile.name, [*notes, *_notes(found, judged, exact)])
    data["reference"]["checksum"] = reference.checksum()  # of the file, whatever floor was added
    text = json.dumps(data)
    for name, content in (("report.json", text), ("report.html", html_report.page(data))):
        (args.out / name).write_text(content, encoding="utf-8")
    print(text if args.json else _text(data, args.out), file=stdout, flush=True)
    if args.evidence:
        profiles.add_evidence(args.evidence, _evidence(args, data))
        print(f"evidence: {args.evidence}", file=sys.stderr)
    return int(not data["held"])


def _check(args: argparse.Namespace) -> None:
    """Everything about the command line that can be wrong, before a file is read."""
    if (args.model is None) == (args.found is None):
        raise RecordingError("validate wants either MODEL, to run this vLLM, or --found REC, a recording of one that ran")
    if args.found and (args.engine_args or args.unseeded):
        raise RecordingError("--engine-args and --unseeded are for a run: leave them out with --found")
    if args.out.exists() and not args.out.is_dir():
        raise RecordingError(f"--out {args.out}: a file is there, and a folder is wanted")
    if args.evidence is None:
        if args.kind or args.note:
            raise RecordingError("--kind and --note are parts of --evidence PROFILE.toml: name that file")
    else:
        if not args.kind:
            raise RecordingError(
                "--evidence wants --kind: architecture (seeded weights of its shape) or checkpoint (a real model)"
            )
        profiles.read(args.evidence)


def _load(file: Path, reference: Recording) -> Recording:
    found = recording.load(file)
    ours, theirs = (one.header["made_by"]["dtype"] for one in (found, reference))
    if ours != theirs:
        raise RecordingError(
            f"{file} is {ours}, the reference {theirs}: rounding would be judged as a difference. Record with --dtype {theirs}"
        )
    return found


def _record(args: argparse.Namespace, reference: Recording) -> tuple[Recording | None, TextIO]:
    """This vLLM's answers, from a finished recording of the same command where there is one (None: interrupted); and where
    the result is to be printed."""
    out, dtype = args.out / "found.safetensors", reference.header["made_by"]["dtype"]
    job = record.Job(
        argparse.Namespace(
            model=args.model, out=out, engine="vllm", dtype=dtype, head="float32", profile=args.profile, like=args.reference,
            prompts=None, positions=1, top_n=None, no_floor=True, engine_args=args.engine_args or "{}", unseeded=args.unseeded,
            status=None,
        )
    )  # fmt: skip
    if out.is_file():
        try:
            kept = recording.load(out)
        except RecordingError as error:
            print(f"{error}: recording anew", file=sys.stderr)
        else:
            if kept.header["made_by"].get("key") == job.key:
                print(f"{out}: already recorded by the same command, reused (delete it to run again)", file=sys.stderr)
                return kept, sys.stdout
            print(f"{out}: of another engine, profile, reference or setting: recording anew", file=sys.stderr)
    head = _expected_head(args, dtype, reference.header["model"]["config"])
    if head is not None:
        validation.same_head(Recording({"made_by": {"lm_head": head}}, {}), reference)
    stdout = _aside()
    try:
        return job.run(), stdout
    except VllmCompatError:
        raise
    except Exception as error:  # whatever vLLM raises: exit code 1 would say that a band failed
        traceback.print_exc()
        raise RecordingError(f"the engine gave no answers: {type(error).__name__}, above") from error


def _expected_head(args: argparse.Namespace, dtype: str, config: Mapping[str, Any]) -> str | None:
    """What the engine's logits will be, as `validation.head_dtype` says of one that runs; None where only that tells."""
    if dtype == "float32":
        return dtype
    given: dict[str, Any] = json.loads(args.engine_args or "{}")
    if "head_dtype" in json.dumps([given, config]):
        return None
    if args.profile == "off":
        return dtype
    plan, _ = planned(settings.load().model_copy(update={"profile": args.profile}), dict(config), None, given)
    decision = plan["fp32_lm_head"]
    if decision.wanted:
        return "float32"
    return dtype if decision.state in (State.DISABLED, State.UNSUPPORTED, State.FAILED) else None


def _aside() -> TextIO:
    """A copy of stdout for the result. File descriptor 1 is stderr from now on: vLLM and the processes it starts log to
    stdout, until after our own last line."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _notes(found: Recording, reference: Recording, exact: Recording | None) -> list[str]:
    """What a reader must know besides the numbers."""
    notes = []
    if exact is not None:
        notes.append(f"the reference's rounding floor is its distance to {who(exact.header['made_by'])}")
    dtype = reference.header["made_by"]["dtype"]
    if dtype != "float32" and reference.header["floor"]["rounding"] is None:
        notes.append(
            f"the reference is {dtype} and has no rounding floor, so what {dtype} itself changes counts as a difference: record "
            f"it again with --like a float32 recording"
        )
    reported = found.header["made_by"].get("reported")
    if reported and not reported["proven"]:
        notes.append("the engine's processes did not prove that the profile is in force (VLLM_COMPAT_STRICT=0)")
    return notes


def _text(data: Mapping[str, Any], folder: Path) -> str:
    """What is printed."""
    found, reference = data["found"], data["reference"]
    lines = [
        f"model      {found['model']} (weights {found['weights_sha256'][:12]})",
        *(
            f"{name:10} {who(side['made_by'])} (torch {side['made_by']['torch']}, {side['made_by']['device']}; recording "
            f"{side['checksum'][:12]})"
            for name, side in (("found", found), ("reference", reference))
        ),
        f"compared   {reference['settings']} settings, {reference['prompts']} prompts, "
        f"{len(data['rows']['values'])} rows of logprobs",
        *(f"note       {note}" for note in data["notes"]),
        "",
    ]
    lines += _columns(
        [("metric", "measured", "limit", "factor × batch floor", "factor × rounding floor", "verdict")]
        + [
            (band["metric"], number(band["value"]), number(band["limit"]), *limit(band), "held" if band["held"] else "FAILED")
            for band in data["bands"]
        ]
    )
    reported = found["made_by"].get("reported")
    lines.append("")
    if reported is None:
        lines.append("the engine's processes reported nothing: no vllm_compat was active in them")
    else:
        processes = ", ".join(place(role, rank) for role, rank in reported["processes"])
        lines.append(f"reported by {processes} ({'proven' if reported['proven'] else 'NOT PROVEN'}):")
        lines += _columns([(name, row["state"], row["decided_by"]) for name, row in reported["behaviors"].items()])
    if not data["held"]:
        lines += ["", "worst rows, logprobs of the reference's token in nats:"]
        lines += _columns(
            [("setting", "kind", "prompt", "position", "found", "reference", "|Δ|")]
            + [
                (
                    one["setting"], one["kind"], str(one["prompt"]), str(one["position"]), number(one["found"]),
                    number(one["reference"]), number(one["size"]),
                )
                for one in data["worst"][:_WORST]
            ]
        )  # fmt: skip
    held = len(data["bands"]) - len(data["failed"])
    verdict = "HELD" if data["held"] else "FAILED"
    lines += ["", f"{verdict}: {held} of {len(data['bands'])} bands of profile {data['profile']} held; {folder / 'report.html'}"]
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _evidence(args: argparse.Namespace, data: Mapping[str, Any]) -> profiles.Evidence:
    found, reference = data["found"], data["reference"]
    made = found["made_by"]
    words = ["vllm-compat", "validate", *([found["model"]] if args.model else ["--found", args.found.name])]
    words += ["--reference", args.reference.name, "--profile", args.profile]
    words += ["--exact", args.exact.name] if args.exact else []
    words += ["--engine-args", args.engine_args] if args.engine_args else []
    words += ["--unseeded"] if args.unseeded else []
    return profiles.Evidence(
        kind=args.kind,
        model=found["model"],
        weights=found["weights_sha256"],
        reference=reference["checksum"],
        reference_by=who(reference["made_by"]),
        engine=made["engine"],
        vllm=made["vllm"],
        dtype=made["dtype"],
        lm_head=made["lm_head"],
        device=made["device"],
        date=date.today(),
        vllm_compat=__version__,
        command=shlex.join(words),
        held=data["held"],
        failed=tuple(data["failed"]),
        note=args.note,
        metrics={
            band["metric"]: validation.significant(float(band["value"])) for band in data["bands"] if band["value"] is not None
        },
    )
