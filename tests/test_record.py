"""`vllm-compat record`: bad input is refused before anything starts; a trainer's recording meets V0's; work is resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import PARITY, clean_environment, heed_interrupts

from vllm_compat import recording, validation

MODEL, REFERENCE = PARITY / "model", PARITY / "v0_float32.safetensors"


def start(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "vllm_compat", "record", *map(str, words)]
    return subprocess.Popen(
        command,
        env=clean_environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_interrupts,
    )


def record(*words: object) -> tuple[int, str]:
    running = start(*words)
    said, _ = running.communicate(timeout=300)
    return running.returncode, said


def broken(tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    """Case -> (arguments, what the error says)."""
    prompts, other = tmp_path / "empty.txt", tmp_path / "other"
    prompts.write_text("\n")
    shutil.copytree(MODEL, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    small = tmp_path / "small"
    shutil.copytree(MODEL, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    out = ["--out", tmp_path / "out.safetensors"]
    return {
        "no model": ([tmp_path, *out], "not a model folder"),
        "no folder": ([MODEL, "--out", tmp_path / "no" / "x"], "there is no folder"),
        "arguments": ([MODEL, *out, "--engine-args", "{"], "--engine-args is not JSON"),
        "arguments' kind": ([MODEL, *out, "--engine-args", "[]"], "wants a JSON object"),
        "empty prompts": ([MODEL, *out, "--prompts", prompts], "the file is empty"),
        "no prompts": ([MODEL, *out, "--prompts", tmp_path / "no.txt"], "there is no such file"),
        "like and prompts": ([MODEL, *out, "--like", REFERENCE, "--top-n", 3], "leave those out"),
        "like of other weights": ([other, *out, "--like", REFERENCE], "recorded with other weights"),
        "like of another vocabulary": ([small, *out, "--like", REFERENCE], "a vocabulary of 300 tokens"),
        "damaged like": ([MODEL, *out, "--like", MODEL / "model.safetensors"], "not a recording of vllm_compat"),
        "positions": ([MODEL, *out, "--positions", 0], "at least 1"),
        "float64 engine": ([MODEL, *out, "--dtype", "float64"], "vLLM has no such engine"),
        "engine args of a trainer": ([MODEL, *out, "--engine", "trainer", "--engine-args", '{"a": 1}'], "are for vLLM"),
    }


def test_bad_input_is_refused_in_one_sentence(tmp_path):
    """Each says what is wrong, exits with 2 and writes nothing."""
    for case, (words, sentence) in broken(tmp_path).items():
        code, said = record(*words)
        assert code == 2, (case, said)
        assert sentence in said, (case, said)
        assert "Traceback" not in said, case
        assert not (tmp_path / "out.safetensors").exists(), case


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trainer") / "trainer.safetensors"
    code, said = record(MODEL, "--out", out, "--engine", "trainer", "--like", REFERENCE)
    assert code == 0, said
    return out


def test_a_float32_trainer_meets_v0(trainer):
    """transformers and the formula against the real V0 engine: the same tokens kept, and no logprob further than 3e-4."""
    found, reference = recording.load(trainer), recording.load(REFERENCE)
    assert found.header["made_by"]["side"] == "trainer"
    assert found.header["made_by"]["lm_head"] == "float32"
    for name, kinds in recording.compare(found, reference).items():
        for kind, gap in kinds.items():
            assert (gap.support, gap.diverged) == (0, 0), (name, kind)
            assert gap.max < 3e-4, (name, kind)
    floor = found.header["floor"]["batch"]
    assert 0 < floor["abs_dlogprob_max"] < 1e-4
    exact = found.header["floor"]["rounding"]
    assert 0 < exact["abs_dlogprob_max"] < 1e-4
    assert exact["abs_dlogprob_mean"] < 1e-5


def test_a_bfloat16_trainer_knows_its_rounding(tmp_path, trainer):
    """Made like a float32 recording, its rounding floor is its distance to it; a float32 and a bfloat16 head differ."""
    heads = {}
    for head in ("float32", "model"):
        out = tmp_path / f"{head}.safetensors"
        code, said = record(MODEL, "--out", out, "--engine", "trainer", "--dtype", "bfloat16", "--head", head, "--like", trainer)
        assert code == 0, said
        heads[head] = recording.load(out)
        floor = heads[head].header["floor"]
        assert floor["rounding"]["abs_dlogprob_mean"] > 1e-3
        assert floor["rounding"] == validation.measure(heads[head], recording.load(trainer)).metrics
    assert [one.header["made_by"]["lm_head"] for one in heads.values()] == ["float32", "bfloat16"]
    assert validation.measure(heads["float32"], heads["model"]).metrics["abs_dlogprob_max"] > 1e-3


def test_an_experiment_of_ones_own(tmp_path):
    """Other prompts, fewer positions, eight tokens a row; without a reference the trainer samples its own tokens."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "own.safetensors"
    prompts.write_text("one two\nthree\n\nfour five six\n")
    words = ["--engine", "trainer", "--prompts", prompts, "--positions", 5, "--top-n", 8]
    code, said = record(MODEL, "--out", out, *words)
    assert code == 0, said
    made = recording.load(out)
    assert [len(prompt) for prompt in made.prompts] == [7, 5, 13]
    assert [len(tokens) for tokens in made.experiment["continuations"]] == [5, 5, 5]
    assert made.get(1, 0, "logprobs").shape == (1, 9)
    assert made.get(1, 2, "prefix_logprobs").shape == (5, 9)
    assert made.get(0, 0, "tokens").shape == (8,)
    assert not (tmp_path / "own.safetensors.parts").exists()


def test_an_interrupted_recording_goes_on(tmp_path, trainer):
    """SIGINT after the first part: exit 2 and a sentence; the same command then takes the part and ends the same; another
    command's parts are not taken."""
    out = tmp_path / "again.safetensors"
    words = (MODEL, "--out", out, "--engine", "trainer", "--like", REFERENCE)
    running, parts = start(*words), tmp_path / "again.safetensors.parts"
    while not list(parts.glob("batch-0.json")):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 2, said
    assert "the same command goes on from there" in said
    assert not out.exists()
    kept = json.loads((parts / "batch-0.json").read_text())
    kept["data"][0][2] = 12.5  # a mark: the part is taken, not made again
    (parts / "batch-0.json").write_text(json.dumps(kept))
    code, said = record(*words)
    assert code == 0, said
    found = recording.load(out)
    assert found.get(0, 0, "cumulative")[0] == 12.5
    for name, array in recording.load(trainer).tensors.items():
        assert name == "0/0/cumulative" or np.array_equal(found.tensors[name], array, equal_nan=True), name
    assert not parts.exists()
    parts.mkdir()
    (parts / "batch-0.json").write_text(json.dumps(kept))
    code, said = record(*words, "--no-floor")
    assert code == 0, said
    assert recording.load(out).header["floor"] is None
