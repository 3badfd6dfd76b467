"""Profiles: shipped, found everywhere, checked on load, matched by model."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT

from vllm_compat import errors, profiles


def test_shipped_profiles_load():
    """The four families of the start are there under their files' names."""
    assert set(profiles.shipped()) == {"default", "qwen3", "qwen2.5", "llama3"}
    for name in profiles.shipped():
        assert (ROOT / "profiles" / f"{name}.toml").is_file()


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
    with pytest.raises(errors.ProfileError, match=r"no profile 'gpt5': use one of default, llama3, qwen2.5, qwen3"):
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
