"""What ``import vllm_compat`` costs over importing pydantic_settings alone: fresh processes, alternating, medians.

python benchmarks/import_time.py [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

MEASURE = """
import sys, time
began = time.perf_counter()
import {module}
spent = time.perf_counter() - began
print(spent, "torch" in sys.modules or "vllm" in sys.modules)
"""


def once(module: str) -> float:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_COMPAT_")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(module=module)], env=environment, capture_output=True, text=True, check=True
    )
    spent, heavy = done.stdout.split()
    assert heavy == "False", f"import {module} loads torch or vllm"
    return float(spent) * 1000


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    times: dict[str, list[float]] = {"pydantic_settings": [], "vllm_compat": []}
    for _ in range(rounds):
        for module, found in times.items():
            found.append(once(module))
    base, ours = (statistics.median(found) for found in times.values())
    print(f"import pydantic_settings {base:.1f} ms, import vllm_compat {ours:.1f} ms: {ours - base:+.1f} ms (limit +30 ms)")


if __name__ == "__main__":
    main()
