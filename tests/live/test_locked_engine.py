"""The lock on the real engine: one that is met lets it start; one that is not stops it before any process does."""

from __future__ import annotations

import subprocess
import sys

from support import clean_environment
from test_refusals import IN_PROCESS, PRELUDE


def write_lock(folder, model) -> None:
    command = [sys.executable, "-m", "vllm_compat", "lock", str(model)]
    subprocess.run(command, cwd=folder, env=clean_environment(), check=True)


STARTS = (
    PRELUDE
    + """
import vllm_compat
if __name__ == "__main__":
    llm = make(enable_prefix_caching=False)
    found = vllm_compat.status(llm)
    say([found.proven, found.to_dict()["notes"], found.plan.text(), generate(llm)])
"""
)


def test_an_engine_that_meets_its_lock(run_python, model, tmp_path) -> None:
    """The lock that the command writes is met by an engine that names V0's own value itself; the report says so, and the
    plan, which is in vLLM's compile cache key, does not."""
    write_lock(tmp_path, model)
    proven, notes, plan, generated = run_python(STARTS, str(model), environment=IN_PROCESS).ok().result
    assert proven
    assert "the lock vllm-compat.lock is met" in notes
    assert any(
        note.startswith("lock: no_prefix_caching: decided by the engine argument, before by the default") for note in notes
    )
    assert ".lock" not in plan
    assert generated == 1


REFUSED = (
    PRELUDE
    + """
import vllm_compat, multiprocessing, os
from vllm.engine.arg_utils import EngineArgs
if __name__ == "__main__":
    args = EngineArgs(model=MODEL, enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128)
    ours = ("seed", "logprobs_mode", "enable_prefix_caching", "async_scheduling", "hf_overrides", "additional_config")
    variables, before = dict(os.environ), dict(vars(args))
    direct = caught(args.create_engine_config)
    untouched = [all(before[name] == getattr(args, name) for name in ours),
                 variables.get("VLLM_USE_V2_MODEL_RUNNER") == os.environ.get("VLLM_USE_V2_MODEL_RUNNER")]
    say([direct, caught(make), untouched, [str(child) for child in multiprocessing.active_children()]])
"""
)


def test_an_engine_that_differs_does_not_start(run_python, model, tmp_path) -> None:
    """A behavior switched off, strict or not: the error names it; no process was started; arguments and environment are as
    they were."""
    write_lock(tmp_path, model)
    environment = {"VLLM_COMPAT_FP32_LM_HEAD": "0", "VLLM_COMPAT_STRICT": "0"}
    direct, made, untouched, children = run_python(REFUSED, str(model), environment=environment).ok().result
    for name, text, _ in (direct, made):
        assert name == "LockMismatchError"
        assert "fp32_lm_head (logits in float32): native + patch -> disabled" in text
        assert "vllm-compat lock MODEL --update" in text
    assert untouched == [True, True]
    assert children == []


def test_a_function_that_is_not_the_locked_one(run_python, model, tmp_path) -> None:
    """Another fingerprint than the locked one stops the start and names the function."""
    write_lock(tmp_path, model)
    file, function = tmp_path / "vllm-compat.lock", '"vllm.v1.sample.sampler:Sampler.sample" = "'
    moved = tmp_path / "elsewhere.lock"
    moved.write_text(file.read_text().replace(function, function + "0"))
    direct, _, _, _ = run_python(REFUSED, str(model), environment={"VLLM_COMPAT_LOCK": str(moved)}).ok().result
    assert direct[0] == "LockMismatchError"
    assert "vllm.v1.sample.sampler:Sampler.sample: its body changed" in direct[1]
    assert "digest equal" in direct[1]
    assert str(moved) in direct[1]
