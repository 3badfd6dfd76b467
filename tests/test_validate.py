"""`vllm-compat validate` without an engine: verdicts and exit codes, what is refused, and the report's file."""

from __future__ import annotations

import json
import math
import re
import tomllib
from html.parser import HTMLParser

import numpy as np
import pytest
from support import PARITY

from vllm_compat import html_report, pictures, profiles, recording, validation, validation_report
from vllm_compat.cli import main, record, validate

REFERENCE = PARITY / "v0_float32.safetensors"
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed, and keeps tags and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture
def reference() -> recording.Recording:
    return recording.load(REFERENCE)


def changed(one, made_by=None, model=None, **tensors) -> recording.Recording:
    """A copy with other header entries and tensors, and no floor of its own."""
    header = {**one.header, "floor": {"batch": None, "rounding": None}}
    header["made_by"] = {**one.header["made_by"], **(made_by or {})}
    header["model"] = {**one.header["model"], **(model or {})}
    return recording.Recording(header, {**one.tensors, **tensors})


def kept(folder, one, name="found.safetensors"):
    """Saved under a name."""
    recording.save(one, folder / name)
    return folder / name


def run(folder, *args: object) -> int:
    return main(["validate", "--out", str(folder), *map(str, args)])


def data_of(folder) -> dict:
    """report.json, read strictly: no NaN, no Infinity."""
    return json.loads((folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_recording_against_itself_holds(tmp_path, capsys):
    """Exit code 0, every band held at 0, and both files are there."""
    assert run(tmp_path, "--reference", REFERENCE, "--found", REFERENCE) == 0
    said = capsys.readouterr().out
    assert "HELD: 8 of 8 bands of profile qwen3" in said
    assert "V0 of vLLM 0.8.5" in said
    data = data_of(tmp_path)
    assert data["held"]
    assert [band["value"] for band in data["bands"]] == [0] * 8
    assert data["quantiles"]["found"]["max"] == 0
    assert data["quantiles"]["floor"]["max"] > 0
    page = Page((tmp_path / "report.html").read_text())
    assert "✓ HELD" in page.text


def test_one_bent_distribution_fails_and_is_named(tmp_path, reference, capsys):
    """Exit code 1; the bands of the maximum fail, and the worst row is the one that was bent."""
    s = reference.settings.index("T=0.7")
    table = reference.get(s, 2, "logprobs").copy()
    table[0] -= 0.25
    found = kept(tmp_path, changed(reference, **{f"{s}/2/logprobs": table}))
    assert run(tmp_path, "--reference", REFERENCE, "--found", found) == 1
    said = capsys.readouterr().out
    assert re.search(r"abs_dlogprob_max +0\.25 .* FAILED", said)
    assert re.search(r"T=0\.7 +sampled +2 +0 .* 0\.25\n", said)
    data = data_of(tmp_path)
    assert {"abs_dlogprob_max", "distribution_abs_dlogprob_max", "clip_rate"} <= set(data["failed"])
    assert "kept_by_one_side" not in data["failed"]
    worst = data["worst"][0]
    assert (worst["setting"], worst["kind"], worst["prompt"], worst["size"]) == ("T=0.7", "sampled", 2, pytest.approx(0.25))
    assert "✗ FAILED" in Page((tmp_path / "report.html").read_text()).text


def test_the_limit_is_the_floor_times_the_factor(tmp_path, reference):
    """The same small shift holds under a profile with wide bands and fails under one with narrow bands."""
    names = [name for name in reference.tensors if name.endswith("/logprobs")]
    rng = np.random.default_rng(0)
    tensors = {name: reference.tensors[name] + rng.normal(0, 3e-6, reference.tensors[name].shape).astype("f4") for name in names}
    found = kept(tmp_path, changed(reference, **tensors))
    for factor, code in ((1000, 0), (0.001, 1)):
        bands = "".join(f'"{name}" = {{ batch = {factor}, rounding = 1 }}\n' for name in validation.RESOLUTION)
        file = tmp_path / "mine.toml"
        file.write_text(f'format = 1\nname = "mine"\n[match]\nmodel_types = ["qwen3"]\n[bands]\n{bands}')
        assert run(tmp_path, "--reference", REFERENCE, "--found", found, "--profile", file) == code
        band = data_of(tmp_path)["bands"][0]
        floor = max(reference.header["floor"]["batch"]["abs_dlogprob_mean"], 1e-6)
        assert band["limit"] == pytest.approx(factor * floor)
        assert data_of(tmp_path)["profile"] == "mine"


def test_an_exact_recording_gives_a_rounding_floor(tmp_path, reference, capsys):
    """--exact: the reference's distance to float64 times the factor may be the limit; its file's checksum stays the subject."""
    table = reference.get(1, 0, "logprobs").copy()
    off = changed(reference, **{"1/0/logprobs": table + np.float32(1e-3)})
    found = kept(tmp_path, off)
    assert run(tmp_path / "without", "--reference", REFERENCE, "--found", found) == 1
    exact = changed(reference, {"dtype": "float64", "side": "trainer", "engine": "transformers", "transformers": "5"},
                    **{"1/0/logprobs": table - np.float32(1e-3)})  # fmt: skip
    words = ["--reference", REFERENCE, "--found", found, "--exact", kept(tmp_path, exact, "exact.safetensors")]
    assert run(tmp_path / "with", *words) == 0
    data = data_of(tmp_path / "with")
    (band,) = [one for one in data["bands"] if one["metric"] == "abs_dlogprob_max"]
    assert band["limit"] == pytest.approx(2 * band["rounding_floor"]) == pytest.approx(2e-3, rel=1e-3)
    assert data["reference"]["checksum"] == reference.checksum()
    assert "rounding floor is its distance to" in data["notes"][-1]


def test_what_is_no_exact_recording_is_refused(tmp_path, reference, capsys):
    """Another dtype, and a reference that has a rounding floor."""
    rounded = PARITY / "v0_bfloat16.safetensors"
    exact = kept(tmp_path, changed(reference, {"dtype": "float64"}), "exact.safetensors")
    for ref, given, sentence in ((REFERENCE, REFERENCE, "is float32: want"), (rounded, exact, "has a rounding floor of its own")):
        assert run(tmp_path / "out", "--reference", ref, "--found", ref, "--exact", given) == 2
        assert sentence in capsys.readouterr().err


def test_json_goes_to_stdout_alone(tmp_path, capsys):
    """What is printed with --json is report.json, and nothing else."""
    assert run(tmp_path, "--reference", REFERENCE, "--found", REFERENCE, "--json") == 0
    assert json.loads(capsys.readouterr().out) == data_of(tmp_path)


def test_everything_of_the_page_is_in_the_json(tmp_path):
    """The page made of report.json is report.html."""
    run(tmp_path, "--reference", REFERENCE, "--found", REFERENCE)
    assert html_report.page(data_of(tmp_path)) == (tmp_path / "report.html").read_text()


def test_a_one_sided_head_is_refused(tmp_path, reference, capsys):
    """A float32 lm_head on one side only: exit code 2 and its name, whichever side has it, and no report."""
    rounded = recording.load(PARITY / "v0_bfloat16.safetensors")
    exact = kept(tmp_path, changed(rounded, {"lm_head": "float32"}))
    assert run(tmp_path / "out", "--reference", PARITY / "v0_bfloat16.safetensors", "--found", exact) == 2
    assert "one-sided float32 lm_head: the engine's logits are float32, the reference's bfloat16" in capsys.readouterr().err
    made = recording.Recording(
        {**rounded.header, "made_by": {**rounded.header["made_by"], "lm_head": "float32"}}, rounded.tensors
    )
    assert (
        run(tmp_path / "out", "--reference", kept(tmp_path, made, "r.safetensors"), "--found", PARITY / "v0_bfloat16.safetensors")
        == 2
    )
    assert "the engine's logits are bfloat16, the reference's float32" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("report.*"))


def test_a_one_sided_head_is_refused_before_the_engine_starts(tmp_path, model, monkeypatch, capsys):
    """The plan says what the head will be: nothing is started for a reference with another one."""
    monkeypatch.setattr(record.Job, "run", lambda self: pytest.fail("an engine was started"))
    assert run(tmp_path, model, "--reference", PARITY / "v0_bfloat16.safetensors", "--profile", "auto") == 2
    assert "one-sided float32 lm_head: the engine's logits are float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "switch", "engine_args", "head"),
    [
        ("off", None, None, "bfloat16"),
        ("auto", None, None, "float32"),
        ("auto", "0", None, "bfloat16"),
        ("off", None, '{"hf_overrides": {"head_dtype": "float32"}}', None),
    ],
)
def test_the_expected_head(profile, switch, engine_args, head, monkeypatch, reference):
    """Off: the model's dtype. Under a profile: what the plan has. The user's own head_dtype: only the engine can tell."""
    import argparse

    if switch:
        monkeypatch.setenv("VLLM_COMPAT_FP32_LM_HEAD", switch)
    args = argparse.Namespace(profile=profile, engine_args=engine_args)
    assert validate._expected_head(args, "bfloat16", reference.header["model"]["config"]) == head
    assert validate._expected_head(args, "float32", reference.header["model"]["config"]) == "float32"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "either MODEL"),
        (["MODEL", "--found", "x"], "either MODEL"),
        (["--found", "x", "--unseeded"], "leave them out with --found"),
        (["--found", "x", "--engine-args", "{}"], "leave them out with --found"),
        (["--found", "x", "--kind", "checkpoint"], "parts of --evidence"),
        (["--found", "x", "--evidence", "p.toml"], "wants --kind"),
        (["--found", "x", "--evidence", "p.toml", "--kind", "checkpoint"], "p.toml: cannot be read"),
        (["--found", "nowhere.safetensors"], "nowhere.safetensors: there is no such recording"),
        (["--found", "x", "--profile", "nobody"], "no profile 'nobody'"),
        (["/nowhere/model"], "not a model folder"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(tmp_path, args, sentence, capsys):
    """Exit code 2 and one sentence."""
    assert run(tmp_path, "--reference", REFERENCE, *args) == 2
    assert sentence in capsys.readouterr().err


def test_out_must_be_a_folder(tmp_path, capsys):
    """A file in its place is not overwritten."""
    (tmp_path / "x").write_text("mine")
    assert run(tmp_path / "x", "--reference", REFERENCE, "--found", REFERENCE) == 2
    assert "a file is there" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "mine"


def test_recordings_that_do_not_belong_together(tmp_path, reference, capsys):
    """Damaged, foreign, of other weights, of another dtype, without a floor: each has its own sentence and exit code 2."""
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(REFERENCE.read_bytes()[:-50])
    foreign = PARITY / "model" / "model.safetensors"
    weights = kept(tmp_path, changed(reference, model={"weights_sha256": "0" * 64}), "weights.safetensors")
    for found, sentence in (
        (damaged, "damaged or truncated"),
        (foreign, "not a recording of vllm_compat"),
        (weights, "not of the same model weights"),
        (PARITY / "v0_bfloat16.safetensors", "is bfloat16, the reference float32"),
    ):
        assert run(tmp_path / "out", "--reference", REFERENCE, "--found", found) == 2
        assert sentence in capsys.readouterr().err
    for given in (damaged, foreign):
        assert run(tmp_path / "out", "--reference", given, "--found", REFERENCE) == 2
    bare = kept(tmp_path, recording.Recording({**reference.header, "floor": None}, reference.tensors), "bare.safetensors")
    assert run(tmp_path / "out", "--reference", bare, "--found", REFERENCE) == 2
    assert "--no-floor" in capsys.readouterr().err


def test_a_model_of_other_weights_is_refused(tmp_path, reference, model, capsys):
    """MODEL is compared with the reference's checksum before anything starts."""
    other = kept(tmp_path, changed(reference, model={"weights_sha256": "0" * 64}), "other.safetensors")
    header = {**recording.load(other).header, "floor": reference.header["floor"]}
    recording.save(recording.Recording(header, reference.tensors), other)
    assert run(tmp_path, model, "--reference", other) == 2
    assert "other weights" in capsys.readouterr().err


def test_a_finished_recording_is_reused(tmp_path, reference, model, monkeypatch, capsys):
    """The same command does not start an engine again; another reference, profile or switch does."""
    started = []
    monkeypatch.setattr(validate, "_aside", lambda: None)
    monkeypatch.setattr(record.Job, "run", lambda self: started.append(self.key))
    assert run(tmp_path, model, "--reference", REFERENCE) == 2  # as if interrupted: it gave nothing
    recording.save(changed(reference, {"key": started[0]}), tmp_path / "found.safetensors")
    assert run(tmp_path, model, "--reference", REFERENCE) == 0
    assert len(started) == 1
    assert "already recorded by the same command, reused" in capsys.readouterr().err
    for more, variables in (
        (["--profile", "off"], {}),
        (["--unseeded"], {}),
        (["--engine-args", '{"block_size": 32}'], {}),
        ([], {"VLLM_COMPAT_PROCESSED_LOGPROBS": "0"}),
    ):
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            assert run(tmp_path, model, "--reference", REFERENCE, *more) == 2
            assert "recording anew" in capsys.readouterr().err
    assert len(set(started)) == 5
    (tmp_path / "found.safetensors").write_bytes(b"half")
    assert run(tmp_path, model, "--reference", REFERENCE) == 2
    assert "recording anew" in capsys.readouterr().err


def test_an_engine_that_crashes_is_no_verdict(tmp_path, model, monkeypatch, capsys):
    """Exit code 2, not 1: vLLM's own error is shown, and no band was judged."""

    def crash(self: record.Job) -> None:
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(validate, "_aside", lambda: None)
    monkeypatch.setattr(record.Job, "run", crash)
    assert run(tmp_path, model, "--reference", REFERENCE) == 2
    said = capsys.readouterr().err
    assert "Engine core initialization failed" in said
    assert "the engine gave no answers: RuntimeError" in said


def test_evidence(tmp_path, reference, capsys):
    """An entry goes into the profile's file with what was measured; the same run again replaces it."""
    file = tmp_path / "qwen3.toml"
    file.write_text((profiles.folder() / "qwen3.toml").read_text())
    before = len(profiles.read(file).evidence)
    for note in ("first", "second"):
        args = ("--evidence", file, "--kind", "architecture", "--note", note)
        assert run(tmp_path / "out", "--reference", REFERENCE, "--found", REFERENCE, *args) == 0
    entries = profiles.read(file).evidence
    assert len(entries) == before + 1
    entry = next(one for one in entries if one.note == "second")
    made = reference.header["made_by"]
    assert (entry.engine, entry.vllm, entry.dtype, entry.device) == ("V0", made["vllm"], "float32", "cpu")
    assert (entry.reference, entry.held, entry.failed) == (reference.checksum(), True, ())
    assert set(entry.metrics) == set(validation.RESOLUTION)
    assert entry.command.startswith("vllm-compat validate --found v0_float32.safetensors --reference v0_float32.safetensors")
    assert tomllib.loads(file.read_text())["name"] == "qwen3"


def test_a_failed_validation_is_evidence_too(tmp_path, reference):
    """The entry says that it failed, and which bands."""
    file = tmp_path / "mine.toml"
    file.write_text('format = 1\nname = "mine"\n')
    tensors = {name: table - 1 for name, table in reference.tensors.items() if name.endswith("/logprobs")}
    found = kept(tmp_path, changed(reference, **tensors))
    args = ("--evidence", file, "--kind", "checkpoint")
    assert run(tmp_path, "--reference", REFERENCE, "--found", found, *args) == 1
    entry = profiles.read(file).evidence[-1]
    assert not entry.held
    assert "abs_dlogprob_mean" in entry.failed
    assert entry.metrics["abs_dlogprob_max"] == pytest.approx(1, rel=0.01)


def test_a_trainer_is_no_evidence_about_an_engine(tmp_path, reference, capsys):
    """Nothing is judged or written: the entry was what was wanted."""
    file = tmp_path / "mine.toml"
    file.write_text('format = 1\nname = "mine"\n')
    found = kept(tmp_path, changed(reference, {"side": "trainer", "engine": "transformers", "transformers": "5.0"}))
    assert run(tmp_path, "--reference", REFERENCE, "--found", found, "--evidence", file, "--kind", "checkpoint") == 2
    assert "made by a trainer" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()
    assert profiles.read(file).evidence == ()


def test_a_rounded_reference_without_a_rounding_floor_is_pointed_out(tmp_path, capsys):
    """Otherwise bfloat16's own rounding would be read as a fault."""
    rounded = recording.load(PARITY / "v0_bfloat16.safetensors")
    floor = {**rounded.header["floor"], "rounding": None}
    bare = kept(tmp_path, recording.Recording({**rounded.header, "floor": floor}, rounded.tensors), "bare.safetensors")
    assert run(tmp_path, "--reference", bare, "--found", PARITY / "v0_bfloat16.safetensors") == 0
    assert "has no rounding floor" in capsys.readouterr().out
    assert "has no rounding floor" in Page((tmp_path / "report.html").read_text()).text


def test_what_the_processes_reported_is_shown(tmp_path, reference, capsys):
    """States on the terminal, and in the page each process's own sentence."""
    behaviors = {"fp32_lm_head": {"state": "exercised", "decided_by": "default", "reason": "because"}}
    behaviors["fp32_lm_head"]["seen"] = [["worker", 0, True, "float32 logits"], ["worker", 1, False, "<i>bfloat16</i>"]]
    reported = {
        "profile": "qwen3",
        "proven": False,
        "notes": [],
        "processes": [["worker", 0], ["worker", 1]],
        "behaviors": behaviors,
    }
    found = kept(tmp_path, changed(reference, {"reported": reported}))
    assert run(tmp_path, "--reference", REFERENCE, "--found", found) == 0
    said = capsys.readouterr().out
    assert re.search(r"reported by worker rank 0, worker rank 1 \(NOT PROVEN\):\n +fp32_lm_head +exercised +default", said)
    assert "did not prove" in said
    page = Page((tmp_path / "report.html").read_text())
    assert "worker rank 1: NOT: <i>bfloat16</i>" in page.text
    assert "i" not in [tag for tag, _ in page.tags]


# --- the page -----------------------------------------------------------------------------------------------------


def build(found, reference) -> dict:
    measured = validation.measure(found, reference)
    bands = {name: (band.batch, band.rounding) for name, band in profiles.shipped()["default"].bands.items()}
    return validation_report.build(
        found, reference, measured, validation.judge(measured.metrics, reference, bands), "default", []
    )


@pytest.fixture
def bent(reference) -> recording.Recording:
    """Differences of all sizes, removed tokens on either side, and names that look like markup."""
    rng = np.random.default_rng(1)
    tensors = {}
    for name, table in reference.tensors.items():
        if name.endswith("logprobs"):
            noise = 10 ** rng.uniform(-8, 0.5, table.shape) * rng.choice([-1, 0, 1], table.shape)
            tensors[name] = np.where(rng.random(table.shape) < 0.02, -np.inf, np.minimum(table + noise, 0)).astype("f4")
    return changed(reference, {"command": '<script>alert(1)</script> & "x"'}, **tensors)


def test_the_page_stands_alone(bent, reference):
    """Well-formed, nothing from outside, no script, escaped texts, and small."""
    text = html_report.page(build(bent, reference))
    page = Page(text)
    assert len(text) < 1_000_000
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object", "foreignobject"} & set(tags)
    assert "<script>alert(1)</script>" in page.text  # as text
    assert not re.search(r"https?://|url\(|@import|javascript:", text)
    assert all(not name.startswith(("on", "src", "href")) for _, attrs in page.tags for name in attrs)
    assert tags.count("svg") == 1 + 2 + 3 + 1
    for heading in ("Histogram of Δlogprob", "Drift by position", "Ratio band", "By sampling setting", "All metrics"):
        assert heading in page.text
    for number in re.findall(r'(?:points|d|x|y|x1|x2|y1|y2|width|height)="([^"]*)"', text):
        assert not re.search("nan|inf", number)


def test_removed_tokens_and_shares_are_counted(bent, reference):
    """By hand, from the two recordings."""
    data = build(bent, reference)
    pairs = [(row.found[row.index], row.reference[row.index]) for row in recording.rows(bent, reference)]
    alone = [(a, b) for a, b in pairs if math.isinf(a) != math.isinf(b) and max(a, b) > recording.UNDERFLOW]
    assert data["removed"]["found"] == sum(math.isinf(a) for a, _ in alone) > 0
    assert data["removed"]["reference"] == sum(math.isinf(b) for _, b in alone)
    gaps = np.array([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)], dtype=np.float64)
    assert sum(data["histogram"]["found"]) == len(gaps)
    assert data["ratio"]["found"]["inside_0.9_1.1"] == pytest.approx(((np.exp(-gaps) >= 0.9) & (np.exp(-gaps) <= 1.1)).mean())
    outside = next(one["value"] for one in data["metrics"] if one["name"] == "ratio_outside_0.9_1.1")
    assert data["ratio"]["found"]["inside_0.9_1.1"] == pytest.approx(1 - outside)
    assert data["quantiles"]["found"]["p95"] == pytest.approx(np.quantile(np.abs(gaps), 0.95), rel=1e-5)


def test_positions_stand_with_their_floor(reference):
    """Prefix rows at every position of the continuation, and the reference's own noise beside them."""
    data = build(reference, reference)
    prefix = [one for one in data["positions"] if one["kind"] == "prefix"]
    assert [one["position"] for one in prefix] == list(range(len(reference.experiment["continuations"][0])))
    assert all(one["mean"] == 0 for one in prefix)
    assert max(one["floor"]["p95"] for one in prefix) > 0
    places = [row for row in recording.rows(reference, reference) if row.index >= 0]
    at = [abs(gap) for row, gap in zip(places, reference.tensors["floor"]) if (row.kind, row.position) == ("prefix", 3)]
    assert prefix[3]["floor"]["mean"] == pytest.approx(np.nanmean(at))


def test_the_histogram_puts_a_difference_where_it_is():
    """Sign, decade and zero, by hand."""
    gaps = np.array([0.0, 0.0, 2e-3, -2e-3, -0.5])
    found = validation_report._histogram(gaps, np.zeros(3))
    assert sum(found["found"]) == 5
    side = (len(found["found"]) - 1) // 2
    assert (found["found"][side], found["floor"][side]) == (2, 3)
    k = int(np.searchsorted(found["edges"], 2e-3))
    assert found["found"][side + k] == found["found"][side - k] == 1
    k = int(np.searchsorted(found["edges"], 0.5))
    assert found["found"][side - k] == 1


@pytest.mark.parametrize("gaps", [[], [0.0], [0.0] * 9, [1e-30], [700.0, -800.0], [1e-6, -1e-6], [0.1]])
def test_pictures_of_degenerate_data(gaps):
    """Nothing, only zeros, one value, extremes: a picture without nan, infinity or a place outside the drawing."""
    gaps = np.array(gaps, dtype=np.float64)
    histogram = validation_report._histogram(gaps, gaps[:0])
    assert sum(histogram["found"]) == len(gaps)
    ratio = validation_report._plain({"found": validation_report._ratio(gaps), "floor": validation_report._ratio(gaps[:0])})
    size = float(np.abs(gaps).max(initial=0))
    numbers = {"count": len(gaps), "mean": size, "p95": size}
    positions = [{"kind": "prefix", "position": 0, **numbers, "floor": {"count": 0, "mean": None, "p95": None}}]
    rows = [[0, 0, "prefix", 0, min(-1 + gap, 0.0), -1.0] for gap in gaps] + [
        [0, 0, "prompt", 0, "-inf", "-inf"],
        [0, 0, "prompt", 0, "-inf", -2.0],
    ]
    for svg in (
        pictures.histogram(histogram),
        pictures.ratios(ratio),
        pictures.drift(positions, "prefix"),
        pictures.drift(positions, "sampled"),
        pictures.scatter(rows, probability=False),
        pictures.scatter(rows, probability=True),
        pictures.scatter([], probability=False),
    ):
        Page(svg)
        width, height = (float(one) for one in re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
        points = [pair for text in re.findall(r'points="([^"]*)"', svg) for pair in text.split()]
        places = [pair.split(",") for pair in points] + re.findall(r"M([^ ]+) ([^h]+)h0", svg)
        for x, y in places:
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_the_heat_map_tells_sizes_apart():
    """Darker is farther, text stays readable, and what was not recorded has no color."""
    cell = {"setting": "a <b>", "kind": "sampled", "distributions": 1, "tokens": 5, "mean": 1e-7, "max": 0.5}
    cell |= {"kept_by_one_side": 3, "diverged": 0, "unlisted": 0}
    page = Page(pictures.heat_map([cell]))
    assert "a <b>" in page.text
    assert "+3" in page.text
    shades = [sum(map(int, re.findall(r"\d+", pictures.shade(size).split(";")[0]))) for size in (0, 1e-6, 1e-4, 1e-2, 1.0)]
    assert shades == sorted(shades, reverse=True)
    assert len(set(shades)) == 5
    assert pictures.shade("inf") == pictures.shade(1.0) == pictures.shade(50.0)
    assert "color:#fff" in pictures.shade(1.0)
    assert "color:#111" in pictures.shade(1e-7)


def test_a_large_scatter_is_thinned_the_same_way_every_time():
    """At most MOST_POINTS rows, with the worst among them."""
    rng = np.random.default_rng(2)
    rows = [[0, 0, "prefix", i, float(-rng.random()), -0.5] for i in range(20_000)]
    rows[12_345][4] = "-inf"
    shown = pictures.thinned(rows)
    assert len(shown) <= pictures.MOST_POINTS
    assert rows[12_345] in shown
    assert shown == pictures.thinned(rows)
    assert pictures.thinned(rows[:100]) == rows[:100]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (1.0, "1"),
        (1234.5, "1234"),
        (3.14159, "3.14"),
        (2.5e-7, "2.5e-7"),
        (-8.68, "-8.68"),
        (None, "–"),
        ("-inf", "-inf"),
        (12, "12"),
        (1.2e9, "1.2e9"),
    ],
)
def test_numbers_are_short(value, text):
    """Three digits, and an exponent where it is shorter."""
    assert pictures.number(value) == text


def test_listed_recordings_are_reported(reference):
    """A recording of the most probable tokens: what cannot be compared is counted, not dropped in silence."""
    from test_recording import listed

    small = listed(reference, 12)
    small.header["floor"] = reference.header["floor"]
    small.tensors["floor"] = np.zeros(sum(1 for row in recording.rows(small, small) if row.index >= 0), dtype=np.float32)
    data = build(small, small)
    assert data["held"]
    assert data["found"]["top_n"] == 12
    assert "12 of 300 tokens a distribution" in Page(html_report.page(data)).text
