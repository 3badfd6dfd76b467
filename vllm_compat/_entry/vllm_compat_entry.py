"""The two ways in that must not activate vllm_compat by being loaded.

vLLM loads every plugin of the environment into every process, and ``import vllm_compat`` is what activates. So the
plugin and the command line live outside the package (pyproject.toml puts this file beside it).
"""

import os
import sys


def register():
    """vLLM's general plugin. Inert unless ``VLLM_COMPAT_PROFILE`` names a profile: then as if imported first."""
    if os.environ.get("VLLM_COMPAT_PROFILE", "off") != "off":
        import vllm_compat  # noqa: F401


def main():
    """The command ``vllm-compat``. Exit code 0 fine, 1 findings, 2 usage or an error we name."""
    try:
        from vllm_compat.cli import main as run
    except Exception as error:
        if type(error).__module__ != "vllm_compat.errors":
            raise
        print(f"vllm-compat: {error}", file=sys.stderr)
        return 2
    return run()
