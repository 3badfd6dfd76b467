"""`make demo`: the installed vLLM without and with vllm_compat, against a recording of the real V0 engine.

Both reference files were made by `vllm-compat record` on vLLM 0.8.5 with VLLM_USE_V1=0; what made them is printed.
Exit code 0 where every float32 cell with vllm_compat is within 1e-3 nats of V0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["VLLM_COMPAT_PROFILE"] = "off"  # this process only reads files; the engines below decide for themselves

from vllm_compat import recording, report

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
LIMIT = 1e-3  # nats, float32


def record(folder: Path, dtype: str, profile: str, label: str) -> tuple[recording.Recording, list[dict]]:
    """One engine run in its own process, with a line of progress."""
    out, status = folder / f"{dtype}-{profile}.safetensors", folder / f"{dtype}-{profile}.json"
    log = folder / f"{dtype}-{profile}.log"
    command = [sys.executable, "-m", "vllm_compat", "record", str(MODEL), "--out", str(out), "--dtype", dtype]
    # on the CPU this "GPU" memory is a share of the machine's: a tiny model needs little
    command += ["--like", str(HERE / "v0_float32.safetensors"), "--no-floor", "--profile", profile]
    command += ["--status", str(status), "--engine-args", '{"gpu_memory_utilization": 0.3}']
    print(f"{label}: starting a real vLLM engine ", end="", flush=True)
    began = time.monotonic()
    with log.open("w") as sink:
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        while child.poll() is None:
            time.sleep(1)
            if int(time.monotonic() - began) % 3 == 0:
                print(".", end="", flush=True)
    print(f" {time.monotonic() - began:.0f} s", flush=True)
    if child.returncode != 0:
        sys.exit(f"the engine run failed; the end of its log:\n{log.read_text()[-3000:]}")
    return recording.load(out), json.loads(status.read_text())


def cell(found: recording.Difference) -> str:
    """max and mean |Δlogprob|, and a mark where a token is kept by one side only."""
    mark = f" +{found.support}" if found.support else ""
    return f"{found.max:8.1e} {found.mean:8.1e}{mark:7}"


def table(columns: dict[str, recording.Recording], reference: recording.Recording, rows: str) -> None:
    """rows: which kind, of `recording.KINDS`."""
    compared = {name: recording.compare(found, reference) for name, found in columns.items()}
    print(f"  {'':38}" + "".join(f"{name:28}" for name in columns))
    print(f"  {'setting':38}" + f"{'     max     mean':28}" * len(columns))
    for setting in (name for name in reference.settings if next(iter(compared.values()))[name][rows].rows):
        print(f"  {setting:38}" + "".join(f"{cell(found[setting][rows]):28}" for found in compared.values()))


def greedy_equal(found: recording.Recording, reference: recording.Recording) -> str:
    """How many prompts' greedy tokens are V0's."""
    s, prompts = reference.settings.index("greedy"), range(len(reference.prompts))
    equal = sum(list(found.get(s, p, "tokens")) == list(reference.get(s, p, "tokens")) for p in prompts)
    return f"{equal} of {len(prompts)}"


def main() -> int:
    references = {dtype: recording.load(HERE / f"v0_{dtype}.safetensors") for dtype in ("float32", "bfloat16")}
    made = references["float32"].header["made_by"]
    print(
        f"reference: the {made['engine']} engine of vLLM {made['vllm']} (torch {made['torch']}, {made['device']}, "
        f"commit {made['commit'][:12]}): {len(references['float32'].settings)} sampling settings, "
        f"{len(references['float32'].prompts)} prompts"
    )
    runs: dict[str, dict[str, recording.Recording]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (dtype, profile) in enumerate([(d, p) for d in references for p in ("off", "auto")], 1):
            name = "V1 as is" if profile == "off" else "with vllm_compat"
            found, status = record(Path(folder), dtype, profile, f"[{number}/4] {dtype}, {name}")
            runs.setdefault(dtype, {})[name] = found
    exact = references["float32"]
    print("\n|Δlogprob| against V0, in nats, over every token of every distribution.")
    print("+N: N tokens are kept by one side only (-inf on the other).")
    print("\nfloat32 (what a logprob means), sampled rows")
    table(runs["float32"], exact, "sampled")
    print("\nfloat32, prompt rows")
    table(runs["float32"], exact, "prompt")
    print("\nfloat32, sampled rows at fixed positions of a continuation")
    table(runs["float32"], exact, "prefix")
    for name, found in runs["float32"].items():
        print(f"  greedy tokens equal to V0's, {name}: {greedy_equal(found, exact)} prompts")
    print("\nbfloat16 (what rounding adds), against V0's float32 values; first V0's own bfloat16 rounding, sampled rows")
    rounded = {"V0 itself in bfloat16": references["bfloat16"], **runs["bfloat16"]}
    table(rounded, exact, "sampled")
    print("\nbfloat16, prompt rows")
    table(rounded, exact, "prompt")
    print("\nwhat the processes of the last engine reported:")
    print(report.table(status[0]))
    shimmed = recording.compare(runs["float32"]["with vllm_compat"], exact).values()
    cells = [found for kinds in shimmed for found in kinds.values()]
    worst, lost = max(found.max for found in cells), sum(found.support for found in cells)
    held = worst < LIMIT and not lost
    print(
        f"\nworst float32 cell with vllm_compat: {worst:.1e} nats (limit {LIMIT:.0e}): {'restored' if held else 'NOT RESTORED'}"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
