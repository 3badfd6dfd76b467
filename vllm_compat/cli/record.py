"""``vllm-compat record``: ask the installed vLLM, or a trainer, a fixed experiment and keep what it computed.

Works on any vLLM from 0.8.5 on, V0 included; without ``--profile`` the engine runs as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_compat import bootstrap, experiment, profiles, recording, report, settings, validation, vllm_info
from vllm_compat.errors import RecordingError
from vllm_compat.version import __version__

_CHUNK = 256  # requests between two saves of what there is
_PASSES = {
    "batch": "in one batch",
    "alone": "one at a time, for the batch floor",
    "exact": "in float64, for the rounding floor",
}
_BESIDE = ("VLLM_COMPAT_PROFILE", "VLLM_COMPAT_REPORT_DIR")  # variables that no recording depends on, --profile decides


def add_arguments(commands: Any) -> None:
    """Register the sub-command."""
    parser = commands.add_parser("record", help="record an engine's, or a trainer's, distributions, prompt rows and tokens")
    parser.add_argument("model", type=Path, help="a model folder with config.json, tokenizer and safetensors weights")
    parser.add_argument("--out", type=Path, required=True, metavar="REF", help="the recording to write (.safetensors)")
    parser.add_argument("--engine", choices=("vllm", "trainer"), default="vllm", help="trainer: the model in transformers")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32", help="float64: of a trainer, for "
        "`validate --exact`",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=("float32", "model"), default="float32", help="with --engine trainer: the lm_head's arithmetic"
    )
    parser.add_argument("--profile", default="off", help="off (default): the engine as it is; else as VLLM_COMPAT_PROFILE")
    parser.add_argument("--like", type=Path, metavar="REF", help="ask what this recording was asked, for a comparison")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line (default: four built-in prompts)")
    parser.add_argument("--positions", type=int, default=32, help="tokens of each prompt's continuation (default 32)")
    parser.add_argument(
        "--top-n", type=int, metavar="N", help="keep N tokens of each distribution (default: all up to a vocabulary of "
        f"{experiment.WHOLE_UP_TO}, else 64)",
    )  # fmt: skip
    parser.add_argument("--engine-args", default="{}", metavar="JSON", help="more arguments for vLLM's LLM(...)")
    parser.add_argument(
        "--unseeded", action="store_true", help="give requests no seed (vLLM 0.32 on the CPU stops at a chunked prompt with one)"
    )
    parser.add_argument(
        "--no-floor", action="store_true", help="leave out the second pass, one request at a time: for a recording that is "
        "only compared with a reference",
    )  # fmt: skip
    parser.add_argument("--status", type=Path, help="also write the engine's status as JSON (with --profile)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Record and write; 0 when the file is there."""
    made = Job(args).run()
    if made is None:
        return 2
    print(args.out)
    return 0


class Job:
    """One `record` command, checked: raises RecordingError for what cannot work, before anything is started.

    ``key`` names what is asked of whom: equal keys give equal recordings, up to the maker's own noise.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._vocab, self._prompts, self._engine_args, self._model, self._like = _checked(args)
        self._parts = Parts(args, self._model, self._like)
        self.key = self._parts.key

    def run(self) -> recording.Recording | None:
        """Record and write ``out``; None where it was interrupted: the same command goes on from what is done."""
        args = self.args
        # Importing this package has activated it; what the recording needs is what --profile says.
        bootstrap.deactivate()
        settings.environ()["VLLM_COMPAT_PROFILE"] = args.profile if args.engine == "vllm" else "off"
        bootstrap.activate()
        try:
            made = _record(args, self._vocab, self._prompts, self._engine_args, self._model, self._like, self._parts)
        except KeyboardInterrupt:
            folder = self._parts.folder
            print(f"\ninterrupted; what is done lies in {folder}: the same command goes on from there", file=sys.stderr)
            return None
        recording.save(made, args.out)
        self._parts.remove()
        return made


def _checked(
    args: argparse.Namespace,
) -> tuple[int, Sequence[str], dict[str, Any], dict[str, Any], recording.Recording | None]:
    """The vocabulary's size, the prompts, the engine's arguments, the model's description, and the recording to follow."""
    for name in ("out", "status"):
        given = getattr(args, name)
        if given is not None and not given.parent.is_dir():
            raise RecordingError(f"--{name} {given}: there is no folder {given.parent}")
    weights = sorted(args.model.glob("*.safetensors"))
    if not weights or not (args.model / "config.json").is_file():
        raise RecordingError(f"{args.model}: not a model folder (config.json and *.safetensors are needed)")
    if args.positions < 1 or (args.top_n is not None and args.top_n < 1):
        raise RecordingError("--positions and --top-n want a number of at least 1")
    if args.dtype == "float64" and args.engine != "trainer":
        raise RecordingError("--dtype float64 is a trainer's (--engine trainer): vLLM has no such engine")
    try:
        engine_args = json.loads(args.engine_args)
    except ValueError as error:
        raise RecordingError(f"--engine-args is not JSON: {error}") from None
    if not isinstance(engine_args, dict):
        raise RecordingError(f"--engine-args wants a JSON object, not {args.engine_args}")
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    vocab = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    like = recording.load(args.like) if args.like else None
    if like is not None:
        if args.prompts or args.top_n:
            raise RecordingError("--like brings its own prompts and --top-n: leave those out")
        experiment.check(experiment.Experiment(**like.experiment), like.header, vocab)
    prompts = experiment.PROMPTS
    if args.prompts:
        if not args.prompts.is_file():
            raise RecordingError(f"--prompts {args.prompts}: there is no such file")
        prompts = tuple(line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line)
        if not prompts:
            raise RecordingError(f"--prompts {args.prompts}: the file is empty")
    model = {"name": args.model.resolve().name, "weights_sha256": _checksum(weights), "config": config}
    if like is not None and like.header["model"]["weights_sha256"] != model["weights_sha256"]:
        raise RecordingError(f"--like {args.like}: recorded with other weights than those of {args.model}")
    return vocab, prompts, engine_args, model, like


def _checksum(weights: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for file in weights:
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                found.update(block)
    return found.hexdigest()


class Parts:
    """What an interrupted recording has already: JSON files beside the output, valid for the same command only."""

    def __init__(self, args: argparse.Namespace, model: dict[str, Any], like: recording.Recording | None) -> None:
        self.folder = args.out.with_name(args.out.name + ".parts")
        installed = vllm_info.installed()
        same = [
            model["weights_sha256"], like.checksum() if like else None, installed.version if installed else None, __version__,
            *(str(getattr(args, name)) for name in (
                "engine", "dtype", "head", "profile", "prompts", "positions", "top_n", "engine_args", "unseeded",
            )),
            # what else decides how an engine runs: switches of behaviors, VLLM_USE_V1, …; the profile is above
            sorted((key, value) for key, value in settings.environ().items() if key.startswith("VLLM_") and key not in _BESIDE),
            args.profile if args.profile == "off" else profiles.choose(args.profile, model["config"])[0].behaviors,
        ]  # fmt: skip
        self.key = hashlib.sha256(json.dumps(same).encode()).hexdigest()

    def get(self, name: str) -> Any:
        """What was kept under this name by the same command, or None."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return None  # half written: it is done again
        return found["data"] if found.get("key") == self.key else None

    def put(self, name: str, data: Any) -> None:
        """Keep it."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{name}.json").write_text(json.dumps({"key": self.key, "data": data}), encoding="utf-8")

    def remove(self) -> None:
        """The recording is written: its parts go."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _record(
    args: argparse.Namespace, vocab: int, prompts: Sequence[str], engine_args: dict[str, Any], model: dict[str, Any],
    like: recording.Recording | None, parts: Parts,
) -> recording.Recording:  # fmt: skip
    import numpy as np

    top_n = like.experiment["top_n"] if like else args.top_n or (None if vocab <= experiment.WHOLE_UP_TO else 64)
    top_n = None if top_n is None or top_n >= vocab else top_n
    side = (_engine if args.engine == "vllm" else _trainer)(args, vocab, top_n, engine_args, like)
    if like is not None:
        asked = experiment.Experiment(**{**like.experiment, "top_n": top_n})
    else:
        ids = [side.tokenizer.encode(prompt) for prompt in prompts]
        continuations = parts.get("continuations") or side.maker.continuations(ids, args.positions)
        parts.put("continuations", continuations)
        pairs = [[name, setting] for name, setting in experiment.SETTINGS.items()]
        asked = experiment.Experiment(ids, pairs, continuations, list(experiment.PREFIX_SETTINGS), vocab, top_n)
    together = _answers(side.maker, asked, parts, "batch")
    alone = None if args.no_floor else _answers(side.maker, asked, parts, "alone")
    made_by = {**side.made_by(), **_made_by(args), "key": parts.key}
    header = {"experiment": asked.to_dict(), "model": model, "made_by": made_by, "floor": None}
    made = recording.Recording(header, experiment.assemble(asked, together))
    if alone is None:
        return made
    batch, rounding = validation.measure(recording.Recording(header, experiment.assemble(asked, alone)), made), None
    if like is not None and like.header["made_by"]["dtype"] == "float32" and args.dtype in ("bfloat16", "float16"):
        rounding = validation.measure(made, like).metrics
    elif side.exact is not None:
        wider = _answers(side.exact(made), asked, parts, "exact")
        rounding = validation.measure(made, recording.Recording(header, experiment.assemble(asked, wider))).metrics
    gaps = {row[:4]: gap for row, gap in zip(batch.rows, batch.differences())}
    places = [(r.setting, r.prompt, r.kind, r.position) for r in recording.rows(made, made) if r.index >= 0]
    made.tensors["floor"] = np.array([gaps.get(place, np.nan) for place in places], dtype=np.float32)
    return recording.Recording({**header, "floor": {"batch": batch.metrics, "rounding": rounding}}, made.tensors)


def _answers(
    maker: experiment.Engine | experiment.Trainer, asked: experiment.Experiment, parts: Parts, how: str
) -> dict[str, experiment.Answer]:
    """Every request's answer. The settings are one batch; the rest is saved chunk by chunk."""
    found: dict[str, experiment.Answer] = {}
    todo = experiment.requests(asked)
    first = sum(request.position is None for request in todo)
    chunks = [todo[:first], *(todo[start : start + _CHUNK] for start in range(first, len(todo), _CHUNK))]
    for number, chunk in enumerate(chunks):
        kept = parts.get(f"{how}-{number}")
        answers = [experiment.Answer.from_json(data) for data in kept] if kept else []
        if not kept:
            for answer in maker.answer(chunk, together=how == "batch"):
                answers.append(answer)
                experiment.progress(len(found) + len(answers), len(todo), f"requests {_PASSES[how]}")
            parts.put(f"{how}-{number}", [answer.to_json() for answer in answers])
        found.update((request.key, answer) for request, answer in zip(chunk, answers))
    return found


class _Side:
    """Who answers: its maker, its tokenizer, how it describes itself, and where there is one, a maker in float64 of the same
    model that scores the tokens of a recording."""

    def __init__(self, maker: Any, tokenizer: Any, made_by: Any, exact: Any = None) -> None:
        self.maker, self.tokenizer, self.made_by, self.exact = maker, tokenizer, made_by, exact


def _engine(
    args: argparse.Namespace, vocab: int, top_n: int | None, engine_args: dict[str, Any], like: recording.Recording | None
) -> _Side:
    import torch
    import vllm

    top = vocab if top_n is None else top_n
    given = {
        "model": str(args.model), "dtype": args.dtype, "max_logprobs": top, "max_model_len": 256, "enforce_eager": True,
        **engine_args,
    }  # fmt: skip
    llm = vllm.LLM(**given)
    maker = experiment.Engine(llm, top, not args.unseeded)

    def made_by() -> dict[str, Any]:
        status = [] if args.profile == "off" else [report.status(llm).to_dict()]
        if args.status is not None:
            args.status.write_text(json.dumps(status, indent=1), encoding="utf-8")
        installed = vllm_info.installed()
        engine = "V1" if type(llm.llm_engine).__module__.startswith("vllm.v1") else "V0"
        return {
            "side": "vllm",
            "engine": engine,
            "vllm": installed.version if installed else vllm.__version__,
            "lm_head": validation.head_dtype(args.dtype, status, llm),
            "cached_prompt_tokens": maker.cached,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "profile": args.profile,
            "reported": _reported(status[0]) if status else None,
        }

    return _Side(maker, llm.get_tokenizer(), made_by)


def _reported(status: dict[str, Any]) -> dict[str, Any]:
    """What the engine's processes reported, without pids and hosts: a recording is made to be shared."""
    behaviors = {name: {key: row[key] for key in ("state", "decided_by", "reason")} for name, row in status["behaviors"].items()}
    for name, row in status["behaviors"].items():
        behaviors[name]["seen"] = [[seen["role"], seen["rank"], seen["held"], seen["saw"]] for seen in row["evidence"]]
    processes = [[process["role"], process["rank"]] for process in status["processes"]]
    return {**{key: status[key] for key in ("profile", "proven", "notes")}, "processes": processes, "behaviors": behaviors}


def _trainer(
    args: argparse.Namespace, vocab: int, top_n: int | None, engine_args: dict[str, Any], like: recording.Recording | None
) -> _Side:
    import torch
    import transformers

    from vllm_compat.trainer import fp32_lm_head

    if engine_args:
        raise RecordingError("--engine-args are for vLLM: leave them out with --engine trainer")
    device, top = "cuda" if torch.cuda.is_available() else "cpu", vocab if top_n is None else top_n
    model = experiment.load_model(args.model, args.dtype, device)
    if args.head == "float32" and args.dtype != "float64":
        fp32_lm_head(model)

    def exact(made: recording.Recording) -> experiment.Trainer:
        return experiment.Trainer(experiment.load_model(args.model, "float64", device), vocab, top, made)

    def made_by() -> dict[str, Any]:
        return {
            "side": "trainer",
            "engine": "transformers",
            "transformers": transformers.__version__,
            "lm_head": "float32" if args.head == "float32" and args.dtype != "float64" else args.dtype,
            "device": device,
        }

    maker = experiment.Trainer(model, vocab, top, like)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    return _Side(maker, tokenizer, made_by, exact if args.dtype == "float32" else None)


def _made_by(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    words = ["vllm-compat", "record", args.model.name, "--out", args.out.name, "--engine", args.engine, "--dtype", args.dtype]
    if args.engine == "trainer":
        words += ["--head", args.head]
    else:
        words += ["--profile", args.profile]
    words += ["--like", args.like.name] if args.like else []
    return {
        "dtype": args.dtype, "torch": torch.__version__, "python": platform.python_version(), "vllm_compat": __version__,
        "commit": _commit(), "command": shlex.join(words),
    }  # fmt: skip


def _commit() -> str:
    """The commit of a checkout this runs from, or what there is instead."""
    place = Path(__file__).resolve().parents[2]
    if not (place / ".git").exists():
        return "installed package"
    found = subprocess.run(["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "uncommitted"
