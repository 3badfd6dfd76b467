"""The steps of a reference run: what each runs, what it shows, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

from vllm_compat import profiles, vllm_info
from vllm_compat.gpu_reference.models import LANGUAGE, REHEARSED, SHAPES, SHOWS, config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"  # of a checkout: an installed package has none
# The recipe by hand: vLLM's own options.
RECIPE = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": False, "async_scheduling": False}
HEAD = {"hf_overrides": {"head_dtype": "float32"}}
HEAD_SINCE = "0.26.0"  # honors head_dtype
INVARIANT = {"VLLM_BATCH_INVARIANT": "1"}
# What vLLM says of itself in its log: regular expression -> what ran.
RAN = {
    r"Using V2 [Mm]odel [Rr]unner": "Model Runner V2",
    r"Using FlashInfer for top-p": "FlashInfer's sampler",
    r"Graph capturing finished": "CUDA graphs",
    r"torch\.compile (?:took|takes)": "torch.compile",
    r"Using (\S+) (?:attention )?backend": "attention by {}",
}
CACHE_HITS = "prefix cache hits"  # by the recording: how many prompt tokens came from it


@dataclass(frozen=True)
class Step:
    """``words``: what follows `python`. ``after``: steps that have to be done before. ``judged``: a failed band is this
    run's failure, and not what the step is there to show. ``cuda``: what needs a card even in name; ``cards``: how many;
    ``since``: the first vLLM release that has it. ``expects``: of `RAN`'s values, or `CACHE_HITS`: what has to have run for
    this to show anything. ``resumes``: goes on where it was interrupted; the others begin again."""

    name: str
    words: Sequence[str]
    shows: str
    shows_not: str
    after: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    vllm: bool = False
    judged: bool = False
    cuda: bool = False
    cards: int = 1
    expects: str | None = None
    resumes: bool = False
    since: str = "0.8.5"
    out: Path | None = None  # the folder with report.json


@dataclass(frozen=True)
class Choice:
    """What was asked for on the command line."""

    out: Path
    device: str
    models: Sequence[str]
    train_seconds: float
    kept: Path | None = None  # the folder of profiles that gets the evidence; None: copies in out/profiles
    sources: Path | None = None  # a folder with an unpacked `vllm`

    @property
    def profiles(self) -> Path:
        """The folder of profiles that gets the evidence."""
        return self.kept or self.out / "profiles"


def listed(choice: Choice) -> list[Step]:
    """All steps, in order. Nothing is run or imported."""
    found: list[Step] = []
    for name in choice.models:
        found += _model(choice, name)
    cuda = choice.device == "cuda"
    only = ["--skip-cpu"] if cuda else ["--skip-cuda", "--rounds", "1"]
    found.append(
        Step("head", [str(BENCHMARKS / "lm_head.py"), *only], "time, bytes and error of every way to a float32 head; whether a "
             "row depends on its batch", "anything of an engine")
    )  # fmt: skip
    found.append(_sampler(choice, "sampler"))
    if choice.sources is not None:
        found.append(_sampler(choice, "sampler-sources", choice.sources))
    wide = ["--hidden", "1024"] if cuda else ["--rounds", "5", "--pairs", "1"]
    for name, transport, shows in (
        ("weight-update", "norms", "the stall of an update beside vLLM's pause and resume"),
        ("weight-update-ipc", "ipc", "the same where all weights come by CUDA IPC (shared memory on a CPU)"),
        ("weight-update-group", "group", "the stall where all weights come by NCCL from a second card (Gloo on a CPU)"),
    ):
        words = [str(BENCHMARKS / "weight_update.py"), "--transport", transport, *wide]
        found.append(
            Step(name, words, shows, "a large model; several machines", vllm=True, since="0.17.0",
                 cards=2 if transport == "group" else 1)
        )  # fmt: skip
    return found


def _sampler(choice: Choice, name: str, sources: Path | None = None) -> Step:
    folder = choice.out / name
    words = ["-m", "vllm_compat.gpu_reference.sampler", str(folder), "--device", choice.device]
    return Step(
        name, words, "a release's sampler with what we replace in it, on this device's tensors, against V0's formula",
        "prompt rows; an engine", environment={"PYTHONPATH": str(sources)} if sources else {}, vllm=sources is None, judged=True,
        out=folder,
    )  # fmt: skip


def _model(choice: Choice, name: str) -> list[Step]:
    out, kind = choice.out, "language" if name == "language" else "seeded"
    model, shows_not = out / "models" / name, SHOWS[kind]
    references = {one: out / name / f"{one}.safetensors" for one in ("float32", "head-float32", "head-model")}
    compat, cuda = ["-m", "vllm_compat"], choice.device == "cuda"
    positions = "32" if cuda else "4"
    make = ["-m", "vllm_compat.gpu_reference.models", name, str(model), "--device", choice.device]
    made = Step(f"model:{name}", [*make, "--train-seconds", str(choice.train_seconds)], SHOWS[kind].partition(".")[0],
                "no measurement")  # fmt: skip

    def record(one: str, *more: str) -> Step:
        words = [*compat, "record", str(model), "--out", str(references[one]), "--engine", "trainer", *more]
        after = [made.name] if one == "float32" else [f"trainer-float32:{name}"]
        return Step(
            f"trainer-{one}:{name}", words, f"the trainer's logprobs, {one}, and its own noise", shows_not, after, resumes=True
        )

    asked = ["--positions", positions, "--top-n", "64"]
    like = ["--dtype", "bfloat16", "--like", str(references["float32"])]
    steps = [
        made,
        record("float32", *asked, "--no-floor"),
        record("head-float32", *like, "--head", "float32"),
        record("head-model", *like, "--head", "model"),
    ]

    memory = {"gpu_memory_utilization": 0.85 if cuda else 0.3}

    def validate(
        arm: str, shows: str, profile: str, engine_args: dict[str, object], reference: str = "head-float32",
        environment: dict[str, str] | None = None, *, cuda: bool = True, since: str = "0.8.5", expects: str | None = None,
    ) -> Step:  # fmt: skip
        folder = out / name / arm
        given = {**memory, **engine_args}
        words = [*compat, "validate", str(model), "--reference", str(references[reference]), "--out", str(folder)]
        words += ["--profile", profile, "--engine-args", json.dumps(given), "--unseeded"]
        if profile == "auto" and arm == "vllm_compat":
            kept = choice.profiles / f"{profile_name(name, choice.device)}.toml"
            words += ["--evidence", str(kept), "--kind", "architecture", "--note", SHOWS[kind]]
        return Step(f"{arm}:{name}", words, shows, shows_not, [f"trainer-{reference}:{name}"], environment or {}, vllm=True,
                    judged=profile == "auto", cuda=cuda, since=since, expects=expects, resumes=True, out=folder)  # fmt: skip

    def replayed(arm: str, shows: str, environment: dict[str, str], *, cuda: bool = False, since: str = "0.8.5") -> Step:
        folder = out / name / arm
        words = ["-m", "vllm_compat.gpu_reference.invariance", str(model), str(folder), "--engine-args", json.dumps(memory)]
        words += ["--exact"] if environment else []
        return Step(f"{arm}:{name}", words, shows, shows_not, [made.name], environment, vllm=True, cuda=cuda, since=since,
                    out=folder)  # fmt: skip

    def speed(arm: str, shows: str, environment: dict[str, str], *, cuda_only: bool = False) -> Step:
        large = cuda and name in SHAPES and SHAPES[name].parameters > 2e9
        args = json.dumps({**memory, "enforce_eager": not cuda})
        words = [str(BENCHMARKS / "throughput.py"), "1" if large or not cuda else "2", "--model", str(model)]
        return Step(f"{arm}:{name}", [*words, "--engine-args", args], f"decode throughput and start{shows}: as it comes, with "
                    "the recipe, with the import", shows_not, [made.name], environment, vllm=True, cuda=cuda_only,
                    since=HEAD_SINCE)  # fmt: skip

    installed = vllm_info.installed()
    has_head = installed is None or installed.release >= Version(HEAD_SINCE)
    recipe: dict[str, object] = {**RECIPE, **(HEAD if has_head else {})}
    against = "head-float32" if has_head else "head-model"
    by_hand = "vLLM's own options by hand" + ("" if has_head else f", without a float32 head, which {HEAD_SINCE} brought")

    mine = "vllm_compat, every band against the trainer"
    steps += [
        validate("naive", "vLLM as it comes, both heads the model's: its bands are expected to fail", "off", {}, "head-model",
                 cuda=False),
        validate("naive-flashinfer", "vLLM as it comes, FlashInfer's sampler asked for", "off", {}, "head-model",
                 {"VLLM_USE_FLASHINFER_SAMPLER": "1"}, expects="FlashInfer's sampler"),
        validate("recipe", by_hand, "off", recipe, against, cuda=False, since="0.11.0"),
        validate("recipe-v2", f"{by_hand}, on Model Runner V2", "off", recipe, against, {"VLLM_USE_V2_MODEL_RUNNER": "1"},
                 since="0.22.0", expects="Model Runner V2"),
        validate("vllm_compat", mine, "auto", {}, cuda=False),
        validate("graphs", f"{mine}, torch.compile and CUDA graphs on", "auto", {"enforce_eager": False},
                 expects="CUDA graphs"),
        validate("flashinfer", f"{mine}, FlashInfer's sampler asked for (vLLM has none for processed logprobs)", "auto", {},
                 environment={"VLLM_USE_FLASHINFER_SAMPLER": "1"}),
        validate("no-flashinfer", f"{mine}, FlashInfer's sampler off", "auto", {},
                 environment={"VLLM_USE_FLASHINFER_SAMPLER": "0"}),
        # blocks smaller than the longer prompts, so that there is something to hit
        validate("prefix-caching", f"{mine}, but prefix caching on", "auto",
                 {"enable_prefix_caching": True, "block_size": 16 if cuda else 32}, cuda=False, expects=CACHE_HITS),
        validate("async", f"{mine}, but async scheduling on", "auto", {"async_scheduling": True}, since="0.14.0"),
        validate("batch-invariant", f"{mine}, VLLM_BATCH_INVARIANT=1", "auto", {}, environment=INVARIANT, since="0.19.0"),
        replayed("replay", "rollouts scored again as prompts by the same engine: what decode, prefill and the batch move", {}),
        replayed("replay-invariant", "the same with VLLM_BATCH_INVARIANT=1: KL to a trainer with these kernels, aim exactly 0",
                 INVARIANT, cuda=True, since="0.19.0"),
        speed("throughput", "", {}),
        speed("throughput-invariant", " with VLLM_BATCH_INVARIANT=1", INVARIANT, cuda_only=True),
    ]  # fmt: skip
    return steps


def profile_name(model: str, device: str) -> str:
    """The shipped profile that this model's architecture matches."""
    shape = LANGUAGE[device] if model == "language" else {**SHAPES, **REHEARSED}[model]
    return profiles.choose("auto", config(shape))[0].name
