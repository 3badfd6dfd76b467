"""The recording file: what is damaged, foreign or of another experiment says so."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import PARITY

from vllm_compat import errors, recording


@pytest.fixture
def reference():
    return recording.load(PARITY / "v0_float32.safetensors")


def test_the_shipped_references_are_of_the_real_v0_engine():
    """Versions, engine, commit and command are inside, at least 16 settings, and both are of the same model."""
    found = [recording.load(PARITY / f"v0_{dtype}.safetensors") for dtype in ("float32", "bfloat16")]
    for one, dtype in zip(found, ("float32", "bfloat16")):
        made = one.header["made_by"]
        assert made["vllm"].startswith("0.8.5")
        assert made["engine"] == "V0"
        assert made["dtype"] == dtype
        assert len(made["commit"]) == 40
        assert "record" in made["command"]
        assert len(one.settings) >= 16
        assert [name for name, _ in one.header["settings"]] == list(recording.SETTINGS)
    assert found[0].header["model"]["weights_sha256"] == found[1].header["model"]["weights_sha256"]


def test_round_trip(tmp_path, reference):
    """Saved and loaded is the same, and compares as equal."""
    file = tmp_path / "copy.safetensors"
    recording.save(reference, file)
    again = recording.load(file)
    assert again.header == reference.header
    for sampled, prompt in recording.compare(again, reference).values():
        assert (sampled.max, sampled.support, sampled.diverged) == (0, 0, 0)
        assert prompt.max == 0


def test_a_flipped_byte_is_damage(tmp_path):
    """The checksum is over the tensors' bytes."""
    data = bytearray((PARITY / "v0_float32.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(errors.RecordingError, match="checksum does not match"):
        recording.load(tmp_path / "x.safetensors")


def test_truncated_missing_foreign_and_other_version(tmp_path):
    """Each gets its own sentence with the file's name."""
    file = tmp_path / "x.safetensors"
    with pytest.raises(errors.RecordingError, match="no such recording"):
        recording.load(file)
    file.write_bytes((PARITY / "v0_float32.safetensors").read_bytes()[:5000])
    with pytest.raises(errors.RecordingError, match="damaged or truncated"):
        recording.load(file)
    with pytest.raises(errors.RecordingError, match="not a recording of vllm_compat"):
        recording.load(PARITY / "model" / "model.safetensors")
    save_file({"a": np.zeros(1)}, file, metadata={"format": recording.FORMAT, "version": "2"})
    with pytest.raises(errors.RecordingError, match="format 2; this vllm_compat reads 1"):
        recording.load(file)


def test_different_experiments_are_not_compared(reference):
    """Other prompts or other weights: refused instead of a number that means nothing."""
    other = recording.Recording({**reference.header, "prompts": [[1]]}, reference.tensors)
    with pytest.raises(errors.RecordingError, match="same prompts"):
        recording.compare(other, reference)
    header = {**reference.header, "model": {**reference.header["model"], "weights_sha256": "0"}}
    with pytest.raises(errors.RecordingError, match="same model weights"):
        recording.compare(recording.Recording(header, reference.tensors), reference)


def test_difference_counts_what_only_one_side_keeps():
    """Finite gaps go into max and mean; a lonely token into support, unless its probability underflows float32."""
    gap = recording.Difference()
    gap.add(np.array([-1.0, -np.inf, -2.0, -200.0]), np.array([-1.5, -3.0, -2.0, -np.inf]))
    assert (gap.max, gap.mean, gap.support, gap.rows) == (0.5, 0.25, 1, 1)


def test_steps_after_a_diverged_token_are_left_out(reference):
    """Distributions on different prefixes are not compared, and the report says how many were left out."""
    tensors = dict(reference.tensors)
    tokens = tensors["0/0/tokens"].copy()
    tokens[2] += 1
    tensors["0/0/tokens"] = tokens
    gap = recording.compare(recording.Recording(reference.header, tensors), reference)["greedy"][0]
    assert gap.diverged == len(tokens) - 3
