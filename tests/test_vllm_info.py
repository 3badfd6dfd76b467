"""The installed vLLM, from its files."""

from __future__ import annotations

import importlib.util
import types

import pytest

from vllm_compat import vllm_info


@pytest.mark.parametrize(
    ("line", "version", "release"),
    [
        ("__version__ = version = '0.32.0'", "0.32.0", "0.32.0"),
        ("__version__ = version = '0.8.5.post2'", "0.8.5.post2", "0.8.5"),
        ('__version__ = "0.32.0+cu130"', "0.32.0+cu130", "0.32.0"),
        # not the release it leads to: refused by name
        ("__version__ = version = '0.32.0.dev5+g1234'", "0.32.0.dev5+g1234", "0.32.0.dev5+g1234"),
        ("__version__ = version = '0.32.0rc1'", "0.32.0rc1", "0.32.0rc1"),
        ("something = else_", "unknown", "0"),
    ],
)
def test_version_of_a_file(tmp_path, monkeypatch, line, version, release):
    """Post and local builds are their release; development builds and candidates are not."""
    (tmp_path / "_version.py").write_text(f"__version__: str\n{line}\n")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    vllm_info.installed.cache_clear()
    try:
        found = vllm_info.installed()
        assert (found.version, str(found.release), found.root) == (version, release, tmp_path)
    finally:
        vllm_info.installed.cache_clear()


def test_no_vllm(monkeypatch):
    """Importing vllm_compat beside a trainer that has no vLLM is fine."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    vllm_info.installed.cache_clear()
    try:
        assert vllm_info.installed() is None
    finally:
        vllm_info.installed.cache_clear()
