"""The command ``vllm-compat``: results to stdout, narrative to stderr; exit code 0 fine, 1 findings, 2 usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_compat.cli import diagnose, doctor, gpu_reference, lock, profiles, record, releases, validate
from vllm_compat.errors import VllmCompatError
from vllm_compat.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    parser = argparse.ArgumentParser(prog="vllm-compat", description="V0-equivalent rollouts from vLLM.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (doctor, record, validate, lock, releases, profiles, diagnose, gpu_reference):
        module.add_arguments(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except VllmCompatError as error:
        print(f"vllm-compat: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
