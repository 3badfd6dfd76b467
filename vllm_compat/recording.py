"""
Rollouts on disk: what an engine, or a trainer, computed for one experiment, and how far another is from it.

Container: one safetensors file. ``__metadata__`` holds ``format`` = "vllm_compat.recording", ``version`` = "2",
``header`` (JSON) and ``sha256`` (of the header and all tensors, by sorted name: name, dtype, shape, bytes). The header:

    experiment  what was asked: see `vllm_compat.experiment.Experiment`
    model       name, sha256 of the weights, config.json
    made_by     side (vllm or trainer), engine (V0, V1 or transformers), versions, device, dtype, lm_head dtype, command,
                what an engine's processes reported, key (of the command and all it depends on)
    floor       batch, rounding: the maker's own noise, as metrics (see `vllm_compat.validation`); rounding may be
                null, and so may both (--no-floor)

Tensors, for setting s and prompt p (indices into the experiment's lists; int32 tokens, float32 logprobs in nats):

    s/p/tokens            [steps]         sampled token ids
    s/p/logprobs          [steps, n]      processed distribution of each step
    s/p/cumulative        [1], float64    the maker's own cumulative_logprob
    s/p/prompt_logprobs   [len - 1, n]    prompt rows 1 … len - 1 (only for the first `PROMPT_ROWS` prompts)
    s/p/prefix_logprobs   [positions, n]  the first sampled row after the prompt and 0, 1, 2, … tokens of its continuation
                                          (only for the experiment's prefix settings)
    floor                 [rows]          logprob of each row's token at batch size 1 minus that in the batch: each of
                                          `rows` of this recording with itself; nan where the two diverged

A table of logprobs [rows, n] is whole (n is the vocabulary's size, filtered tokens are -inf), or the most probable tokens
and the row's own: then ``…/ids`` [rows, n] names them (-1: none) and ``…/tail`` [rows] is the log of the probability of all
others, at least 2^-24 (-inf: there are none).

Prefix rows stand on the same tokens for everybody: teacher-forced. Of the sampled rows, steps after the first are
comparable as long as the tokens before them agree: settings with several steps are greedy or near it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_compat.errors import RecordingError

FORMAT, VERSION = "vllm_compat.recording", "2"
_LEAST_TAIL = 2.0**-24  # a sum of float32 probabilities does not say less of what is missing in it
KINDS = ("sampled", "prompt", "prefix")
_TABLES = {"sampled": "logprobs", "prompt": "prompt_logprobs", "prefix": "prefix_logprobs"}


@dataclass(slots=True)
class Recording:
    """A recording in memory. ``tensors`` are numpy arrays by name, as in the module's docstring."""

    header: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def experiment(self) -> dict[str, Any]:
        """What was asked, as JSON data."""
        found: dict[str, Any] = self.header["experiment"]
        return found

    @property
    def settings(self) -> list[str]:
        """The names of the settings, in order."""
        return [name for name, _ in self.experiment["settings"]]

    @property
    def prompts(self) -> list[list[int]]:
        """The prompts as token ids, in order."""
        found: list[list[int]] = self.experiment["prompts"]
        return found

    def get(self, setting: int, prompt: int, what: str) -> Any:
        """A tensor by setting and prompt index, or None where it was not recorded."""
        return self.tensors.get(f"{setting}/{prompt}/{what}")

    def checksum(self) -> str:
        """sha256 over header and tensors: names this recording in an evidence entry."""
        return _digest(json.dumps(self.header, sort_keys=True), self.tensors)


@dataclass(slots=True)
class Row:
    """One distribution of both recordings: ``found`` and ``reference`` [tokens] are logprobs of the same tokens.

    ``token`` is the reference's token there, ``index`` its place in both arrays, -1 where one side does not list it.
    ``position`` counts from the start of the kind's rows. ``unlisted`` tokens are in one side's list only, and the other's
    list does not say what they have.
    """

    setting: int
    prompt: int
    kind: str
    position: int
    token: int
    index: int
    found: Any
    reference: Any
    unlisted: int = 0


def _digest(header: str, tensors: dict[str, Any]) -> str:
    found = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        array = tensors[name]
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def save(recording: Recording, file: Path) -> None:
    """Write a recording; the file appears whole or not at all."""
    from safetensors.numpy import save_file

    header = json.dumps(recording.header, sort_keys=True)
    metadata = {"format": FORMAT, "version": VERSION, "sha256": recording.checksum(), "header": header}
    draft = file.with_name(file.name + ".partial")
    save_file(recording.tensors, str(draft), metadata=metadata)
    draft.replace(file)


def load(file: Path) -> Recording:
    """Read a recording. Raises RecordingError where it is missing, truncated, foreign, of another version or damaged."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise RecordingError(
            "reading a recording needs safetensors, which comes with vLLM: pip install safetensors numpy"
        ) from None
    if not file.is_file():
        raise RecordingError(f"{file}: there is no such recording")
    try:
        with safe_open(str(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RecordingError(f"{file}: a safetensors file, but not a recording of vllm_compat")
            if metadata.get("version") != VERSION:
                raise RecordingError(
                    f"{file}: recording format {metadata.get('version')}; this vllm_compat reads {VERSION}: record it again"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise RecordingError(f"{file}: damaged or truncated: {error}; record it again or fetch it again") from None
    if _digest(metadata.get("header", ""), tensors) != metadata.get("sha256"):
        raise RecordingError(f"{file}: its checksum does not match: the file is damaged; fetch or record it again")
    return Recording(json.loads(metadata["header"]), tensors)


# --- tables of logprobs -------------------------------------------------------------------------------------------


def put(tensors: dict[str, Any], name: str, rows: Sequence[Mapping[int, float]], vocab: int, top_n: int | None) -> None:
    """Store distributions under ``name``: whole, or the listed tokens where ``top_n`` is not None.

    rows: one {token id: logprob} a row. With ``top_n``, the row's own token may come in addition, and -inf entries say
    that nothing else is left.
    """
    import numpy as np

    if top_n is None:
        table: Any = np.full((len(rows), vocab), -np.inf, dtype=np.float32)
        for row, found in zip(rows, table):
            found[list(row)] = list(row.values())
        tensors[name] = table
        return
    ids: Any = np.full((len(rows), top_n + 1), -1, dtype=np.int32)
    table = np.full((len(rows), top_n + 1), -np.inf, dtype=np.float32)
    tail: Any = np.full(len(rows), -np.inf, dtype=np.float32)
    for i, row in enumerate(rows):
        best = sorted(row.items(), key=lambda item: -item[1])
        if len(best) > top_n + 1:
            raise RecordingError(f"{name}: row {i} lists {len(best)} tokens, and {top_n + 1} were asked for")
        ids[i, : len(best)] = [token for token, _ in best]
        table[i, : len(best)] = [logprob for _, logprob in best]
        finite = [logprob for _, logprob in best if math.isfinite(logprob)]
        # Fewer finite entries than asked for: the filters left no more.
        if len(finite) >= top_n and len(finite) < vocab:
            tail[i] = math.log(max(-math.expm1(_logsum(finite)), _LEAST_TAIL))
    tensors[name], tensors[f"{name}/ids"], tensors[f"{name}/tail"] = table, ids, tail


def _logsum(logprobs: Sequence[float]) -> float:
    top = max(logprobs)
    return top + math.log(math.fsum(math.exp(value - top) for value in logprobs))


def _aligned(found: Recording, reference: Recording, name: str, row: int, own: int) -> tuple[Any, Any, int, int]:
    """A row of both on the same tokens: (found, reference, index of ``own`` or -1, unlisted)."""
    import numpy as np

    a, b = found.tensors[name][row], reference.tensors[name][row]
    a_ids, b_ids = found.tensors.get(f"{name}/ids"), reference.tensors.get(f"{name}/ids")
    if a_ids is None and b_ids is None:
        return a, b, own, 0
    ours = dict(enumerate(a.tolist())) if a_ids is None else _listed(a_ids[row], a)
    theirs = dict(enumerate(b.tolist())) if b_ids is None else _listed(b_ids[row], b)
    # A list that holds everything says -inf of what it does not name.
    ours_whole = a_ids is None or bool(np.isneginf(found.tensors[f"{name}/tail"][row]))
    theirs_whole = b_ids is None or bool(np.isneginf(reference.tensors[f"{name}/tail"][row]))
    tokens = [
        token
        for token in sorted(ours.keys() | theirs.keys())
        if (token in ours or ours_whole) and (token in theirs or theirs_whole)
    ]
    unlisted = len(theirs.keys() - set(tokens))
    pair = [np.array([side.get(token, -np.inf) for token in tokens], dtype=np.float32) for side in (ours, theirs)]
    return pair[0], pair[1], tokens.index(own) if own in tokens else -1, unlisted


def _listed(ids: Any, logprobs: Any) -> dict[int, float]:
    return {int(token): float(logprob) for token, logprob in zip(ids, logprobs) if token >= 0}


# --- one against another ------------------------------------------------------------------------------------------

# Below this a float32 probability underflows. V0's top-p then drops the token, for every row of a batch in which any
# row uses top-p: whether it is kept says something about the neighbors and nothing about the distribution.
UNDERFLOW = -80.0


@dataclass(slots=True)
class Difference:
    """|logprob - reference| in nats, over the tokens both distributions keep. ``support`` counts tokens that only one of
    them keeps; ``diverged`` counts steps left out because an earlier token already differs; ``unlisted`` counts tokens that
    only one side's list names."""

    max: float = 0.0
    total: float = 0.0
    count: int = 0
    support: int = 0
    rows: int = 0
    diverged: int = 0
    unlisted: int = 0

    @property
    def mean(self) -> float:
        """Mean over the tokens both keep; nan where nothing was compared."""
        return self.total / self.count if self.count else math.nan

    def add(self, found: Any, reference: Any) -> None:
        """Compare distributions, float arrays [tokens]."""
        import numpy as np

        kept = np.isfinite(found) & np.isfinite(reference)
        gap = np.abs(found[kept].astype(np.float64) - reference[kept])
        lonely = np.isfinite(found) != np.isfinite(reference)
        self.total += float(gap.sum())
        self.count += int(kept.sum())
        self.support += int((lonely & (np.maximum(found, reference) > UNDERFLOW)).sum())
        self.rows += 1
        self.max = max(self.max, float(gap.max(initial=0.0)))


def same_experiment(found: Recording, reference: Recording) -> None:
    """Raises RecordingError where two recordings are not of the same requests to the same weights."""
    for key, value in reference.experiment.items():
        if key != "top_n" and found.experiment.get(key) != value:
            raise RecordingError(f"the two recordings do not hold the same {key}: record again with --like the reference")
    if found.header["model"]["weights_sha256"] != reference.header["model"]["weights_sha256"]:
        raise RecordingError("the two recordings are not of the same model weights")


def comparable_steps(found: Recording, reference: Recording, setting: int, prompt: int) -> int:
    """How many of the reference's sampled steps stand on the same tokens in both: up to the first that differs, and it."""
    ours, theirs = found.get(setting, prompt, "tokens").tolist(), reference.get(setting, prompt, "tokens").tolist()
    count = min(len(ours), len(theirs))
    while count > 1 and ours[: count - 1] != theirs[: count - 1]:
        count -= 1
    return count


def rows(found: Recording, reference: Recording) -> Iterator[Row]:
    """Every distribution that both hold on the same tokens."""
    for s in range(len(reference.settings)):
        for p, prompt in enumerate(reference.prompts):
            own = {
                "sampled": reference.get(s, p, "tokens").tolist()[: comparable_steps(found, reference, s, p)],
                "prompt": prompt[1:],
                "prefix": reference.experiment["continuations"][p],
            }
            for kind in KINDS:
                name = f"{s}/{p}/{_TABLES[kind]}"
                for position, token in enumerate(own[kind] if name in reference.tensors else ()):
                    a, b, index, unlisted = _aligned(found, reference, name, position, token)
                    yield Row(s, p, kind, position, token, index, a, b, unlisted)


def compare(found: Recording, reference: Recording) -> dict[str, dict[str, Difference]]:
    """Setting -> kind of row (`KINDS`) -> Difference. Raises RecordingError where the two are not of the same experiment."""
    same_experiment(found, reference)
    names = reference.settings
    result = {name: {kind: Difference() for kind in KINDS} for name in names}
    for row in rows(found, reference):
        gap = result[names[row.setting]][row.kind]
        gap.add(row.found, row.reference)
        gap.unlisted += row.unlisted
    for s, name in enumerate(names):
        for p in range(len(reference.prompts)):
            result[name]["sampled"].diverged += len(reference.get(s, p, "tokens")) - comparable_steps(found, reference, s, p)
    return result
