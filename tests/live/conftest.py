"""Live tests: every test below this folder starts a real vLLM engine on the CPU, one at a time, in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import PARITY, clean_environment

from vllm_compat import recording

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.live)


@dataclass(frozen=True)
class Recorded:
    """A recording of the installed vLLM beside the V0 reference."""

    found: recording.Recording
    status: dict | None
    gaps: dict[str, tuple[recording.Difference, recording.Difference]]


@pytest.fixture(scope="session")
def reference() -> recording.Recording:
    """What the real V0 engine computed, float32."""
    return recording.load(PARITY / "v0_float32.safetensors")


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory, reference: recording.Recording) -> Callable[..., Recorded]:
    """Run `vllm-compat record` on the shipped model and compare with V0."""

    def run(profile: str, *flags: str, environment: dict[str, str] | None = None, **engine_args: object) -> Recorded:
        folder = tmp_path_factory.mktemp("recording")
        out, status = folder / "out.safetensors", folder / "status.json"
        command = [sys.executable, "-m", "vllm_compat", "record", str(PARITY / "model"), "--out", str(out)]
        command += [
            "--profile",
            profile,
            "--status",
            str(status),
            "--engine-args",
            json.dumps({"gpu_memory_utilization": 0.3, **engine_args}),
            *flags,
        ]
        done = subprocess.run(
            command,
            env=clean_environment(**(environment or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        found = recording.load(out)
        statuses = json.loads(status.read_text())
        return Recorded(found, statuses[0] if statuses else None, recording.compare(found, reference))

    return run
