"""`vllm-compat gpu-reference` without an engine: what it refuses, what it skips, where it stops, what it calls a rehearsal."""

from __future__ import annotations

import json
import sys
import time

import pytest

from vllm_compat.cli import gpu_reference, main
from vllm_compat.errors import RecordingError
from vllm_compat.gpu_reference import loop, summary
from vllm_compat.gpu_reference.loop import DONE, NOT_RUN, Loop
from vllm_compat.gpu_reference.models import SHAPES
from vllm_compat.gpu_reference.steps import Choice, Step, listed


def choice(folder, device="cpu"):
    return Choice(folder, device, ["tiny"], 1.0)


def step(name, code, **more):
    return Step(name, ["-c", code], "this", "that", **more)


def test_no_cuda_is_one_sentence(monkeypatch, capsys, tmp_path):
    """Without a card the default refuses, names the rehearsal, and writes nothing."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-reference", "--out", str(tmp_path / "out")]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memory_is_refused_by_name():
    """A 24 GiB card: the 7B and 8B models are named with their estimate, and the rest is offered."""
    with pytest.raises(RecordingError, match=r"Qwen3-8B \(about \d\d GiB\).*--models language Qwen3-0.6B"):
        gpu_reference.fits(["language", "Qwen3-0.6B", "Qwen3-8B"], 24 << 30)
    gpu_reference.fits(list(SHAPES), 80 << 30)


def test_parameters_are_those_of_the_hub():
    """Counts without norms and biases, in billions, as the model cards have them."""
    assert {name: round(shape.parameters / 1e9, 1) for name, shape in SHAPES.items()} == {
        "Qwen2.5-0.5B": 0.5, "Qwen2.5-7B": 7.6, "Qwen3-0.6B": 0.6, "Qwen3-8B": 8.2, "Llama-3.1-8B": 8.0, "Mistral-7B": 7.2,
    }  # fmt: skip


def test_a_finished_step_is_skipped_and_time_up_goes_on(tmp_path):
    """The first step runs once; the second is stopped by the limit, in time, and the next call finishes it."""
    marks = tmp_path / "marks"
    first = step("first", f"open({str(marks)!r}, 'a').write('x')")
    slow = f"import os, time; os.path.exists({str(tmp_path / 'go')!r}) or time.sleep(60)"
    began = time.monotonic()
    assert Loop(choice(tmp_path)).go([first, step("slow", slow)], 3) is False
    assert time.monotonic() - began < 20
    (tmp_path / "go").touch()
    again = Loop(choice(tmp_path))
    assert again.go([first, step("slow", slow)], 60) is True
    assert marks.read_text() == "x"
    assert [again.state[name]["state"] for name in ("first", "slow")] == [DONE, DONE]


def test_what_cannot_run_says_why(tmp_path, monkeypatch):
    """CUDA on a rehearsal, no vLLM, an earlier step missing: each is "not run" with its reason, and never done."""
    monkeypatch.setattr(loop.vllm_info, "installed", lambda: None)
    made = Loop(choice(tmp_path))
    made.go(
        [step("a", "", cuda=True), step("b", "", vllm=True), step("c", "", after=["a"]), step("d", "raise SystemExit(1)")], 60
    )
    assert {name: row["state"] for name, row in made.state.items()} == {"a": NOT_RUN, "b": NOT_RUN, "c": NOT_RUN, "d": "broken"}
    assert "CUDA" in made.state["a"]["reason"]
    assert "torch alone" in made.state["b"]["reason"]
    assert made.state["c"]["reason"] == "a has not been done"


def test_a_rehearsal_is_not_taken_for_a_card(tmp_path):
    """Every entry names the device, the report says rehearsal, and a card's run refuses the rehearsal's folder."""
    made = Loop(choice(tmp_path))
    made.go([step("a", "")], 60)
    data = summary.build(choice(tmp_path), [step("a", "")], made.state, made.run_by)
    assert data["steps"][0]["device"] == "cpu"
    assert "rehearsal" in data["notes"][0]
    summary.write(choice(tmp_path), [step("a", "")], data)
    assert json.loads((tmp_path / "report.json").read_text())["anchors"]
    with pytest.raises(RecordingError, match="name another folder"):
        Loop(choice(tmp_path, "cuda"))


def test_evidence_goes_into_the_runs_own_folder(tmp_path):
    """No step names a shipped profile: evidence is written below --out."""
    words = [word for one in listed(choice(tmp_path)) for word in one.words]
    places = [words[i + 1] for i, word in enumerate(words) if word == "--evidence"]
    assert places == [str(tmp_path / "profiles" / "qwen3.toml")]
    assert sys.executable not in words
