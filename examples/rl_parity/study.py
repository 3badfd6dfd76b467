"""
The study: every arm with its seeds, for each algorithm; resumed where it was left.

    python study.py [--workloads gspo grpo ppo gspo-t1] [--minutes 60] [--jobs 2] [--engines FOLDER] [--work FOLDER]

A run that is in the work folder is not made again; the workloads of one arm and seed share an engine, one after the other. When
all are there, or the minutes are over, ``results.json`` is written from what is there; `figures.py` draws it. The environments of
vLLM 0.8.5 and 0.18.1 are built first (several GB, some minutes, not counted); 0.32.0 is the one this runs in.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from train import WORKLOADS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
HERE_RELEASE = "0.32.0"
# What a run leaves to others: the engine and the trainer have one thread each, and the CPU's engines bind no cores.
QUIET = {
    "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to run the engine. ``variables`` are all that differs besides the release."""

    name: str
    label: str
    release: str
    seeds: int
    variables: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def settings(self) -> dict[str, object]:
        """V1's blocks on a CPU are of 128 tokens, more than a prompt here; on a GPU of 16. The least a CPU takes is 32."""
        return {} if self.release == "0.8.5" else {"engine_args": {"block_size": 32}}

    def runs(self, workload: str) -> bool:
        """The ablations are of the standard sampling alone."""
        return not workload.endswith("-t1") or not any(key.startswith("VLLM_COMPAT_") for key in self.variables)


IMPORT = {"RL_PARITY_IMPORT": "1"}
ABLATED = ("processed_logprobs", "no_prefix_caching", "fp32_lm_head")
V0 = {"VLLM_USE_V1": "0", "VLLM_CPU_OMP_THREADS_BIND": "all"}
# V1's core in the process that steps it, as V0's: then an update comes after the same step in every arm. A core on its own
# runs ahead while the trainer is waited for, by an amount that is the machine's; smoke.py has it so.
V1 = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _ablation(behavior: str) -> Arm:
    variables = {**V1, **IMPORT, f"VLLM_COMPAT_{behavior.upper()}": "0"}
    return Arm(f"0.32.0-import-no-{behavior}", f"0.32.0 + import, without `{behavior}`", "0.32.0", 3, variables)


ARMS = (
    Arm("v0", "V0 0.8.5", "0.8.5", 5, V0),
    Arm("0.18.1-import", "V1 0.18.1 + import", "0.18.1", 5, V1 | IMPORT),
    Arm("0.32.0-import", "V1 0.32.0 + import", "0.32.0", 5, V1 | IMPORT),
    Arm("0.18.1", "V1 0.18.1 as it comes", "0.18.1", 3, V1),
    Arm("0.32.0", "V1 0.32.0 as it comes", "0.32.0", 3, V1),
    *map(_ablation, ABLATED),
    Arm("v0-import", "V0 0.8.5 + import (float32 head)", "0.8.5", 3, V0 | IMPORT),
)


def pythons(folder: Path) -> dict[str, str]:
    """Release -> the Python to run it with; builds what is missing."""
    found = {HERE_RELEASE: sys.executable}
    for release in sorted({arm.release for arm in ARMS} - set(found)):
        command = [sys.executable, str(ROOT / "tests" / "releases" / "environment.py"), release, str(folder)]
        print(f"vLLM {release}: {folder / release} (built if it is not there)", flush=True)
        found[release] = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]
    return found


def missing(arm: Arm, seed: int, workloads: Sequence[str], work: Path) -> list[str]:
    if seed >= arm.seeds:
        return []
    return [
        workload for workload in workloads if arm.runs(workload) and not (work / workload / f"{arm.name}-{seed}.json").is_file()
    ]


def make(arm: Arm, seed: int, workloads: Sequence[str], python: str, work: Path) -> str | None:
    """The runs of one engine, in a process of their own. Returns what went wrong."""
    command = [
        sys.executable, str(HERE / "train.py"), str(work), "--name", f"{arm.name}-{seed}", "--python", python,
        "--workloads", *workloads, "--seed", str(seed), "--environment", json.dumps(arm.variables),
        "--settings", json.dumps(arm.settings),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUIET}, check=False)
    return None if done.returncode == 0 else "\n".join(done.stderr.splitlines()[-20:])


def collect(work: Path) -> dict[str, dict[str, list[dict[str, object]]]]:
    """Workload -> arm -> its runs, by seed."""
    found: dict[str, dict[str, list[dict[str, object]]]] = {}
    for workload in WORKLOADS:
        for arm in ARMS:
            files = [work / workload / f"{arm.name}-{seed}.json" for seed in range(arm.seeds)]
            runs = [json.loads(file.read_text()) for file in files if file.is_file()]
            for run in runs:
                run["rows"] = [{name: round(value, 6) for name, value in row.items()} for row in run["rows"]]
            if runs:
                found.setdefault(workload, {})[arm.name] = runs
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], default=[arm.name for arm in ARMS])
    parser.add_argument("--minutes", type=float, default=60 * 24.0, help="start no run after so many (default: a day)")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)), help="runs at a time (default: one a core)")
    parser.add_argument("--engines", type=Path, default=ROOT / ".engines", help="where vLLM's environments are")
    parser.add_argument("--work", type=Path, default=ROOT / ".rl_parity", help="where runs are kept")
    given = parser.parse_args()
    python = pythons(given.engines.resolve())
    chosen = [arm for arm in ARMS if arm.name in given.arms]
    # Seeds outermost: whenever time is over, all arms have as many as they can.
    seeds = range(max(arm.seeds for arm in chosen))
    wanted = [(arm, seed) for seed in seeds for arm in chosen if missing(arm, seed, given.workloads, given.work)]
    print(f"{len(wanted)} engines to run, {given.jobs} at a time", flush=True)
    began, failed, left = time.monotonic(), 0, 0

    def one(each: tuple[Arm, int]) -> None:
        nonlocal failed, left
        arm, seed = each
        start = time.monotonic()
        if start - began > 60 * given.minutes:
            left += 1
            return
        workloads = missing(arm, seed, given.workloads, given.work)
        error = make(arm, seed, workloads, python[arm.release], given.work)
        failed += error is not None
        said = f"{arm.name} seed {seed}, {' '.join(workloads)}: {time.monotonic() - start:.0f} s"
        print(said if error is None else f"{said}, FAILED\n{error}", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, wanted))
    minutes = (time.monotonic() - began) / 60
    # A workload that was not run here keeps the results it has.
    results = (json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}) | collect(given.work)
    RESULTS.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    print(f"{minutes:.1f} min; {failed} failed, {left} left for the next call; written: {RESULTS}")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
