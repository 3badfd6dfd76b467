"""``vllm-compat record``: run the installed vLLM on fixed prompts and settings and keep what it computed.

Works on any vLLM from 0.8.5 on, V0 included; without ``--profile`` the engine runs as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_compat import bootstrap, recording, report, settings, vllm_info
from vllm_compat.errors import RecordingError
from vllm_compat.version import __version__


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser("record", help="record an engine's distributions, prompt rows and greedy tokens")
    parser.add_argument("model", type=Path, help="a model folder with config.json, tokenizer and safetensors weights")
    parser.add_argument("--out", type=Path, required=True, metavar="REF", help="the recording to write (.safetensors)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--profile", default="off", help="off (default): the engine as it is; else as VLLM_COMPAT_PROFILE")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line (default: four built-in prompts)")
    parser.add_argument("--engine-args", default="{}", metavar="JSON", help="more arguments for vLLM's LLM(...)")
    parser.add_argument(
        "--unseeded", action="store_true", help="give requests no seed (vLLM 0.32 on the CPU stops at a chunked prompt with one)"
    )
    parser.add_argument("--status", type=Path, help="also write the engine's status as JSON (with --profile)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record and write; 0 when the file is there."""
    if not args.out.parent.is_dir():
        raise RecordingError(f"--out {args.out}: there is no folder {args.out.parent}")
    weights = sorted(args.model.glob("*.safetensors"))
    if not weights or not (args.model / "config.json").is_file():
        raise RecordingError(f"{args.model}: not a model folder (config.json and *.safetensors are needed)")
    prompts = recording.PROMPTS
    if args.prompts:
        if not args.prompts.is_file():
            raise RecordingError(f"--prompts {args.prompts}: there is no such file")
        prompts = tuple(line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line)
    # Importing this package has activated it; what the recording needs is what --profile says.
    bootstrap.deactivate()
    settings.environ()["VLLM_COMPAT_PROFILE"] = args.profile
    bootstrap.activate()
    made = _record(args, prompts)
    made.header["model"] = {
        "name": args.model.resolve().name,
        "weights_sha256": hashlib.sha256(b"".join(file.read_bytes() for file in weights)).hexdigest(),
        "config": json.loads((args.model / "config.json").read_text(encoding="utf-8")),
    }
    recording.save(made, args.out)
    print(args.out)
    return 0


def _record(args: argparse.Namespace, prompts: tuple[str, ...]) -> recording.Recording:
    import numpy as np
    import torch
    import vllm

    vocab = int(json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    given = {
        "model": str(args.model), "dtype": args.dtype, "max_logprobs": vocab, "max_model_len": 256, "enforce_eager": True,
        **json.loads(args.engine_args),
    }  # fmt: skip
    engine = vllm.LLM(**given)
    tokenizer = engine.get_tokenizer()
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    requests, params, where = [], [], []
    # One batch with all settings mixed, so that a row that leaks into another is seen.
    for s, setting in enumerate(recording.SETTINGS.values()):
        for p, prompt in enumerate(ids):
            more = dict(setting)
            if "logit_bias" in more:
                more["logit_bias"] = {int(token): bias for token, bias in more["logit_bias"].items()}
            more.setdefault("max_tokens", 1)
            scored = vocab if p < recording.PROMPT_ROWS else None
            params.append(
                vllm.SamplingParams(**more, seed=None if args.unseeded else 1000 * s + p, logprobs=vocab, prompt_logprobs=scored)
            )
            requests.append({"prompt_token_ids": prompt})
            where.append((s, p))
    print(f"recording {len(requests)} requests on vLLM {vllm.__version__}", file=sys.stderr)
    tensors: dict[str, Any] = {}
    cached = 0
    for (s, p), output in zip(where, engine.generate(requests, params, use_tqdm=False)):
        best = output.outputs[0]
        cached += output.num_cached_tokens or 0
        tensors[f"{s}/{p}/tokens"] = np.array(best.token_ids, dtype=np.int32)
        tensors[f"{s}/{p}/logprobs"] = recording.dense(best.logprobs, vocab)
        tensors[f"{s}/{p}/cumulative"] = np.array([best.cumulative_logprob], dtype=np.float64)
        if p < recording.PROMPT_ROWS:
            tensors[f"{s}/{p}/prompt_logprobs"] = recording.dense(output.prompt_logprobs[1:], vocab)
    if args.status is not None:
        found = [status.to_dict() for status in report.status()] if args.profile == "off" else [report.status(engine).to_dict()]
        args.status.write_text(json.dumps(found, indent=1), encoding="utf-8")
    installed = vllm_info.installed()
    header = {
        "prompts": ids,
        "settings": [[name, setting] for name, setting in recording.SETTINGS.items()],
        "vocab": vocab,
        "made_by": {
            "vllm": installed.version if installed else vllm.__version__,
            "engine": _engine_kind(engine),
            "dtype": args.dtype,
            "cached_prompt_tokens": cached,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "vllm_compat": __version__,
            "commit": _commit(),
            "profile": args.profile,
            "command": shlex.join(["vllm-compat", "record", args.model.name, "--out", args.out.name, "--dtype", args.dtype]),
        },
    }
    return recording.Recording(header, tensors)


def _engine_kind(engine: Any) -> str:
    return "V1" if type(engine.llm_engine).__module__.startswith("vllm.v1") else "V0"


def _commit() -> str:
    """The commit of a checkout this runs from, or what there is instead."""
    place = Path(__file__).resolve().parents[2]
    if not (place / ".git").exists():
        return "installed package"
    found = subprocess.run(["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "uncommitted"
