"""The source tier: every declared function in every release, from the data that `make sources` wrote; nothing is fetched."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version
from support import ROOT

sys.path.insert(0, str(ROOT / "tests" / "releases"))
import sources

from vllm_compat import releases, vllm_info
from vllm_compat.behaviors import ALL
from vllm_compat.engine_hooks import FRAME
from vllm_compat.patching.probe import fingerprint
from vllm_compat.resolve import within


@pytest.fixture(scope="module")
def known() -> dict[str, sources.Facts]:
    return sources.load()


def test_every_release_was_read(known):
    """The rows and the data are the same list."""
    assert list(known) == list(releases.rows())


# Subclasses that override a target, and why that is no silent way around it.
GOES_AROUND = {
    "InklingLogitsProcessor": "makes a product of its own, scaled by 1/muP: the head's self-test refuses it by name",
    "SpecializedDecodeLogitsProcessor": "hands a float32 head on to the method it overrides",
    "AnthropicServingMessages": "answers in its own format, which has no choices",
    "CohereServingChatV2": "answers in its own format, which has no choices",
}


@pytest.mark.parametrize("release", releases.rows())
def test_every_target_is_there(known, release):
    """Present with the parameters relied on; what we add is absent; no subclass goes around a replacement unseen."""
    facts, version = known[release], Version(release)
    for target, patch, owner in sources.declared():
        if not within(version, patch.versions if patch else target.versions):
            continue
        where = f"{owner}: {target.path} in {release}"
        assert target.path in facts, f"{where} is not there"
        found = facts[target.path]
        assert set(target.params) <= set(found["params"]), where
        assert (found["fingerprint"] == sources.ABSENT) == bool(patch and patch.adds), where
        around = {name.partition(":")[2] for name in found.get("overridden_by", ())}
        assert around <= set(GOES_AROUND), where


def test_every_patch_is_for_releases_in_a_row(known):
    """No patch's range misses every release, or leaves one out in the middle."""
    order = list(known)
    for behavior in ALL:
        for patch in behavior.patches():
            inside = [release for release in order if within(Version(release), patch.versions)]
            assert inside, f"{behavior.name}/{patch.name} is for no release"
            assert order.index(inside[-1]) - order.index(inside[0]) == len(inside) - 1, "a hole"


def test_a_body_that_was_only_read_is_named():
    """Functions whose body no live release has are findings of `vllm-compat releases --json`, by release."""
    from vllm_compat.cli.releases import describe

    ran = [version for version in releases.rows() if releases.tier(Version(version)) == "live"]
    assert ran
    for version in ran:
        found = describe(version)
        assert (found["only_read"] == []) == (found["ran"]["engine"] == "V1"), version
    assert "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p" in describe("0.33.0")["only_read"]


def test_the_data_is_what_the_installed_release_holds(known):
    """The committed row of the installed release equals what its files give now."""
    installed = vllm_info.installed()
    assert known[str(installed.release)] == sources.read(installed.root)


def run(*args: object) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "tests" / "releases" / "sources.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A release 0.99.0 with the sampler only: renamed, reshaped, emptied and overridden functions."""
    root = tmp_path / "vllm"
    (root / "v1" / "sample").mkdir(parents=True)
    (root / "_version.py").write_text("__version__ = version = '0.99.0'\n")
    (root / "v1" / "sample" / "sampler.py").write_text(
        "class Sampler:\n"
        "    def sample(self, logits, metadata):\n        return logits\n\n"
        "    def forward(self, logits, sampling_metadata):\n        return 1\n\n"
        "    def compute(self, logits):\n        return logits\n\n\n"
        "class Faster(Sampler):\n    def sample(self, logits, metadata):\n        return None\n"
    )
    (root / "v1" / "sample" / "other.py").write_text("def compute_logprobs(logits):\n    return logits\n")
    return tmp_path


def test_what_did_this_release_move(made_up):
    """The command names what is gone (and where a function of that name is now), reshaped, changed and overridden."""
    code, out = run(made_up)
    assert code == 1
    assert "vLLM 0.99.0" in out
    assert "GONE     vllm.v1.sample.sampler:Sampler.compute_logprobs" in out
    assert "is in: vllm/v1/sample/other.py" in out
    assert (
        "PARAMS   vllm.v1.sample.sampler:Sampler.sample (processed_logprobs/min_p_last) no longer takes sampling_metadata" in out
    )
    assert "BODY     vllm.v1.sample.sampler:Sampler.forward" in out
    assert "OVERRIDE vllm.v1.sample.sampler:Sampler.sample" in out
    assert "vllm.v1.sample.sampler:Faster" in out


def test_the_fingerprint_sees_code_and_nothing_else():
    """Layout, comments, docstrings and annotations do not count; an operator, a default and a name do."""

    def of(text: str) -> str:
        node = ast.parse(text).body[0]
        assert isinstance(node, ast.FunctionDef)
        return fingerprint(node)

    base = of("def f(self, a, b=1):\n    return a + b\n")
    assert of('def f(self, a: "int", b: int = 1) -> int:\n    """Add."""\n    # really\n    return (a +\n        b)\n') == base
    others = ["def f(self, a, b=2):\n    return a + b\n", "def f(self, a, b=1):\n    return a - b\n"]
    others += ["def f(self, a, c=1):\n    return a + c\n", "def f(self, a, b=1):\n    x: int = a\n    return a + b\n"]
    assert len({base, *map(of, others)}) == 5


def test_every_patch_says_which_releases():
    """No behavior's patch is open-ended; the frame's may be, since it wraps whatever stands there."""
    assert all(patch.versions for behavior in ALL for patch in behavior.patches())
    assert len({(patch.name, patch.target.path) for patch in FRAME}) == len(FRAME)


def test_the_documents_are_the_data():
    """README.md and docs/releases.md hold what `make releases` writes."""
    command = [sys.executable, str(ROOT / "tests" / "releases" / "documents.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_prints_every_release():
    """``vllm-compat releases``: a line each with tier and routes, or the same as JSON; vLLM is not imported."""
    command = [str(Path(sys.executable).parent / "vllm-compat"), "releases"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[0] for line in text[1 : len(releases.rows()) + 1]] == list(releases.rows())
    data = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    by_version = {row["version"]: row for row in data}
    assert list(by_version) == list(releases.rows())
    live, read = by_version["0.18.1"], by_version["0.33.0"]
    assert (live["tier"], live["ran"]["engine"], live["worst"]["with"] < 3e-4 < live["worst"]["without"]) == ("live", "V1", True)
    assert (read["tier"], read["ran"], read["worst"]) == ("sources", None, None)
    assert read["routes"]["v2"]["processed_logprobs"] == "unsupported"
    assert by_version["0.8.5"]["routes"]["v0"]["processed_logprobs"] == "not_needed"


def test_a_local_change_is_named():
    """An installed function that is not the released one is a note in the plan; so is an engine nobody ran."""
    assert not releases.changed_locally("vllm.v1.sample.sampler:Sampler.sample", Version("0.18.1"), "aa1876a435c2")
    assert releases.changed_locally("vllm.v1.sample.sampler:Sampler.sample", Version("0.18.1"), "000000000000")
    assert not releases.changed_locally("vllm.nothing:known", Version("0.18.1"), "000000000000")
    assert releases.shown(Version("0.18.1"), "v1") == ""
    assert "not run" in releases.shown(Version("0.33.0"), "v1")
    assert "V1 was checked by its sources" in releases.shown(Version("0.8.5"), "v1")
