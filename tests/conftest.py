"""Fixtures shared by all tests: Python in a clean process, and the shipped model."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support import PARITY, Ran, clean_environment

# The test process itself only inspects: engines run in processes of their own, which get a clean environment.
os.environ["VLLM_COMPAT_PROFILE"] = "off"


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., Ran]:
    """Run a script in a new process. ``environment`` adds variables; the script may print RESULT and JSON."""

    def run(script: str, *args: str, environment: dict[str, str] | None = None, timeout: int = 300) -> Ran:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(script))
        done = subprocess.run(
            [sys.executable, str(file), *args],
            env=clean_environment(**(environment or {})),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Ran(done.returncode, done.stdout)

    return run


@pytest.fixture(scope="session")
def model() -> Path:
    """The shipped tiny model."""
    return PARITY / "model"
