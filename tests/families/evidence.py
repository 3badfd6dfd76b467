"""
Evidence for the profiles: the small model of every family, recorded on V0, validated on each release.

    python tests/families/evidence.py                                       all models, on 0.18.1 and 0.32.0
    python tests/families/evidence.py gemma2 --versions 0.32.0              these
    python tests/families/evidence.py --record                              make the references again, too
    python tests/families/evidence.py --dtype bfloat16                      float32 head on both sides

A reference (references/<model>.safetensors, -bfloat16) is made once: on V0 of vLLM 0.8.5, or by transformers where
models.py says that V0 does not compute the model. What `vllm-compat validate` finds, held or not, goes into the file of the
family's profile, in the place of an older entry. Each release runs in an environment of its own (tests/releases), several
GB each, kept in --folder; the one this runs in is used for its own release.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models import MODELS, ROOT, make

sys.path.insert(0, str(ROOT / "tests" / "releases"))
from environment import build, rows

REFERENCES = Path(__file__).parent / "references"
V0, RELEASES = "0.8.5", ("0.18.1", "0.32.0")
KEPT = ("--top-n", "12", "--positions", "20")  # of each distribution, of each continuation: what keeps a file at 250 kB
ENGINE = {"gpu_memory_utilization": 0.3}


def python(release: str, folder: Path) -> Path:
    """The interpreter that has this vLLM, built where there is none."""
    try:
        if version("vllm").partition("+")[0] == release:
            return Path(sys.executable)
    except PackageNotFoundError:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    return build(rows()[release], folder)


def reference(model: str, dtype: str) -> Path:
    """Where it lies."""
    return REFERENCES / f"{model}{'' if dtype == 'float32' else '-' + dtype}.safetensors"


def run(interpreter: Path, arguments: Sequence[object], environment: dict[str, str]) -> int:
    """One `vllm-compat` command; its exit code. The end of what it said, where that is neither 0 nor 1."""
    done = subprocess.run(
        [str(interpreter), "-m", "vllm_compat", *map(str, arguments)],
        cwd=ROOT, env={**os.environ, **environment}, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        print(done.stdout[-4000:])
    elif done.returncode:
        print(done.stdout[-2500:])
    return done.returncode


def record(model: str, folder: Path, dtype: str, environments: Path) -> bool:
    """Make the reference; whether that worked."""
    file, spec = reference(model, dtype), MODELS[model]
    REFERENCES.mkdir(exist_ok=True)
    command: list[object] = ["record", folder, "--out", file, "--dtype", dtype]
    # The float32 recording beside a bfloat16 one gives its rounding floor, and the questions.
    command += KEPT if dtype == "float32" else ("--like", reference(model, "float32"))
    if spec.trainer:
        return run(Path(sys.executable), [*command, "--engine", "trainer"], {}) == 0
    command += ["--engine-args", json.dumps(ENGINE), "--profile", "off" if dtype == "float32" else "auto"]
    return run(python(V0, environments), command, {"VLLM_USE_V1": "0"}) == 0


def validate(model: str, folder: Path, dtype: str, release: str, environments: Path) -> str:
    """One entry of evidence: held, FAILED, or that there is none."""
    spec = MODELS[model]
    variables = spec.environment.get(release, {})
    facts = (spec.trainer, spec.known.get(release), *(f"{name}={value}" for name, value in variables.items()))
    # What V0's float32 rounds away: a batch floor says little of it where a CPU rounds alike at both batch sizes.
    exact = folder.parent / f"{model}-exact.safetensors"
    if dtype == "float32" and not spec.trainer and not exact.is_file():
        words = ["record", folder, "--out", exact, "--engine", "trainer", "--dtype", "float64", "--no-floor"]
        run(Path(sys.executable), [*words, "--like", reference(model, dtype)], {})
    note = "; ".join(fact for fact in facts if fact)
    code = run(
        python(release, environments),
        [
            "validate", folder, "--reference", reference(model, dtype), "--out", folder.parent / f"{model}-{dtype}-{release}",
            "--engine-args", json.dumps({**ENGINE, **spec.engine_args}), "--kind", "architecture",
            *(["--exact", exact] if exact.is_file() else []),
            "--evidence", ROOT / "profiles" / f"{spec.profile}.toml", *(["--note", note] if note else []),
        ],
        variables,
    )  # fmt: skip
    return {0: "held", 1: "FAILED"}.get(code, "no answer")


def main() -> int:
    """Every model on every release; 0 where all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; or a profile's name for all of its")
    parser.add_argument("--versions", nargs="+", default=RELEASES, metavar="VERSION", help=f"default: {' '.join(RELEASES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--record", action="store_true", help="make the references again")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "engines", help="of the environments")
    args = parser.parse_args()
    chosen = [name for name, spec in MODELS.items() if not args.models or {name, spec.profile} & set(args.models)]
    unknown = set(args.models) - {name for spec in MODELS.items() for name in (spec[0], spec[1].profile)}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no such model or profile")
    bad = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in chosen:
            folder = make(Path(scratch) / model, model)
            if (args.record or not reference(model, args.dtype).is_file()) and not record(model, folder, args.dtype, args.folder):
                print(f"{model} {args.dtype}: no reference", flush=True)
                bad.append(model)
                continue
            for release in args.versions:
                word = validate(model, folder, args.dtype, release, args.folder)
                print(f"{model} {args.dtype} on vLLM {release}: {word}", flush=True)
                bad += [model] if word != "held" else []
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
