"""``vllm-compat diagnose``: why trainer and rollout disagree, from what a training loop already has and a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_compat import diagnose, reference, rollouts
from vllm_compat.errors import InputError


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser(
        "diagnose",
        help="attribute the mismatch between trainer and rollout to its causes",
        description="Reads sequences with the logprobs of both sides (docs/diagnose.md has the fields) and computes what each "
        "side should have returned. Needs torch and transformers. Exit code 0: nothing beyond the rounding floor; 1: a cause was "
        "named, "
        "or something is unexplained; 2: bad input.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL, or .parquet, .arrow, .feather (pyarrow)")
    parser.add_argument(
        "--model", action="append", required=True, metavar="[VERSION=]FOLDER",
        help="a transformers model folder; one for each version of the weights that the rows name, and older ones to be compared",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of both forward passes (default: the model's)"
    )
    parser.add_argument("--sampling-params", metavar="JSON", help="vLLM's names; for rows that have none of their own")
    for side in ("trainer", "rollout"):
        parser.add_argument(
            f"--{side}-head",
            choices=("float32", "model"),
            help=f"what the {side}'s lm_head is said to be, where the data do not tell",
        )
    parser.add_argument("--device", default="cpu", help="torch device of the model (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences per forward pass (default: 8)")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the causes by share; 0 healthy, 1 not."""
    try:
        params = None if args.sampling_params is None else json.loads(args.sampling_params)
    except ValueError as error:
        raise InputError(f"--sampling-params: no JSON ({error}): want an object with vLLM's names") from None
    if params is not None and not isinstance(params, dict):
        raise InputError("--sampling-params: want a JSON object with vLLM's names")
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: want 1 or more")
    models = reference.folders(args.model)
    dtype = args.dtype or reference.dtype_of(models[max(models)])
    said = {"trainer": args.trainer_head, "rollout": args.rollout_head}
    heads = {
        side: "unknown" if head is None else "rounded" if head == "model" and dtype != "float32" else "float32"
        for side, head in said.items()
    }
    try:
        found = diagnose.diagnose(
            rollouts.read(args.files, params), models, dtype=dtype, heads=heads, device=args.device, batch_size=args.batch_size,
            progress=lambda line: print(line, file=sys.stderr),
        )  # fmt: skip
    except ImportError as error:
        raise InputError(f"diagnose needs torch and transformers: {error}") from None
    print(json.dumps(found.to_dict(), indent=1) if args.json else diagnose.text(found))
    return int(not found.healthy)
