"""A small training run on a real engine, without and with the import: the logprobs it used against the exact ones."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT, clean_environment

SMOKE = ROOT / "examples" / "rl_parity" / "smoke.py"


def test_training_uses_exact_logprobs_with_the_import_and_others_without() -> None:
    """GSPO, five batches, updates inside running requests: 1e-4 for every token with the import; without, a quarter are off."""
    ran = subprocess.run(
        [sys.executable, SMOKE], env=clean_environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert "with the import exact; as it comes not V0" in ran.stdout
