"""What deciding and probing cost at engine start, and what the source tier costs over all releases: fresh processes, medians.

python benchmarks/start_cost.py [ROUNDS]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
START = """
import time
import vllm_compat
from vllm_compat import front, profiles, releases, settings, vllm_info
began = time.perf_counter()
installed = vllm_info.installed()
assert not releases.refused(installed.release)
current = settings.load()
profile, notes = profiles.choose("auto", None)
plan = front.resolved(current, installed.release, profile, front.given_by_user(None, installed.release), notes)
wrong, seen = front.probe_all(plan)
assert not wrong
print((time.perf_counter() - began) * 1000)
"""


def once() -> float:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_COMPAT_")}
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    found = [once() for _ in range(rounds)]
    print(
        f"resolve and probe the whole catalogue: {statistics.median(found):.0f} ms, worst of {rounds} {max(found):.0f} ms (limit 300)"
    )
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / "test_sources.py")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=TESTS.parent)
    print(f"the source tier over all releases, from data: {time.monotonic() - began:.1f} s (limit 30)")


if __name__ == "__main__":
    main()
