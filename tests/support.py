"""What tests share: the shipped model and reference, a clean environment, and what a child process did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / "examples" / "v0_parity"


@dataclass(frozen=True)
class Ran:
    """What a child process did. ``result`` is the JSON after the last line that starts with RESULT."""

    code: int
    text: str

    @property
    def result(self) -> dict:
        lines = [line for line in self.text.splitlines() if line.startswith("RESULT ")]
        assert lines, self.text[-6000:]
        return json.loads(lines[-1].removeprefix("RESULT "))

    def ok(self) -> Ran:
        assert self.code == 0, self.text[-6000:]
        return self


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without anything that speaks to vllm_compat or vLLM's plugins."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_COMPAT_") and k != "VLLM_PLUGINS"}
    return {
        **kept,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "default",
        **more,
    }


def run_script(
    python: str, folder: Path, script: str, *args: str, environment: dict[str, str] | None = None, timeout: int = 300
) -> Ran:
    """Run a script in a new process of some Python, in a folder of its own. The script may print RESULT and JSON."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(script))
    done = subprocess.run(
        [python, str(file), *args],
        env=clean_environment(**(environment or {})),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ran(done.returncode, done.stdout)


def heed_interrupts() -> None:
    """For a child process that is sent SIGINT: a suite that runs in a shell's background inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
