"""The recording file: what is damaged, foreign or of another experiment says so; listed and whole tables compare alike."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import PARITY

from vllm_compat import errors, experiment, recording, validation


@pytest.fixture
def reference():
    return recording.load(PARITY / "v0_float32.safetensors")


def test_the_shipped_references_are_of_the_real_v0_engine():
    """Versions, engine, commit, command and noise floors are inside, and both are of the same model and experiment."""
    exact, rounded = (recording.load(PARITY / f"v0_{dtype}.safetensors") for dtype in ("float32", "bfloat16"))
    for one, dtype in ((exact, "float32"), (rounded, "bfloat16")):
        made = one.header["made_by"]
        assert made["vllm"].startswith("0.8.5")
        assert (made["engine"], made["side"], made["dtype"], made["lm_head"]) == ("V0", "vllm", dtype, dtype)
        assert len(made["commit"]) == 40
        assert "record" in made["command"]
        assert one.settings == list(experiment.SETTINGS)
        assert one.header["floor"]["batch"]["abs_dlogprob_max"] < 1e-4
        assert one.tensors["floor"].shape == (sum(1 for _ in recording.rows(one, one)),)
    assert exact.header["floor"]["batch"]["abs_dlogprob_max"] > 0
    assert exact.header["floor"]["rounding"] is None
    assert (
        rounded.header["floor"]["rounding"]["abs_dlogprob_mean"]
        == validation.measure(rounded, exact).metrics["abs_dlogprob_mean"]
    )
    assert exact.header["model"]["weights_sha256"] == rounded.header["model"]["weights_sha256"]


def test_round_trip(tmp_path, reference):
    """Saved and loaded is the same, and compares as equal."""
    file = tmp_path / "copy.safetensors"
    recording.save(reference, file)
    again = recording.load(file)
    assert again.header == reference.header
    assert again.checksum() == reference.checksum()
    for name, kinds in recording.compare(again, reference).items():
        for kind, gap in kinds.items():
            assert (gap.max, gap.support, gap.diverged, gap.unlisted) == (0, 0, 0, 0)
            assert gap.rows > 0 or (kind == "prefix" and name not in experiment.PREFIX_SETTINGS)


def test_a_flipped_byte_is_damage(tmp_path):
    """The checksum is over the tensors' bytes."""
    data = bytearray((PARITY / "v0_float32.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(errors.RecordingError, match="checksum does not match"):
        recording.load(tmp_path / "x.safetensors")


def test_an_edited_header_is_damage(tmp_path, reference):
    """The checksum is over the header too: a recording does not change its maker."""
    header = {**reference.header, "made_by": {**reference.header["made_by"], "vllm": "0.9.9"}}
    metadata = {"format": "vllm_compat.recording", "version": "2", "sha256": reference.checksum(), "header": json.dumps(header)}
    save_file(reference.tensors, tmp_path / "x.safetensors", metadata=metadata)
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
    save_file({"a": np.zeros(1)}, file, metadata={"format": recording.FORMAT, "version": "1"})
    with pytest.raises(errors.RecordingError, match="format 1; this vllm_compat reads 2"):
        recording.load(file)


def test_different_experiments_are_not_compared(reference):
    """Other prompts or other weights: refused instead of a number that means nothing."""
    other = recording.Recording({**reference.header, "experiment": {**reference.experiment, "prompts": [[1]]}}, reference.tensors)
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
    gap = recording.compare(recording.Recording(reference.header, tensors), reference)["greedy"]["sampled"]
    assert gap.diverged == len(tokens) - 3


def listed(whole: recording.Recording, top_n: int) -> recording.Recording:
    """The same recording with only the most probable tokens, and each row's own, kept."""
    asked = experiment.Experiment(**{**whole.experiment, "top_n": top_n})
    own = {(row.setting, row.prompt, row.kind, row.position): row.token for row in recording.rows(whole, whole)}
    tensors = {}
    for name, table in whole.tensors.items():
        kind = {"logprobs": "sampled", "prompt_logprobs": "prompt", "prefix_logprobs": "prefix"}.get(name.rpartition("/")[2])
        if kind is None:
            tensors[name] = table
            continue
        rows, (s, p) = [], map(int, name.split("/")[:2])
        for position, row in enumerate(table):
            best = np.argsort(-row, kind="stable")[:top_n].tolist()
            rows.append({token: float(row[token]) for token in {*best, own[s, p, kind, position]}})
        recording.put(tensors, name, rows, asked.vocab, top_n)
    return recording.Recording({**whole.header, "experiment": asked.to_dict()}, tensors)


def test_listed_tables_compare_with_whole_ones(reference, tmp_path):
    """A recording of 12 tokens a row and the tail's mass: no difference to the whole one either way round, and the tail is
    what the rest has."""
    small = listed(reference, 12)
    recording.save(small, tmp_path / "small.safetensors")
    small = recording.load(tmp_path / "small.safetensors")
    assert sum(t.nbytes for t in small.tensors.values()) < sum(t.nbytes for t in reference.tensors.values()) / 4
    for a, b in ((small, reference), (reference, small), (small, small)):
        for kinds in recording.compare(a, b).values():
            assert all((gap.max, gap.support) == (0, 0) for gap in kinds.values())
    whole, tail = reference.get(1, 0, "logprobs")[0], small.get(1, 0, "logprobs/tail")[0]
    ids = [token for token in small.get(1, 0, "logprobs/ids")[0] if token >= 0]
    rest = math.fsum(math.exp(value) for token, value in enumerate(whole.tolist()) if token not in ids)
    assert tail == pytest.approx(math.log(rest), abs=1e-4)
    numbers, full = (validation.measure(one, reference).metrics for one in (small, reference))
    assert numbers["tokens"] == full["tokens"]


def test_listed_tables_see_a_token_that_a_filter_should_have_removed(reference):
    """A list without a rest says -inf of every other token, so a token that the other side keeps is counted."""
    small = listed(reference, 12)
    s = reference.settings.index("T=0.7 top-k 10")
    tensors = dict(small.tensors)
    table = tensors[f"{s}/0/logprobs"].copy()
    assert np.isfinite(table[0]).sum() == 10
    table[0, 10] = -9.0
    tensors[f"{s}/0/logprobs"] = table
    gap = recording.compare(recording.Recording(small.header, tensors), reference)["T=0.7 top-k 10"]["sampled"]
    assert gap.support == 1


def test_the_container_is_plain_safetensors(tmp_path, reference):
    """Anybody's safetensors reads it."""
    recording.save(reference, tmp_path / "x.safetensors")
    assert set(load_file(tmp_path / "x.safetensors")) == set(reference.tensors)
