"""The lock without an engine: what is in it, what counts as different, and the command."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from support import ROOT, clean_environment

from vllm_compat import cli, lockfile, releases, vllm_info
from vllm_compat.behaviors import ALL, BY_NAME, processed_logprobs
from vllm_compat.errors import LockError, LockMismatchError
from vllm_compat.patching import probe
from vllm_compat.patching.model import State
from vllm_compat.resolve import resolve

SAMPLE = "vllm.v1.sample.sampler:Sampler.sample"


def plan(version: str = "0.32.0", **more):
    return resolve(ALL, version=Version(version), runner=more.pop("runner", "v1"), profile_name="qwen3", **more)


@pytest.fixture(scope="module")
def lock() -> lockfile.Lock:
    return lockfile.build(plan(), lockfile.self_test_digest())


def differences(old: lockfile.Lock, new: lockfile.Lock) -> tuple[str, ...]:
    return lockfile.compare(old, new).differences


# --- what is in it ----------------------------------------------------------------------------------------------


def test_holds_what_decides_the_values(lock):
    """Versions, profile, each behavior with its route, and a fingerprint of every function replaced or relied on."""
    assert (lock.vllm, lock.model_runner, lock.profile) == ("0.32.0", "v1", "qwen3")
    assert (lock.torch, lock.cuda) == (torch.__version__, torch.version.cuda or "none")
    assert list(lock.behaviors) == list(BY_NAME)
    assert lock.behaviors["processed_logprobs"].route == "native + patch"
    assert lock.behaviors["processed_logprobs"].patches == ("min_p_last", "prompt_rows")
    replaced = {p.target.path for b in ALL for p in b.patches() if p.name in ("min_p_last", "prompt_rows", "replica_seed")}
    assert replaced | {"vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p"} <= set(lock.functions)


def test_reads_what_it_writes(lock, tmp_path):
    """The text is TOML that gives the same lock again, always in the same order, whatever the strings hold."""
    odd = lock.model_copy(
        update={"profile": 'my "own" \\ Profil é\n', "engine_arguments": {"seed": 7, "enable_x": True, "a.b": "c"}}
    )
    for number, written in enumerate((lock, odd)):
        file = tmp_path / f"{number}.lock"
        lockfile.write(written, file, "vllm-compat lock model")
        assert lockfile.read(file) == written
        assert lockfile.text(lockfile.read(file), "vllm-compat lock model") == file.read_text()
    assert (tmp_path / "0.lock").read_text().startswith("# The lock of vllm_compat")
    assert "`vllm-compat lock model`" in (tmp_path / "0.lock").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("format = 1\nvllm = ", "cannot be read as a lock"),
        ("\x00", "cannot be read as a lock"),
        ('version = 1\n[[package]]\nname = "torch"\n', "is not a lock of vllm_compat, or is damaged: format"),
        ('format = 1\nvllm = "0.32.0"\n', "is not a lock of vllm_compat, or is damaged: vllm_compat"),
        ("format = 2\n", "format 2 is of a newer vllm_compat"),
    ],
)
def test_a_file_that_is_no_lock(tmp_path, text, says):
    """Damaged, foreign or newer: one error with the file, the reason and what to do."""
    file = tmp_path / "vllm-compat.lock"
    file.write_text(text)
    with pytest.raises(LockError, match=says) as caught:
        lockfile.read(file)
    assert str(file) in str(caught.value)
    assert "update vllm_compat" in str(caught.value) or "run `vllm-compat lock MODEL`" in str(caught.value)


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    """The variable's file, which must exist; else the working directory's, if there is one."""
    monkeypatch.chdir(tmp_path)
    assert lockfile.find(None) is lockfile.find("") is None
    Path("vllm-compat.lock").touch()
    assert lockfile.find(None) == Path("vllm-compat.lock")
    with pytest.raises(LockError, match=r"VLLM_COMPAT_LOCK=other\.lock: there is no such file"):
        lockfile.find("other.lock")


def test_importing_us_does_not_load_it(run_python):
    """`import vllm_compat` stays cheap: the lock's module comes with the first engine."""
    script = "import sys, json, vllm_compat; print('RESULT ' + json.dumps('vllm_compat.lockfile' in sys.modules))"
    assert run_python(script).ok().result is False


# --- the self-test's digest -------------------------------------------------------------------------------------


def test_digest_is_the_same_everywhere(lock, run_python, monkeypatch):
    """Another processor (torch without AVX2) and a trainer's own default dtype do not change it."""
    script = "import json; from vllm_compat import lockfile; print('RESULT ' + json.dumps(lockfile.self_test_digest()))"
    assert run_python(script, environment={"ATEN_CPU_CAPABILITY": "default"}).ok().result == lock.self_test
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert lockfile.self_test_digest() == lock.self_test
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_no_logit_is_near_an_edge_of_the_grid():
    """A processor's last bits (3e-6) cannot move a rounded logit: the nearest edge is thirty times as far."""
    scaled = processed_logprobs.self_test_logits().double() * lockfile._LOGIT_GRID
    assert float((scaled - scaled.floor() - 0.5).abs().min()) / lockfile._LOGIT_GRID > 1e-4


def test_digest_is_of_what_the_test_demands(lock, monkeypatch):
    """One setting more, or another formula, is another digest."""
    with monkeypatch.context() as patched:
        patched.setitem(processed_logprobs._SETTINGS, "greedy", {"temperature": 0.3})
        assert lockfile.self_test_digest() != lock.self_test
    with monkeypatch.context() as patched:
        patched.setattr("vllm_compat.v0_formula.GREEDY_BELOW", 0.75)
        assert lockfile.self_test_digest() != lock.self_test
    assert lockfile.self_test_digest() == lock.self_test


# --- what counts as different -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"vllm": "0.33.0"}, "vLLM: 0.33.0 -> 0.32.0; "),
        ({"torch": "2.10.0+cpu"}, "torch: 2.10.0+cpu -> "),
        ({"cuda": "12.8"}, "CUDA: 12.8 -> "),
        ({"model_runner": "v0"}, "model runner: v0 -> v1"),
        ({"profile": "default"}, "profile: default -> qwen3"),
        ({"self_test": "0"}, "self-test of processed_logprobs: it demands other values than before"),
    ],
)
def test_a_changed_fact(lock, changed, says):
    """Each is one sentence, old and new."""
    (sentence,) = differences(lock.model_copy(update=changed), lock)
    assert sentence.startswith(says)


def test_a_function_that_changed(lock, tmp_path, monkeypatch):
    """Another body in the installed sources is a difference and says what tests it; a comment is none."""
    real = vllm_info.installed()
    for path in lock.functions:
        source = Path(path.partition(":")[0].replace(".", "/") + ".py")
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(real.root.parent / source, tmp_path / source)
    monkeypatch.setattr(vllm_info, "installed", lambda: dataclasses.replace(real, root=tmp_path / "vllm"))
    file = tmp_path / "vllm/v1/sample/sampler.py"
    body = "logits = self.apply_temperature("
    assert file.read_text().count(body) == 1
    for added, expected in (("# a comment\n        ", 0), ("logits = logits * 1\n        ", 1)):
        file.write_text(file.read_text().replace(body, added + body))
        probe._lines.cache_clear()
        found = differences(lock, lockfile.build(plan(), lock.self_test))
        assert len(found) == expected
    probe._lines.cache_clear()
    assert found[0].startswith(f"{SAMPLE}: its body changed ({lock.functions[SAMPLE]} -> ")
    assert "the self-test of processed_logprobs demands the same values as before (digest equal)" in found[0]


def test_a_body_and_the_digest_changed(lock):
    """Then nothing is said to be the same; without a digest (doctor), nothing is said about it."""
    old = lock.model_copy(update={"functions": {**lock.functions, SAMPLE: "0"}})
    first, second = differences(old.model_copy(update={"self_test": "0"}), lock)
    assert "other values" in first
    assert "demands other values than before" in second
    (only,) = differences(old, lock.model_copy(update={"self_test": None}))
    assert "digest" not in only
    assert "the check of processed_logprobs must hold in every worker" in only


def test_a_route_that_changed():
    """Patch to vLLM's own option: both are named, and who vouches for the values."""
    old, new = (lockfile.build(plan(version), "0") for version in ("0.25.0", "0.32.0"))
    (sentence,) = [found for found in differences(old, new) if found.startswith("fp32_lm_head")]
    assert sentence == (
        "fp32_lm_head (logits in float32): patch -> native + patch; patches: float32_product, adapter_rows -> apply_head, "
        "contiguous_logits, adapter_rows; "
        "options: none -> hf_overrides={'head_dtype': 'float32'}; "
        "the check of fp32_lm_head must hold in every worker before the first token"
    )
    assert not [found for found in differences(old, new) if found.startswith("no_prefix_caching")]


def test_a_behavior_switched_off_and_on(lock):
    """Off says who decided and what is lost; on says what is in force again."""
    off = lockfile.build(plan(environment={"fp32_lm_head": False}), lock.self_test)
    (lost,) = differences(lock, off)
    assert "fp32_lm_head (logits in float32): native + patch -> disabled, decided by the environment; lost: every logit" in lost
    (back,) = differences(off, lock)
    assert "disabled -> native + patch; in force now: " in back


def test_an_argument_of_the_program(lock):
    """V0's own value, given explicitly, is a note; another value is a difference."""
    same = plan(user={"enable_prefix_caching": False, "logprobs_mode": "processed_logprobs"})
    found = lockfile.compare(lock, lockfile.build(same, lock.self_test))
    assert found.differences == ()
    assert found.notes == (
        "processed_logprobs: decided by the engine argument, before by the default; the effect is the same",
        "no_prefix_caching: decided by the engine argument, before by the default; the effect is the same",
    )
    (sentence,) = differences(lock, lockfile.build(plan(user={"enable_prefix_caching": True}), lock.self_test))
    assert sentence.startswith(
        "no_prefix_caching (no KV blocks shared between requests): native -> overridden, decided by the engine"
    )


def test_what_is_no_difference(lock):
    """Our own version, a build of the same torch, and a function only one side lists: notes."""
    functions = {path: found for path, found in lock.functions.items() if path != SAMPLE}
    old = lock.model_copy(
        update={"vllm_compat": "0.0.1", "torch": lock.torch.partition("+")[0] + "+other", "functions": functions}
    )
    found = lockfile.compare(old, lock)
    assert found.differences == ()
    assert [note.split(":")[0] for note in found.notes] == ["torch", SAMPLE.split(":")[0], "vllm_compat"]


def test_behaviors_that_one_side_does_not_know(lock):
    """A behavior in force on one side only is a difference; one that is given up is a note."""
    without = {name: row for name, row in lock.behaviors.items() if name != "fp32_lm_head"}
    old = lock.model_copy(update={"behaviors": without})
    (sentence,) = differences(old, lock)
    assert sentence.startswith("fp32_lm_head: the lock does not know it, now native + patch")
    off = lockfile.build(plan(environment={"fp32_lm_head": False}), lock.self_test)
    assert differences(old, off) == ()
    (sentence,) = differences(lock, old)
    assert "fp32_lm_head: is in the lock, and this vllm_compat" in sentence
    unknown = lock.model_copy(update={"behaviors": {**lock.behaviors, "other": lock.behaviors["fp32_lm_head"]}})
    assert differences(unknown, lock)[0].startswith("other: is in the lock")


def measured(worst: float, engine: str = "V1", dtype: str = "float32", passed: bool = True) -> dict:
    return {"passed": passed, "engine": engine, "with": {"dtype": dtype, "sampled": {"worst": worst}, "prompt": {"worst": 1e-6}}}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (measured(8.4e-5), measured(2e-5), "both met the V0 recording within 8.4e-05 nats"),
        (measured(8.4e-5), None, "float32: 0.32.0;"),
        (None, None, "not measured against V0 in float32: 0.18.1, 0.32.0; only the self-tests speak"),
        (measured(8.4e-5, dtype="bfloat16"), measured(2e-5), "float32: 0.18.1;"),
        (measured(8.4e-5), measured(2e-5, passed=False), "float32: 0.32.0;"),
        (measured(8.4e-5, engine="V0"), measured(2e-5), "float32: 0.18.1;"),
    ],
)
def test_claims_only_what_was_measured(lock, monkeypatch, old, new, says):
    """Figures are named where both releases have passed in float32 on this runner, and nothing else is."""
    monkeypatch.setattr(releases, "live", lambda: {v: row for v, row in (("0.18.1", old), ("0.32.0", new)) if row})
    (sentence,) = differences(lock.model_copy(update={"vllm": "0.18.1"}), lock)
    assert says in sentence


def test_the_measurements_that_ship_can_be_read(lock):
    """Every release that passed in float32 gives a figure."""
    for version, row in releases.live().items():
        if row["passed"] and row["with"]["dtype"] == "float32":
            runner = row["engine"].lower()
            assert lockfile._worst(lock.model_copy(update={"vllm": version, "model_runner": runner})) < 3e-4


def test_the_readme_shows_real_sentences():
    """The two lines about 0.16.0 and 0.18.1 are what the comparison says with the measurements that ship."""
    found = differences(*(lockfile.build(plan(version), "0") for version in ("0.16.0", "0.18.1")))
    starts = ("vLLM: 0.", "synchronized_weight_update (")
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(starts)]
    assert len(shown) == 2
    assert all(sentence.startswith(line) for sentence, line in zip(found, shown))


def test_an_engine_is_held_to_it(lock, tmp_path):
    """The same plan gives notes for the report; another raises with every difference and what to do, strict or not, also over pickle."""
    file = tmp_path / "vllm-compat.lock"
    assert lockfile.hold(plan(), file, lock) == (f"the lock {file} is met",)
    off = {"fp32_lm_head": False, "no_async_scheduling": False}
    with pytest.raises(LockMismatchError) as caught:
        lockfile.hold(plan(environment=off, strict=False), file, lock)
    assert len(caught.value.differences) == 2
    for part in (str(file), "fp32_lm_head", "no_async_scheduling", "vllm-compat lock MODEL --update"):
        assert part in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`vllm-compat ...` in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLLM_COMPAT_PROFILE")

    def run(*args: object, **environment: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            code = cli.main([str(arg) for arg in args])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def tamper(old: str, new: str) -> None:
    file = Path("vllm-compat.lock")
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_write_and_check(command, model):
    """Written, then no difference; a switch in the environment is one, with exit code 1."""
    assert command("lock", model) == (0, "vllm-compat.lock: written\n", "")
    assert command("lock", model, "--check") == (0, "vllm-compat.lock: no difference\n", "")
    code, out, _ = command("lock", "--check", VLLM_COMPAT_FP32_LM_HEAD="0")
    assert code == 1
    assert "fp32_lm_head (logits in float32): native + patch -> disabled" in out
    assert "vllm-compat lock MODEL --update" in out


def test_the_installed_command(model, tmp_path):
    """The same through the console script, in a clean environment."""
    script = str(Path(sys.executable).parent / "vllm-compat")
    for args, code in (([str(model)], 0), (["--check"], 0), (["--check", "--file", "none.lock"], 2)):
        done = subprocess.run([script, "lock", *args], env=clean_environment(), cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == code, done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "vllm-compat.lock"]


def test_will_not_overwrite(command, model):
    """A different lock stays; the same one is left alone; --update takes the new state and says what changed."""
    assert command("lock", model)[0] == 0
    before = Path("vllm-compat.lock").read_text()
    assert command("lock", model) == (0, "vllm-compat.lock: no difference\n", "")
    off = {"VLLM_COMPAT_FP32_LM_HEAD": "0"}
    code, _, err = command("lock", model, **off)
    assert code == 2
    assert "exists and is different; --update would accept:\n  - fp32_lm_head" in err
    assert Path("vllm-compat.lock").read_text() == before
    code, out, _ = command("lock", model, "--update", **off)
    assert code == 0
    assert "accepted:\n  - fp32_lm_head (logits in float32): native + patch -> disabled" in out
    assert command("lock", "--check", **off)[0] == 0
    assert command("lock", "--update", **off)[1].startswith("vllm-compat.lock: written again; no engine would differ")


def test_update_speaks_of_versions_and_bodies(command, model):
    """Another vLLM and another body, in words."""
    command("lock", model)
    tamper('vllm = "0.32.0"', 'vllm = "0.31.0"')
    tamper(f'"{SAMPLE}" = "', f'"{SAMPLE}" = "0')
    _, out, _ = command("lock", "--update")
    assert "  - vLLM: 0.31.0 -> 0.32.0; " in out
    assert f"  - {SAMPLE}: its body changed" in out
    assert command("lock", "--check")[0] == 0


def test_no_lock_and_bad_locks(command, model):
    """Nothing to compare with, or nothing readable: exit code 2 and one sentence; a bad file is not overwritten."""
    for args in (("--check",), ("--update",), ("--check", "--file", "other.lock")):
        code, _, err = command("lock", model, *args)
        assert code == 2
        assert "there is no such lock" in err
    Path("vllm-compat.lock").write_text("not a lock")
    for args in ((), ("--check",), ("--update",)):
        code, _, err = command("lock", model, *args)
        assert code == 2
        assert "cannot be read as a lock" in err
    assert Path("vllm-compat.lock").read_text() == "not a lock"


def test_places(command, model, tmp_path):
    """--file and VLLM_COMPAT_LOCK name it; what cannot be written is one sentence."""
    assert command("lock", model, "--file", "a.lock")[0] == 0
    assert command("lock", model, VLLM_COMPAT_LOCK="b.lock")[0] == 0
    assert command("lock", "--check", VLLM_COMPAT_LOCK="b.lock")[0] == 0
    assert {file.name for file in tmp_path.iterdir()} == {"a.lock", "b.lock"}
    code, _, err = command("lock", model, "--file", tmp_path / "nowhere" / "c.lock")
    assert code == 2
    assert "cannot be written" in err


def test_which_profile(command, model):
    """The model's, or the named one; without both nothing is guessed, and a check takes the lock's."""
    code, _, err = command("lock")
    assert code == 2
    assert "give MODEL, or name one with VLLM_COMPAT_PROFILE" in err
    code, _, err = command("lock", model / "model.safetensors")
    assert code == 2
    assert "there is no config.json in it" in err
    assert command("lock", VLLM_COMPAT_PROFILE="llama3")[0] == 0
    assert command("lock", "--check")[0] == 0
    code, out, _ = command("lock", model, "--check")
    assert code == 1
    assert "profile: llama3 -> qwen3" in out
    code, _, err = command("lock", model, "--check", VLLM_COMPAT_PROFILE="off")
    assert code == 2
    assert "nothing to lock" in err


def test_arguments_of_the_program_are_remembered(command, model):
    """Only those that decide a behavior, and until others are given."""
    given = json.dumps({"seed": 7, "model": "/a/place", "hf_overrides": {"head_dtype": "float32", "other": 1}})
    assert command("lock", model, "--engine-args", given)[0] == 0
    text = Path("vllm-compat.lock").read_text()
    assert '[engine_arguments]\n"hf_overrides.head_dtype" = "float32"\nseed = 7\n' in text
    assert "/a/place" not in text
    assert 'state = "overridden"' in text
    assert command("lock", "--check")[0] == 0
    code, out, _ = command("lock", "--check", "--engine-args", "{}")
    assert code == 1
    assert "unshared_engine_seed" in out
    with pytest.raises(SystemExit, match="2"):
        command("lock", "--engine-args", "[]")


def test_another_value_that_overrides_is_a_difference(command, model):
    """The user's own value that gives a behavior up is part of the lock; a seed is not, since every engine may have its own."""
    given = '{"logprobs_mode": "raw_logits", "seed": 7}'
    assert command("lock", model, "--engine-args", given)[0] == 0
    assert command("lock", "--check", "--engine-args", given.replace("7", "8"))[0] == 0
    code, out, _ = command("lock", "--check", "--engine-args", given.replace("raw_logits", "processed_logits"))
    assert code == 1
    assert "(logprobs_mode='raw_logits' -> logprobs_mode='processed_logits')" in out


def test_json(command, model):
    """For machines: the file, the differences, the notes and the lock of now."""
    command("lock", model)
    tamper('vllm_compat = "', 'vllm_compat = "9')
    code, out, _ = command("lock", "--check", "--json", VLLM_COMPAT_UNSHARED_ENGINE_SEED="0")
    data = json.loads(out)
    assert code == 1
    assert data["file"] == "vllm-compat.lock"
    assert [sentence.split(" ")[0] for sentence in data["differences"]] == ["unshared_engine_seed"]
    assert any(note.startswith("vllm_compat: ") for note in data["notes"])
    assert data["lock"]["behaviors"]["unshared_engine_seed"]["state"] == State.DISABLED.value


def test_a_vllm_that_cannot_start_is_not_locked(command, model, monkeypatch):
    """A refused release, a missing vLLM, or a behavior without a route: the reason, exit code 2, and no file."""
    real = vllm_info.installed()
    other = dataclasses.replace(real, version="0.99.0", release=Version("0.99.0"))
    for installed, says in ((other, "this release has not been read"), (None, "vLLM is not installed")):
        with monkeypatch.context() as patched:
            patched.setattr(vllm_info, "installed", lambda installed=installed: installed)
            code, _, err = command("lock", model)
        assert code == 2
        assert says in err
    code, _, err = command("lock", model, VLLM_USE_V2_MODEL_RUNNER="1")
    assert code == 2
    assert "no engine would start here" in err
    assert not Path("vllm-compat.lock").exists()


def test_doctor_names_the_lock(command, model, tmp_path):
    """Met, different or damaged: doctor says so, without torch; what differs is a finding."""
    reports = {"VLLM_COMPAT_REPORT_DIR": str(tmp_path / "reports")}
    assert json.loads(command("doctor", model, "--json", **reports)[1])["lock"] is None
    command("lock", model)
    code, out, _ = command("doctor", **reports)
    assert code == 0
    assert "lock vllm-compat.lock: met" in out
    code, out, _ = command("doctor", model, VLLM_COMPAT_FP32_LM_HEAD="0", **reports)
    assert code == 1
    assert "FINDING: lock vllm-compat.lock: fp32_lm_head" in out
    Path("vllm-compat.lock").write_text("not a lock")
    code, out, _ = command("doctor", model, **reports)
    assert code == 1
    assert "FINDING: vllm-compat.lock: cannot be read as a lock" in out


def test_doctor_compares_without_torch(command, model, run_python):
    """With a lock in the folder doctor still reads files only."""
    command("lock", model)
    script = f"""
    import sys, json
    from vllm_compat.cli import main
    code = main(["doctor", {str(model)!r}, "--json"])
    print("RESULT " + json.dumps([code, sorted({{m.split(".")[0] for m in sys.modules}} & {{"vllm", "torch"}})]))
    """
    assert run_python(script).ok().result == [0, []]
