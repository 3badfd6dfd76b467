"""``vllm-compat gpu-reference``: the reference run on a card, step by step, and the evidence it leaves. docs/gpu_reference.md"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from vllm_compat.errors import RecordingError
from vllm_compat.gpu_reference import summary
from vllm_compat.gpu_reference.loop import BROKEN, FAILED, NOT_RUN, Loop
from vllm_compat.gpu_reference.models import REHEARSED, SHAPES
from vllm_compat.gpu_reference.steps import Choice, listed

MORE = 3  # exit code: time was up


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "gpu-reference",
        help="make models, record the trainer, run vLLM in every way on this card and judge: resumable, offline",
        description="Exit code 0: done; 1: a band of vllm_compat failed; 2: a step was not run, or broke; 3: more to do, by the "
        "same command.",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, no evidence about a GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu-reference"), metavar="FOLDER", help="default: ./gpu-reference")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"of language, {', '.join([*SHAPES, *REHEARSED])}")
    parser.add_argument("--train-seconds", type=float, default=240, help="of the language model (default 240)")
    parser.add_argument(
        "--profiles", type=Path, metavar="FOLDER", help="profiles that get the evidence (default: copies in --out)"
    )
    parser.add_argument("--sources", type=Path, metavar="FOLDER", help="with an unpacked vllm/, whose sampler is tested too")
    parser.add_argument("--step", metavar="NAME", help="run this one only")
    parser.add_argument("--steps", action="store_true", help="list the steps with what each shows and does not show")
    parser.add_argument("--limit", type=float, default=480, metavar="S", help="seconds until it stops cleanly (default 480)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List, or go through, the steps."""
    models = args.models or (["language", *SHAPES] if args.device == "cuda" else ["language", *REHEARSED])
    unknown = set(models) - {"language", *SHAPES, *REHEARSED}
    if unknown:
        raise RecordingError(f"--models {', '.join(sorted(unknown))}: there are language, {', '.join([*SHAPES, *REHEARSED])}")
    if args.limit <= 0 or args.train_seconds <= 0:
        raise RecordingError("--limit and --train-seconds want a number of seconds above 0")
    if args.sources is not None and not (args.sources / "vllm" / "v1" / "sample" / "sampler.py").is_file():
        raise RecordingError(f"--sources {args.sources}: there is no vllm/v1/sample/sampler.py in it; unpack a wheel there")
    if args.profiles is not None and not list(args.profiles.glob("*.toml")):
        raise RecordingError(f"--profiles {args.profiles}: there are no profiles (*.toml); a checkout's are in profiles/")
    choice = Choice(
        args.out.resolve(), args.device, models, args.train_seconds, args.profiles and args.profiles.resolve(),
        args.sources and args.sources.resolve(),
    )  # fmt: skip
    steps = listed(choice)
    if args.steps:
        for step in steps:
            print(f"{step.name}\n  shows: {step.shows}\n  does not show: {step.shows_not}")
        return 0
    chosen = [step for step in steps if args.step in (None, step.name)]
    if not chosen:
        raise RecordingError(f"--step {args.step}: there is no such step; --steps lists them")
    if args.device == "cuda":
        fits(models, memory())
    loop = Loop(choice)
    finished = loop.go(chosen, args.limit)
    choice.out.mkdir(parents=True, exist_ok=True)
    summary.write(choice, steps, summary.build(choice, steps, loop.state, loop.run_by))
    print(choice.out / "report.html")
    if not finished:
        again = ["vllm-compat", "gpu-reference", "--device", args.device, "--out", str(args.out), "--models", *models]
        for name in ("profiles", "sources"):
            again += [f"--{name}", str(vars(args)[name])] if vars(args)[name] else []
        again += ["--train-seconds", str(args.train_seconds), *(["--step", args.step] if args.step else [])]
        print(f"time was up; what is done is kept. Go on with: {shlex.join([*again, '--limit', str(args.limit)])}")
        return MORE
    found = {step.name: loop.state[step.name]["state"] for step in chosen}
    if any(step.judged and found[step.name] == FAILED for step in chosen):
        return 1
    return 2 if set(found.values()) & {NOT_RUN, BROKEN} else 0


def memory() -> int:
    """Bytes of the first card. RecordingError where there is none."""
    try:
        import torch
    except ImportError:
        raise RecordingError("gpu-reference needs torch, and there is none here") from None
    if not torch.cuda.is_available():
        raise RecordingError("no CUDA device here: --device cpu rehearses the steps, without evidence about a GPU")
    return int(torch.cuda.get_device_properties(0).total_memory)


def fits(models: list[str], there: int) -> None:
    """RecordingError that names the models whose estimate is more than the card has."""
    large = {name: SHAPES[name].bytes_needed for name in models if name in SHAPES and SHAPES[name].bytes_needed > there}
    if large:
        said = ", ".join(f"{name} (about {size / 2**30:.0f} GiB)" for name, size in large.items())
        rest = " ".join(name for name in models if name not in large)
        raise RecordingError(f"this card has {there / 2**30:.0f} GiB, too little for {said}: --models {rest}")
