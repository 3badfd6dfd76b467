"""The families' small models, their references, and the evidence in the profiles: all of the same bytes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
import transformers
from families import models
from families.models import MODELS
from support import ROOT, clean_environment

from vllm_compat import profiles, recording

REFERENCES = ROOT / "tests" / "families" / "references"
RELEASES = {"0.18.1", "0.32.0"}  # the default of families/evidence.py


def reference(name: str) -> recording.Recording:
    return recording.load(REFERENCES / f"{name}.safetensors")


def evidence(name: str, dtype: str = "float32") -> list[profiles.Evidence]:
    return [one for one in profiles.shipped()[MODELS[name].profile].evidence if (one.model, one.dtype) == (name, dtype)]


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bytes_every_time(name, tmp_path):
    """A model built here has the weights and the config that its reference was recorded with."""
    folder = models.make(tmp_path / name, name)
    header = reference(name).header["model"]
    assert header["name"] == name
    assert header["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert header["config"] == json.loads((folder / "config.json").read_text())


def test_another_seed_is_another_model():
    """The seed reaches every parameter."""
    first, second = models.weights("qwen2.5"), models.weights("qwen2.5", seed=1)
    assert not any(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_every_weight(name, tmp_path):
    """Nothing of the checkpoint is missing, left over or of another shape, and what follows a token is peaked, but open."""
    folder = models.make(tmp_path / name, name)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert type(model).__name__ == MODELS[name].architecture
    with torch.inference_mode():
        best = model(torch.arange(40, 100)[None]).logits[0].softmax(-1).amax(-1)
    assert 0.05 < float(best.mean()) < 0.6
    assert (folder / "model.safetensors").stat().st_size < 1.5e6


@pytest.mark.parametrize("name", MODELS)
def test_the_profile_is_the_familys(name):
    """`auto` finds the profile by the model's config.json."""
    profile, notes = profiles.choose("auto", models.config(MODELS[name]))
    assert (profile.name, notes) == (MODELS[name].profile, ())


def test_every_profile_has_a_model():
    """No family without one."""
    assert {spec.profile for spec in MODELS.values()} == set(profiles.shipped()) - {"default"}


@pytest.mark.parametrize("name", MODELS)
def test_references_are_v0s_where_v0_computes_the_model(name):
    """vLLM 0.8.5's V0, as it came, in float32; or transformers, where models.py says why."""
    made = reference(name).header["made_by"]
    expected = ("trainer", "transformers") if MODELS[name].trainer else ("vllm", "V0")
    assert (made["side"], made["engine"], made["dtype"]) == (*expected, "float32")
    assert made.get("profile", "off") == "off"
    assert made.get("vllm", "0.8.5").startswith("0.8.5")  # its post releases are builds of the same


@pytest.mark.parametrize("name", MODELS)
def test_evidence_is_of_the_committed_files(name):
    """Each entry names the reference's checksum and the weights' of the files here; a trainer's says why it is no V0."""
    entries = [*evidence(name), *evidence(name, "bfloat16")]
    assert {one.vllm for one in evidence(name)} >= RELEASES
    for one in entries:
        file = REFERENCES / f"{name}{'' if one.dtype == 'float32' else '-' + one.dtype}.safetensors"
        found = recording.load(file)
        assert (one.kind, one.engine, one.lm_head) == ("architecture", "V1", "float32")
        assert (one.reference, one.weights) == (found.checksum(), found.header["model"]["weights_sha256"])
        assert MODELS[name].trainer in one.note


def test_no_evidence_of_models_that_are_gone():
    """Every entry that is called architecture is of a model of the table."""
    for profile in profiles.shipped().values():
        for one in profile.evidence:
            assert one.kind != "architecture" or MODELS[one.model].profile == profile.name


@pytest.mark.live
@pytest.mark.parametrize("name", ["qwen3"])
def test_a_family_is_held_by_the_installed_vllm(name, tmp_path):
    """Within the profile's bands of the V0 recording."""
    folder = models.make(tmp_path / name, name)
    words = [sys.executable, "-m", "vllm_compat", "validate", str(folder), "--reference", str(REFERENCES / f"{name}.safetensors")]
    words += [
        "--out",
        str(tmp_path / "out"),
        "--engine-args",
        json.dumps({"gpu_memory_utilization": 0.3, **MODELS[name].engine_args}),
    ]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (found["held"], found["profile"]) == (True, MODELS[name].profile)
