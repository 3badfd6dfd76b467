"""Live tests: every test below this folder starts a real vLLM engine on the CPU, one at a time, in its own process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import PARITY, ROOT, Ran, clean_environment, run_script

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
    gaps: dict[str, dict[str, recording.Difference]]


@pytest.fixture(scope="session")
def reference() -> recording.Recording:
    """What the real V0 engine computed, float32."""
    return recording.load(PARITY / "v0_float32.safetensors")


@dataclass(frozen=True)
class Engine:
    """The Python whose vLLM is tested, and the dtype that its release can run."""

    python: str
    dtype: str
    environment: dict[str, str]

    def rounding(self, setting: str) -> float:
        """How far the mean of a bfloat16 V0 lay from the float32 V0 in this setting, with room for another sample."""
        exact, rounded = (recording.load(PARITY / f"v0_{dtype}.safetensors") for dtype in ("float32", "bfloat16"))
        return 2 * max(gap.mean for gap in recording.compare(rounded, exact)[setting].values() if gap.rows)


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Engine:
    """What ``--engine-python``, ``--engine-dtype`` and ``--engine-env`` say."""
    given = dict(pair.split("=", 1) for pair in pytestconfig.getoption("--engine-env"))
    return Engine(pytestconfig.getoption("--engine-python"), pytestconfig.getoption("--engine-dtype"), given)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Iterator[dict]:
    """What was measured; written to the file of ``--results``."""
    found: dict = {}
    yield found
    file = pytestconfig.getoption("--results")
    if file:
        Path(file).write_text(json.dumps(found, indent=1))


@pytest.fixture
def run_engine(tmp_path: Path, engine: Engine) -> Callable[..., Ran]:
    """`run_python` with the tested release's Python; ``norms`` can be imported there."""

    def run(script: str, *args: str, environment: dict[str, str] | None = None) -> Ran:
        more = {"PYTHONPATH": str(HERE), **engine.environment, **(environment or {})}
        return run_script(engine.python, tmp_path, script, *args, environment=more)

    return run


@pytest.fixture(scope="session")
def record(tmp_path_factory: pytest.TempPathFactory, reference: recording.Recording, engine: Engine) -> Callable[..., Recorded]:
    """Run `vllm-compat record` on the shipped model and compare with V0."""

    def run(profile: str, *flags: str, environment: dict[str, str] | None = None, **engine_args: object) -> Recorded:
        folder = tmp_path_factory.mktemp("recording")
        out, status = folder / "out.safetensors", folder / "status.json"
        command = [engine.python, "-m", "vllm_compat", "record", str(PARITY / "model"), "--out", str(out)]
        command += ["--dtype", engine.dtype, "--like", str(PARITY / "v0_float32.safetensors"), "--no-floor"]
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
            env=clean_environment(**engine.environment, **(environment or {})),
            cwd=ROOT,
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
