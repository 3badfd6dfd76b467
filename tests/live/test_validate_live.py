"""`vllm-compat validate` on the installed vLLM: V0 held under the profile, not without it, and an interruption loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import PARITY, ROOT, clean_environment, heed_interrupts

from vllm_compat import experiment, recording

REFERENCE = PARITY / "v0_float32.safetensors"


def command(out: Path, *more: str) -> list[str]:
    words = [sys.executable, "-m", "vllm_compat", "validate", str(PARITY / "model"), "--reference", str(REFERENCE)]
    return [*words, "--out", str(out), "--engine-args", '{"gpu_memory_utilization": 0.3}', *more]


def validate(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    environment = clean_environment()
    return subprocess.run(
        command(out, *more), env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def interrupted_after(out: Path, part: Path) -> tuple[int, str]:
    """Run it, and press Ctrl-C, which reaches the engine's processes too, once this part is there."""
    with (out / "log").open("w") as log:
        child = subprocess.Popen(
            command(out), env=clean_environment(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=heed_interrupts,
        )  # fmt: skip
        until = time.monotonic() + 200
        while time.monotonic() < until and child.poll() is None:
            try:
                json.loads(part.read_text())
                break
            except (OSError, ValueError):
                time.sleep(0.01)
        os.killpg(child.pid, signal.SIGINT)
        try:
            child.wait(60)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    return child.returncode, (out / "log").read_text()


def test_interrupted_and_gone_on_it_holds_v0(tmp_path):
    """Ctrl-C after the first part; the same command goes on from it, and every band of the profile holds against V0. Once
    more: the recording is reused, and the verdict is the same without an engine."""
    part = tmp_path / "found.safetensors.parts" / "batch-0.json"
    code, said = interrupted_after(tmp_path, part)
    # 130 where vLLM's dying processes interrupt a second time, before our sentence (tests/test_record.py has the plain case)
    assert code in (2, 130), said[-3000:]
    assert not (tmp_path / "found.safetensors").exists()
    before = [experiment.Answer.from_json(data) for data in json.loads(part.read_text())["data"]]

    done = validate(tmp_path, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(done.stdout)  # vLLM's log is elsewhere
    assert data["held"]
    assert data["found"]["made_by"]["vllm"] != data["reference"]["made_by"]["vllm"]
    assert data["found"]["made_by"]["reported"]["proven"]
    assert not part.parent.exists()
    found = recording.load(tmp_path / "found.safetensors")
    first = [request for request in experiment.requests(experiment.Experiment(**found.experiment)) if request.position is None]
    assert f"requests in one batch: {len(first)} of" not in done.stderr  # these were not asked again
    for request, answer in zip(first, before, strict=True):
        assert found.get(request.setting, request.prompt, "tokens").tolist() == answer.tokens
        assert found.get(request.setting, request.prompt, "cumulative").tolist() == [answer.cumulative]

    began = time.monotonic()
    again = validate(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "reused" in again.stderr
    assert "HELD: 8 of 8 bands" in again.stdout
    assert "processed_logprobs          exercised" in again.stdout
    assert json.loads((tmp_path / "report.json").read_text())["bands"] == data["bands"]
    assert time.monotonic() - began < 30


def test_the_engine_as_it_is_fails(tmp_path):
    """Profile off: exit code 1, and the settings that V1 means otherwise are the ones that are far away."""
    done = validate(tmp_path, "--profile", "off")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "FAILED: 0 of 8 bands" in done.stdout
    data = json.loads((tmp_path / "report.json").read_text())
    cells = {(cell["setting"], cell["kind"]): cell for cell in data["settings"]}
    assert cells["T=1", "prefix"]["max"] < 1e-3  # nothing to process: V1's raw logprobs are V0's
    assert cells["T=0.7", "sampled"]["mean"] > 0.1
    assert cells["top-p 0.9", "sampled"]["kept_by_one_side"] > 0
    assert data["found"]["made_by"]["reported"] is None
    assert (tmp_path / "report.html").stat().st_size > 50_000
