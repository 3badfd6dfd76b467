"""`vllm-compat validate` on the installed vLLM: V0 held under the profile, not without it, and an interruption loses nothing."""

from __future__ import annotations

import json
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


INTERRUPTED = """
import os, signal, sys
from vllm_compat.cli import main, record

kept = record.Parts.put

def put(self, name, data):
    kept(self, name, data)
    if name == "batch-0":  # Ctrl-C reaches the whole group, the engine's processes too
        os.killpg(0, signal.SIGINT)

record.Parts.put = put
sys.exit(main(sys.argv[1:]))
"""


def interrupted(out: Path) -> tuple[int, str]:
    """Run it with a Ctrl-C after the first part: by itself, since what is left then takes no longer than a poll of ours may."""
    words = command(out)
    done = subprocess.run(
        [words[0], "-c", INTERRUPTED, *words[3:]], env=clean_environment(), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=300, check=False, start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_interrupted_and_gone_on_it_holds_v0(tmp_path):
    """Ctrl-C after the first part; the same command goes on from it, and every band of the profile holds against V0. Once
    more: the recording is reused, and the verdict is the same without an engine."""
    part = tmp_path / "found.safetensors.parts" / "batch-0.json"
    code, said = interrupted(tmp_path)
    assert code == 2, said[-3000:]
    assert "the same command goes on from there" in said
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
