"""Decode throughput and engine start with vllm_compat, against the same vLLM with the same options set by hand, and as it comes.

Rounds of three fresh processes, in an order that turns; the ratios of each round, and the median over the rounds. The options by
hand need vLLM 0.26.0 (`head_dtype`).

    python benchmarks/throughput.py [ROUNDS] [--model FOLDER] [--engine-args JSON]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().parents[1] / "examples" / "v0_parity" / "model"

RUN = """
import json, sys, time
if sys.argv[2] == "shim":
    import vllm_compat
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    hand = dict(logprobs_mode="processed_logprobs", enable_prefix_caching=False, async_scheduling=False,
                hf_overrides={"head_dtype": "float32"})
    more = hand if sys.argv[2] == "hand" else {}
    began = time.perf_counter()
    given = {"enforce_eager": True, "gpu_memory_utilization": 0.3, **json.loads(sys.argv[3])}
    llm = LLM(model=sys.argv[1], dtype="bfloat16", max_model_len=512, **given, **more)
    start = time.perf_counter() - began
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=200, ignore_eos=True, logprobs=0)
    prompts = [{"prompt_token_ids": [20 + i, 30, 40, 50]} for i in range(32)]
    llm.generate(prompts, params, use_tqdm=False)  # compiles what it compiles
    speeds = []
    for _ in range(12):
        began = time.perf_counter()
        outs = llm.generate(prompts, params, use_tqdm=False)
        speeds.append(sum(len(o.outputs[0].token_ids) for o in outs) / (time.perf_counter() - began))
    print("RESULT " + json.dumps([start, max(speeds)]))
"""


def once(kind: str, script: Path, model: Path, engine_args: str) -> tuple[float, float]:
    """Seconds to start, and tokens a second."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_COMPAT_")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(
        [sys.executable, str(script), str(model), kind, engine_args], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    start, speed = json.loads(lines[-1].removeprefix("RESULT "))
    return start, speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    parser.add_argument("--model", type=Path, default=MODEL, help="default: the shipped tiny one, the overhead at its worst")
    parser.add_argument("--engine-args", default="{}", help="JSON; eager, and 0.3 of a card's memory, where it says nothing")
    given = parser.parse_args()
    names = {"hand": "by hand", "shim": "with vllm_compat", "naive": "as it comes"}
    kinds, found = list(names), []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(RUN)
        once("hand", script, given.model, given.engine_args)  # warms the file cache
        for number in range(given.rounds):
            turned = kinds[number % 3 :] + kinds[: number % 3]
            found.append({kind: once(kind, script, given.model, given.engine_args) for kind in turned})
            said = ", ".join(f"{found[-1][kind][0]:.1f} s and {found[-1][kind][1]:.0f} tokens/s {names[kind]}" for kind in kinds)
            print(f"round {number + 1}: {said}", flush=True)
    for kind, against, limits in (("shim", "hand", (1.05, 0.98)), ("shim", "naive", None), ("hand", "naive", None)):
        for part, what in ((1, "throughput"), (0, "engine start")):
            ratios = [row[kind][part] / row[against][part] for row in found]
            limit = f" (limit {limits[part]})" if limits else ""
            print(
                f"{what} {names[kind]} against {names[against]}: ratio {statistics.median(ratios):.3f}{limit}, "
                f"of {given.rounds} rounds: {min(ratios):.3f} to {max(ratios):.3f}"
            )


if __name__ == "__main__":
    main()
