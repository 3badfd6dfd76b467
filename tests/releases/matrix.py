"""The live tier: one real engine after another, each in an environment of its own, through tests/live/test_release.py.

    python tests/releases/matrix.py                      the standard list (``live`` in releases.toml)
    python tests/releases/matrix.py 0.18.1 0.26.0        these
    python tests/releases/matrix.py --keep --folder DIR  leave the environments (several GB each) for the next time

Each release's result goes into live.json, passed or not; `make releases` brings it into the documents.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import ROOT, Row, build, rows
from packaging.version import Version

from vllm_compat.version import __version__

DATA = Path(__file__).parent / "live.json"
# vLLM's own: 0.9.x reuses a buffer that is still being sent; a full batch of whole distributions can meet that.
_THEIR_RACE = "MessagePack data is malformed"


def run(row: Row, folder: Path) -> dict[str, object]:
    """Build, test, and say what was measured."""
    python = build(row, folder)
    options = ["--engine-python", str(python)]
    if row.engine == "V1" and row.release < Version("0.11.0"):
        options += ["--engine-env", "VLLM_USE_V1=1"]  # else these fall back to V0 for many reasons, float32 among them
    if row.engine == "V1" and row.release < Version("0.9.2"):
        options += ["--engine-dtype", "bfloat16"]  # V1 refuses float32 there
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "results.json"
            command = [sys.executable, "-m", "pytest", "tests/live/test_release.py", "-q", "--results", str(file), *options]
            done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            found = json.loads(file.read_text()) if file.is_file() else {}
        if done.returncode == 0 or attempt == 2 or _THEIR_RACE not in done.stdout:
            break
    found.update(passed=done.returncode == 0, attempts=attempt, date=datetime.date.today().isoformat())
    found.update(platform=f"{platform.system()} {platform.machine()}", vllm_compat=__version__)
    if done.returncode:
        found["failed"] = re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
        print(done.stdout[-8000:])
    return found


def main() -> int:
    """Run the releases one after the other; an environment is removed before the next is built."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="releases (default: those marked live)")
    parser.add_argument("--folder", type=Path, help="where to build (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the environments in --folder")
    args = parser.parse_args()
    known = rows()
    unknown = [version for version in args.versions if version not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in releases.toml")
    chosen = [known[version] for version in args.versions] or [row for row in known.values() if row.live]
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="vllm_compat-matrix-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for place, row in enumerate(chosen):
        started = time.monotonic()
        print(f"vLLM {row.version}: building and running", flush=True)
        found = run(row, folder)
        data = json.loads(DATA.read_text()) if DATA.is_file() else {}
        data[row.version] = found
        DATA.write_text(json.dumps(dict(sorted(data.items(), key=lambda item: Version(item[0]))), indent=1) + "\n")
        word = "passed" if found["passed"] else f"FAILED: {', '.join(found['failed'])}"  # type: ignore[arg-type]
        print(f"vLLM {row.version}: {word} ({time.monotonic() - started:.0f} s)", flush=True)
        failed += [row.version] if not found["passed"] else []
        if not args.keep:
            shutil.rmtree(folder / row.version, ignore_errors=True)
            if not any(later.torch == row.torch for later in chosen[place + 1 :]):
                shutil.rmtree(folder / f"torch-{row.torch}", ignore_errors=True)
    if not args.keep and args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} releases passed" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
