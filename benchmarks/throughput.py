"""Decode throughput and engine start with vllm_compat, against the same vLLM with the same options set by hand.

Pairs of fresh processes, alternating which comes first; the ratio of each pair, and the median over the pairs.

    python benchmarks/throughput.py [PAIRS]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
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
    llm = LLM(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512, **more)
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


def once(kind: str, script: Path) -> tuple[float, float]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_COMPAT_")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(
        [sys.executable, str(script), str(MODEL), kind], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    start, speed = json.loads(lines[-1].removeprefix("RESULT "))
    return start, speed


def main() -> None:
    import tempfile

    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    starts, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(RUN)
        once("hand", script)  # warms the file cache
        for pair in range(pairs):
            order = ("hand", "shim") if pair % 2 else ("shim", "hand")
            found = {kind: once(kind, script) for kind in order}
            starts.append(found["shim"][0] / found["hand"][0])
            speeds.append(found["shim"][1] / found["hand"][1])
            print(
                f"pair {pair + 1}: start {found['hand'][0]:.1f} s by hand, {found['shim'][0]:.1f} s with vllm_compat; "
                f"{found['hand'][1]:.0f} and {found['shim'][1]:.0f} tokens/s",
                flush=True,
            )
    print(
        f"throughput ratio {statistics.median(speeds):.3f} (limit 0.98), of {pairs} pairs: {min(speeds):.3f} to {max(speeds):.3f}"
    )
    print(
        f"engine start ratio {statistics.median(starts):.3f} (limit 1.05), of {pairs} pairs: {min(starts):.3f} to {max(starts):.3f}"
    )


if __name__ == "__main__":
    main()
