"""The environment, and what importing us costs and touches."""

from __future__ import annotations

import pytest

from vllm_compat import behaviors, errors, settings

IMPORT = """
import sys, json
import vllm_compat
print("RESULT " + json.dumps(sorted({m.split(".")[0] for m in sys.modules} & {"vllm", "torch", "numpy", "transformers"})))
"""


def test_import_leaves_no_vllm_and_no_torch(run_python):
    """``import vllm_compat`` loads neither vllm nor torch."""
    assert run_python(IMPORT).ok().result == []


def test_unknown_variable_is_an_error_with_the_nearest_name(run_python):
    """A misspelt variable stops the import, naming itself, its correction and what exists."""
    ran = run_python("import vllm_compat", environment={"VLLM_COMPAT_FP32_LMHEAD": "1"})
    assert ran.code == 1
    assert (
        "SettingsError: unknown environment variable VLLM_COMPAT_FP32_LMHEAD; did you mean VLLM_COMPAT_FP32_LM_HEAD?" in ran.text
    )


def test_command_line_reports_an_error_without_a_traceback(run_python):
    """The same error through the command is one line and exit code 2."""
    script = "import sys, vllm_compat_entry; sys.argv = ['vllm-compat', 'doctor']; sys.exit(vllm_compat_entry.main())"
    ran = run_python(script, environment={"VLLM_COMPAT_STRIKT": "1"})
    assert ran.code == 2
    assert "Traceback" not in ran.text
    assert "VLLM_COMPAT_STRICT" in ran.text


@pytest.mark.parametrize(("name", "value"), [("STRICT", "perhaps"), ("PROCESSED_LOGPROBS", "2"), ("PROFILE", "")])
def test_bad_value(monkeypatch, name, value):
    """A value that does not parse is named with its variable."""
    monkeypatch.setenv(f"VLLM_COMPAT_{name}", value)
    with pytest.raises(errors.SettingsError, match=f"VLLM_COMPAT_{name}='{value}'"):
        settings.load()


@pytest.mark.parametrize(("value", "choice"), [("1", True), ("0", False), ("weights", "weights"), ("model", "model")])
def test_a_switch_takes_modes(monkeypatch, value, choice):
    """0 and 1 stay switches; a mode keeps its word."""
    monkeypatch.setenv("VLLM_COMPAT_FP32_LM_HEAD", value)
    assert settings.load().fp32_lm_head == choice
    assert type(settings.load().fp32_lm_head) is type(choice)


def test_every_behavior_has_its_switch_and_nothing_else_does():
    """The settings' fields are those of the package and the behaviors, by name."""
    assert set(settings.Settings.model_fields) == {
        "profile",
        "strict",
        "report_dir",
        "lock",
        "unbracketed_updates",
        "http_token_file",
        "http_roots",
        "http_transports",
        *behaviors.BY_NAME,
    }
    assert all(field.description for field in settings.Settings.model_fields.values())


def test_profile_off_does_nothing(run_python):
    """``VLLM_COMPAT_PROFILE=off``: imported, but no hook of ours is hung."""
    script = """
    import vllm_compat, json
    from vllm_compat.patching import hooks
    print("RESULT " + json.dumps([sorted(hooks._hooks), vllm_compat.status()]))
    """
    assert run_python(script, environment={"VLLM_COMPAT_PROFILE": "off"}).ok().result == [[], []]


def test_plugin_is_inert_unless_named(run_python):
    """vLLM's loader may call our entry point anywhere: only a named profile imports the package."""
    script = """
    import importlib.metadata, json, sys
    (point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="vllm_compat")
    point.load()()
    print("RESULT " + json.dumps("vllm_compat" in sys.modules))
    """
    assert run_python(script).ok().result is False
    assert run_python(script, environment={"VLLM_COMPAT_PROFILE": "off"}).ok().result is False
    assert run_python(script, environment={"VLLM_COMPAT_PROFILE": "auto"}).ok().result is True
