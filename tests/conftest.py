"""Fixtures shared by all tests: Python in a clean process, and the shipped model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import PARITY, Ran, run_script

# The test process itself only inspects: engines run in processes of their own, which get a clean environment.
os.environ["VLLM_COMPAT_PROFILE"] = "off"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vLLM releases")
    group.addoption("--engine-python", default=sys.executable, help="the Python of the release that test_release.py runs")
    group.addoption("--engine-dtype", default="float32", help="the dtype it runs")
    group.addoption("--engine-env", action="append", default=[], metavar="NAME=VALUE", help="a variable it needs")
    group.addoption("--results", default="", help="a file for what test_release.py measured")


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., Ran]:
    """Run a script in a new process. ``environment`` adds variables; the script may print RESULT and JSON."""

    def run(script: str, *args: str, environment: dict[str, str] | None = None, timeout: int = 300) -> Ran:
        return run_script(sys.executable, tmp_path, script, *args, environment=environment, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def model() -> Path:
    """The shipped tiny model."""
    return PARITY / "model"
