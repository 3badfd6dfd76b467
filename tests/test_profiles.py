"""Profiles: shipped, found everywhere, checked on load, matched by model."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT

from vllm_compat import errors, profiles
from vllm_compat.cli import main
from vllm_compat.validation import RESOLUTION


def test_shipped_profiles_load():
    """Each file of the folder is there under its own name, and has a band for everything that has one."""
    assert set(profiles.shipped()) == {file.stem for file in (ROOT / "profiles").glob("*.toml")} >= {"default", "qwen3", "llama3"}
    for profile in profiles.shipped().values():
        assert set(profile.all_bands()) == set(RESOLUTION)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "qwen3"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "qwen2.5"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "llama3"),
        ({"model_type": "llama"}, "llama3"),
        # an architecture of its own is another model, whatever type it derives from
        ({"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3"}, "default"),
        ({"architectures": ["SomethingElse"], "model_type": "other"}, "default"),
        (None, "default"),
    ],
)
def test_auto_matches_by_architecture(config, name):
    """``auto`` picks the family by config.json, and says so where it has to fall back."""
    profile, notes = profiles.choose("auto", config)
    assert profile.name == name
    assert bool(notes) == (name == "default")


def test_named_profile_that_does_not_list_the_model_is_noted():
    """Naming a profile is enough, but a mismatch is in the report."""
    profile, (note,) = profiles.choose("qwen3", {"architectures": ["LlamaForCausalLM"]})
    assert profile.name == "qwen3"
    assert "does not list LlamaForCausalLM" in note


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("format = 1\nname = 'x'\n[behaviors]\nfp32_head = true", "behaviors.fp32_head: no such behavior"),
        ("format = 1\nname = 'x'\ncolor = 'red'", "color"),
        ("format = 2\nname = 'x'", "format"),
        ("format = 1", "name"),
        ("format = 1\nname = 'x'\n[behaviors]\nfp32_lm_head = 'perhaps'", "behaviors.fp32_lm_head"),
        ("format = ", "cannot be read"),
        ("format = 1\nname = 'x'\n[bands]\nreward = { batch = 1, rounding = 1 }", "bands.reward: no such metric has a band"),
        ("format = 1\nname = 'x'\n[bands]\nclip_rate = { batch = 0, rounding = 1 }", "bands.clip_rate.batch"),
        ("format = 1\nname = 'x'\n[weight_update]\nmethods = ['my method']", "weight_update.methods.0"),
        ("format = 1\nname = 'x'\n[weight_update]\nmethods = 'load'", "weight_update.methods"),
        ("format = 1\nname = 'x'\n[weight_update]\nmethod = ['load']", "weight_update.method"),
        ("format = 1\nname = 'x'\n[[evidence]]\nkind = 'hearsay'", "evidence.0.kind"),
    ],
)
def test_bad_profile_is_one_clear_error(tmp_path: Path, text, says):
    """File, key and reason in one error."""
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(errors.ProfileError) as caught:
        profiles.choose(str(file), None)
    assert str(file) in str(caught.value)
    assert says in str(caught.value)


def test_unknown_name_lists_the_known(tmp_path: Path):
    """A name nobody has is answered with the names there are; a missing file with its path."""
    with pytest.raises(errors.ProfileError, match=r"no profile 'gpt5': use one of .*default, .*llama3, .*qwen2.5, .*qwen3, "):
        profiles.choose("gpt5", None)
    with pytest.raises(errors.ProfileError, match=r"missing\.toml"):
        profiles.choose(str(tmp_path / "missing.toml"), None)


def test_a_path_works(tmp_path: Path):
    """A user's own file switches a behavior off."""
    file = tmp_path / "mine.toml"
    file.write_text("format = 1\nname = 'mine'\n[behaviors]\nno_prefix_caching = false")
    profile, _ = profiles.choose(str(file), None)
    assert profile.behaviors == {"no_prefix_caching": False}


def test_wheel_holds_profiles_and_entry_points(tmp_path: Path):
    """Installed from a wheel: the profiles lie inside the package, the entry module beside it, and both work."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        opened.extractall(tmp_path / "site")
    assert {f"vllm_compat/_profiles/{n}.toml" for n in profiles.shipped()} <= names
    assert {f"vllm_compat/_releases/{n}" for n in ("releases.toml", "sources.json", "live.json")} <= names
    assert {"vllm_compat_entry.py", "vllm_compat/py.typed"} <= names
    assert not any(name.startswith("vllm_compat/_entry") for name in names)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import vllm_compat_entry; from vllm_compat import profiles;"
        "assert profiles.__file__.startswith(sys.argv[1]); assert str(profiles.folder()).startswith(sys.argv[1]);"
        "print(sorted(profiles.shipped()))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "site")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(profiles.shipped()))


def entry(**more) -> profiles.Evidence:
    given = {
        "kind": "architecture", "model": 'a "quoted" name', "weights": "aa", "reference": "bb", "reference_by": "V0 of vLLM 0.8.5",
        "engine": "V1", "vllm": "0.32.0", "dtype": "float32", "lm_head": "float32", "device": "cpu",
        "date": datetime.date(2026, 11, 1), "vllm_compat": "0.1.0", "command": "vllm-compat validate", "held": True,
        "metrics": {"ratio_outside_0.9_1.1": 0.0, "abs_dlogprob_max": 1.5e-5},
    }  # fmt: skip
    return profiles.Evidence(**{**given, **more})


def test_evidence_is_written_and_replaced(tmp_path):
    """An entry is read back as it was; the same subject is replaced, another is added; what stands above is kept."""
    file = tmp_path / "x.toml"
    head = "# a comment\nformat = 1\nname = 'x'\n\n[bands]\nclip_rate = { batch = 3, rounding = 2 }\n"
    file.write_text(head)
    profiles.add_evidence(file, entry())
    assert profiles.read(file).evidence == (entry(),)
    again, other = entry(held=False, failed=("clip_rate",)), entry(vllm="0.18.1", note="two\nlines")
    profiles.add_evidence(file, again)
    profiles.add_evidence(file, other)
    assert profiles.read(file).evidence == (other, again)
    assert file.read_text().startswith(head)
    assert profiles.read(file).bands["clip_rate"].batch == 3


def test_missing_evidence_is_named(tmp_path):
    """Only a validation that held, on this release and this kind of device, is evidence for it."""
    bare = profiles.Profile(format=1, name="x")
    held = profiles.Profile(format=1, name="x", evidence=(entry(),))
    failed = profiles.Profile(format=1, name="x", evidence=(entry(held=False),))
    assert profiles.missing_evidence(held, "0.32.0", "cpu") is None
    assert "it has none at all" in profiles.missing_evidence(bare, "0.32.0", "cpu")
    assert "it has none at all" in profiles.missing_evidence(failed, "0.32.0", "cpu")
    for where in (("0.32.0", "cuda"), ("0.18.1", "cpu")):
        said = profiles.missing_evidence(held, *where)
        assert f"no evidence on vLLM {where[0]}, {where[1]} (it has cpu architecture on vLLM 0.32.0)" in said
        assert "vllm-compat validate" in said


def test_the_list(capsys, monkeypatch):
    """`vllm-compat profiles` shows name, match, age and evidence, failures too; --json has the figures."""
    shown = {
        "a": profiles.Profile(
            format=1, name="a", match={"architectures": ["A"]}, evidence=(entry(), entry(vllm="0.18.1", held=False))
        ),
        "default": profiles.shipped()["default"],
    }
    monkeypatch.setattr(profiles, "shipped", lambda: shown)
    assert main(["profiles"]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:3]
    age = (datetime.date.today() - datetime.date(2026, 11, 1)).days
    assert first.split()[:4] == ["a", "A", str(age), "d"]
    assert "architecture, cpu, float32: 0.18.1 FAILED, 0.32.0" in first
    assert second.split()[-1] == "none"
    assert main(["profiles", "--json"]) == 0
    (row, _) = json.loads(capsys.readouterr().out)
    assert row["evidence"][0]["metrics"]["abs_dlogprob_max"] == 1.5e-5


def test_a_profile_may_choose_a_mode(tmp_path: Path):
    """A behavior's own words beside true and false, and no others; a behavior without modes takes none."""
    file = tmp_path / "mine.toml"
    for word in ("accumulate", "weights", "model"):
        file.write_text(f"format = 1\nname = 'x'\n[behaviors]\nfp32_lm_head = '{word}'")
        assert profiles.choose(str(file), None)[0].behaviors == {"fp32_lm_head": word}
    file.write_text("format = 1\nname = 'x'\n[behaviors]\nprocessed_logprobs = 'weights'")
    with pytest.raises(errors.ProfileError, match="'weights' is none of true, false"):
        profiles.choose(str(file), None)
