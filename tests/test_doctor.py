"""``vllm-compat doctor`` without an engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import clean_environment

from vllm_compat import behaviors


def doctor(*args: str, **environment: str) -> tuple[int, str, str]:
    command = [str(Path(sys.executable).parent / "vllm-compat"), "doctor", *args]
    done = subprocess.run(command, env=clean_environment(**environment), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def reports(tmp_path) -> dict[str, str]:
    return {"VLLM_COMPAT_REPORT_DIR": str(tmp_path / "reports")}


def test_says_what_would_be_applied_and_why(model, reports):
    """Every behavior with state, route, who decided and why; exit code 0."""
    code, out, _ = doctor(str(model), "--json", **reports)
    data = json.loads(out)
    assert code == 0
    assert data["vllm"] == "0.32.0"
    assert data["profile"] == "qwen3"
    assert list(data["behaviors"]) == list(behaviors.BY_NAME)
    assert data["behaviors"]["processed_logprobs"] == {
        "state": "pending",
        "decided_by": "profile",
        "route": "native + patch",
        "reason": "profile qwen3 says on",
        "sets": ["logprobs_mode='processed_logprobs'"],
        "patches": ["min_p_last", "prompt_rows"],
    }
    code, out, _ = doctor(str(model), **reports)
    assert code == 0
    assert "patch prompt_rows" in out
    assert "no findings" in out


def test_imports_neither_vllm_nor_torch(model, run_python, reports):
    """It reads files only."""
    script = f"""
    import sys, json
    from vllm_compat.cli import main
    code = main(["doctor", {str(model)!r}, "--json"])
    print("RESULT " + json.dumps([code, sorted({{m.split(".")[0] for m in sys.modules}} & {{"vllm", "torch", "transformers"}})]))
    """
    assert run_python(script, environment=reports).ok().result == [0, []]


def test_findings(model, reports):
    """What would be refused is a finding with what to do, and exit code 1."""
    code, out, _ = doctor(str(model), VLLM_PLUGINS="other", **reports)
    assert code == 1
    assert "FINDING: VLLM_PLUGINS='other' excludes vllm_compat" in out


def test_model_runner_v2_says_what_holds_there(model, reports):
    """Where the user insists on Model Runner V2: which behaviors hold on it and which do not."""
    code, out, _ = doctor(str(model), "--json", VLLM_USE_V2_MODEL_RUNNER="1", **reports)
    data = json.loads(out)
    assert code == 1
    assert {name: row["state"] for name, row in data["behaviors"].items()} == {
        "model_runner_v1": "overridden",
        "processed_logprobs": "unsupported",
        "seeded_sampling": "unsupported",
        "no_prefix_caching": "native",
        "no_async_scheduling": "native",
        "fp32_lm_head": "pending",
        "synchronized_weight_update": "native",
        "unshared_engine_seed": "pending",
    }
    prompts, noise = data["findings"]
    assert prompts.startswith("processed_logprobs: Model Runner V2 scores prompts raw")
    assert noise.startswith("seeded_sampling: Model Runner V2 makes its own counter-based noise")


def test_switches_show(model, reports):
    """The environment's decision and its price are in the table."""
    _, out, _ = doctor(str(model), VLLM_COMPAT_FP32_LM_HEAD="0", **reports)
    (line,) = [line for line in out.splitlines() if line.strip().startswith("fp32_lm_head")]
    assert "disabled" in line
    assert "environment" in line
    assert "VLLM_COMPAT_FP32_LM_HEAD=0; lost: every logit is rounded" in line


def test_off_and_errors(reports):
    """Profile off says so; a bad profile is exit code 2 with one sentence."""
    code, out, _ = doctor(VLLM_COMPAT_PROFILE="off", **reports)
    assert code == 0
    assert "does nothing here" in out
    code, _, err = doctor(VLLM_COMPAT_PROFILE="nobody", **reports)
    assert code == 2
    assert "no profile 'nobody'" in err
    assert "Traceback" not in err


def test_reports_of_dead_fronts_are_swept(tmp_path, reports):
    """A front that was killed leaves a file; doctor drops it instead of showing a ghost."""
    folder = tmp_path / "reports"
    folder.mkdir()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (folder / f"engine-{child.pid}-1.json").write_text("{}")
    (folder / f"engine-{os.getpid()}-1.json").write_text("not json")
    code, out, _ = doctor("--json", **reports)
    assert code == 0
    assert json.loads(out)["engines"] == []
    assert not (folder / f"engine-{child.pid}-1.json").exists()
