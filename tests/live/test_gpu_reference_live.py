"""The rehearsal of `vllm-compat gpu-reference` on a CPU: a trainer, vLLM as it comes and with the import, an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

from support import ROOT, clean_environment


def go(out, step, limit=200):
    """One step; the exit code and what was said."""
    words = [sys.executable, "-m", "vllm_compat", "gpu-reference", "--device", "cpu", "--models", "tiny", "--out", str(out)]
    done = subprocess.run(
        [*words, "--step", step, "--limit", str(limit)], env=clean_environment(), cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_rehearsal(tmp_path):
    """A limit stops the trainer's step and the next call finishes it; vLLM as it comes fails a band, which is not the run's
    failure; with the import every band holds; the evidence says cpu and lies in the run's own folder."""
    assert go(tmp_path, "model:tiny")[0] == 0
    code, said = go(tmp_path, "trainer-float32:tiny", limit=1)
    assert code == 3, said
    assert "Go on with: vllm-compat gpu-reference --device cpu" in said
    for step in ("trainer-float32", "trainer-head-float32", "trainer-head-model"):
        code, said = go(tmp_path, f"{step}:tiny")
        assert code == 0, said
    code, said = go(tmp_path, "naive:tiny")
    assert code == 0, said
    code, said = go(tmp_path, "vllm_compat:tiny")
    assert code == 0, said
    assert go(tmp_path, "graphs:tiny")[0] == 2

    steps = {row["step"]: row for row in json.loads((tmp_path / "report.json").read_text())["steps"]}
    assert steps["naive:tiny"]["state"] == "a band failed"
    assert steps["vllm_compat:tiny"]["state"] == "done"
    assert all(held for _, _, held in steps["vllm_compat:tiny"]["bands"].values())
    assert steps["graphs:tiny"] | {"state": "not run", "reason": "needs a CUDA device"} == steps["graphs:tiny"]
    assert {steps[name]["device"] for name in ("naive:tiny", "vllm_compat:tiny")} == {"cpu"}
    entries = tomllib.loads((tmp_path / "profiles" / "qwen3.toml").read_text())["evidence"]
    mine = [entry for entry in entries if entry["model"] == "tiny"]
    assert [entry["device"] for entry in mine] == ["cpu"]


def test_the_steps_without_a_trainer(tmp_path):
    """Replays, the sampler, and updates by every transport: each ends, and its figures are in the report."""
    names = ["model:tiny", "replay:tiny", "sampler", "weight-update-ipc", "weight-update-group"]
    for name in names:
        code, said = go(tmp_path, name)
        assert code == 0, said
    steps = {row["step"]: row for row in json.loads((tmp_path / "report.json").read_text())["steps"]}
    for way in ("in a batch", "one at a time"):  # of float32 logprobs on one machine: what is left is the last bits
        assert steps["replay:tiny"]["bands"][f"scored {way}: largest difference"][0] < 1e-5
    assert steps["sampler"]["bands"]["nats from V0's formula, worst of all settings"][2]
    assert any("ours against it" in line for line in steps["weight-update-ipc"]["said"])
    assert "NOT COMPARED" in steps["weight-update-group"]["said"][-1]
    assert "weight-update-ipc" in (tmp_path / "report.html").read_text()
