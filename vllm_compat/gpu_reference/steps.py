"""The steps of a reference run: what each runs, what it shows, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_compat import profiles
from vllm_compat.gpu_reference.models import LANGUAGE, REHEARSED, SHAPES, SHOWS, config

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"  # of a checkout: an installed package has none
# The recipe by hand: vLLM's own options. `head_dtype` is honored from vLLM 0.26.0 on.
RECIPE = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": False, "async_scheduling": False}
HEAD = {"hf_overrides": {"head_dtype": "float32"}}


@dataclass(frozen=True)
class Step:
    """``words``: what follows `python`. ``after``: steps that have to be done before. ``judged``: a failed band is this
    run's failure, and not what the step is there to show. ``cuda``: what needs a card even in name; ``since``: the first vLLM
    release that has it."""

    name: str
    words: Sequence[str]
    shows: str
    shows_not: str
    after: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    vllm: bool = False
    judged: bool = False
    cuda: bool = False
    since: str = "0.8.5"
    out: Path | None = None  # the folder with report.json


@dataclass(frozen=True)
class Choice:
    """What was asked for on the command line."""

    out: Path
    device: str
    models: Sequence[str]
    train_seconds: float


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
    found.append(
        Step("weight-update", [str(BENCHMARKS / "weight_update.py")], "the stall of an update beside vLLM's pause and resume",
             "NCCL and CUDA IPC between two cards; a large model", vllm=True, since="0.17.0")
    )  # fmt: skip
    found.append(
        Step("throughput", [str(BENCHMARKS / "throughput.py")], "decode throughput and start, with the import and by hand",
             "a large model: the model is tiny, so this is the overhead at its worst", vllm=True, since="0.26.0")
    )  # fmt: skip
    return found


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
        return Step(f"trainer-{one}:{name}", words, f"the trainer's logprobs, {one}, and its own noise", shows_not, after)

    asked = ["--positions", positions, "--top-n", "64"]
    like = ["--dtype", "bfloat16", "--like", str(references["float32"])]
    steps = [
        made,
        record("float32", *asked, "--no-floor"),
        record("head-float32", *like, "--head", "float32"),
        record("head-model", *like, "--head", "model"),
    ]

    def validate(
        arm: str, shows: str, profile: str, engine_args: dict[str, object], reference: str = "head-float32",
        environment: dict[str, str] | None = None, *, cuda: bool = True, since: str = "0.8.5",
    ) -> Step:  # fmt: skip
        folder = out / name / arm
        given = {"gpu_memory_utilization": 0.85 if choice.device == "cuda" else 0.3, **engine_args}
        words = [*compat, "validate", str(model), "--reference", str(references[reference]), "--out", str(folder)]
        words += ["--profile", profile, "--engine-args", json.dumps(given), "--unseeded"]
        if profile == "auto" and arm == "vllm_compat":
            kept = out / "profiles" / f"{profile_name(name, choice.device)}.toml"
            words += ["--evidence", str(kept), "--kind", "architecture", "--note", SHOWS[kind]]
        return Step(f"{arm}:{name}", words, shows, shows_not, [f"trainer-{reference}:{name}"], environment or {}, vllm=True,
                    judged=profile == "auto", cuda=cuda, since=since, out=folder)  # fmt: skip

    mine = "vllm_compat, every band against the trainer"
    steps += [
        validate("naive", "vLLM as it comes, both heads the model's: its bands are expected to fail", "off", {}, "head-model",
                 cuda=False),
        validate("recipe", "vLLM's own options by hand", "off", {**RECIPE, **HEAD}, cuda=False, since="0.26.0"),
        validate("recipe-v2", "the same on Model Runner V2", "off", {**RECIPE, **HEAD},
                 environment={"VLLM_USE_V2_MODEL_RUNNER": "1"}, since="0.26.0"),
        validate("vllm_compat", mine, "auto", {}, cuda=False),
        validate("graphs", f"{mine}, torch.compile and CUDA graphs on", "auto", {"enforce_eager": False}),
        validate("flashinfer", f"{mine}, FlashInfer's sampler asked for", "auto", {},
                 environment={"VLLM_USE_FLASHINFER_SAMPLER": "1"}),
        validate("no-flashinfer", f"{mine}, FlashInfer's sampler off", "auto", {},
                 environment={"VLLM_USE_FLASHINFER_SAMPLER": "0"}),
        validate("prefix-caching", f"{mine}, but prefix caching on", "auto", {"enable_prefix_caching": True}),
        validate("async", f"{mine}, but async scheduling on", "auto", {"async_scheduling": True}, since="0.14.0"),
    ]  # fmt: skip
    return steps


def profile_name(model: str, device: str) -> str:
    """The shipped profile that this model's architecture matches."""
    shape = LANGUAGE[device] if model == "language" else {**SHAPES, **REHEARSED}[model]
    return profiles.choose("auto", config(shape))[0].name
