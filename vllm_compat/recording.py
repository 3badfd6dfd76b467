"""
Rollouts on disk: what an engine computed for fixed prompts under fixed settings, and how far another is from it.

Container: one safetensors file. ``__metadata__`` holds ``format`` = "vllm_compat.recording", ``version`` = "1",
``sha256`` (of all tensors, by sorted name: name, dtype, shape, bytes) and ``header`` (JSON: ``model``, ``prompts`` as
token ids, ``settings`` as pairs of a name and vLLM SamplingParams arguments, ``made_by`` with versions and command).
Tensors, for setting s and prompt p (indices into the header's lists):

    s/p/tokens            int32   [steps]          sampled token ids
    s/p/logprobs          float32 [steps, vocab]   processed distribution of each step; filtered tokens are -inf
    s/p/cumulative        float64 [1]              the engine's own cumulative_logprob
    s/p/prompt_logprobs   float32 [len - 1, vocab] prompt rows 1 … len - 1 (only for the first `prompt_rows` prompts)

Steps after the first are comparable as long as the tokens before them agree: settings with several steps are greedy
or near it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_compat.errors import RecordingError

FORMAT, VERSION = "vllm_compat.recording", "1"

# The second and fourth are longer than a KV block of 32 bytes-as-tokens, so that chunks and cache hits occur.
PROMPTS = (
    "The answer is",
    "def add(a, b):\n    return a + b\n\nadd(1, 2)",
    "3 + 4 * 2 =",
    "Once upon a time there was a small model that",
)
PROMPT_ROWS = 2  # how many of the prompts also have their own rows scored

# Settings: name -> vLLM SamplingParams arguments. Token ids are below 256, so that they are bytes in the tiny model.
_BIAS = {"32": 2.0, "101": -1.5, "116": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 8},
    "T=1": {},
    "T=0.7": {"temperature": 0.7},
    "T=1.3": {"temperature": 1.3},
    "top-p 0.9": {"top_p": 0.9},
    "T=0.7 top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top-k 20": {"top_k": 20},
    "T=0.7 top-k 10": {"temperature": 0.7, "top_k": 10},
    "min-p 0.05": {"min_p": 0.05},
    "T=1.3 min-p 0.1": {"temperature": 1.3, "min_p": 0.1},
    "repetition 1.3": {"repetition_penalty": 1.3},
    "T=0.7 top-k 30 top-p 0.8": {"temperature": 0.7, "top_k": 30, "top_p": 0.8},
    "top-p 0.8 min-p 0.05": {"top_p": 0.8, "min_p": 0.05},
    "T=1.5 top-k 40 top-p 0.85 min-p 0.03": {"temperature": 1.5, "top_k": 40, "top_p": 0.85, "min_p": 0.03},
    "T=0.7 top-p 0.9 repetition 1.2": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2},
    "T=0.9 logit_bias": {"temperature": 0.9, "logit_bias": _BIAS},
    "allowed_token_ids": {"allowed_token_ids": list(range(97, 123))},
    "T=1 min_tokens": {"min_tokens": 1},
    "greedy presence 0.8 frequency 0.4": {
        "temperature": 0.0, "presence_penalty": 0.8, "frequency_penalty": 0.4, "max_tokens": 8,
    },
    "T=0.1 presence 0.8 frequency 0.4": {
        "temperature": 0.1, "presence_penalty": 0.8, "frequency_penalty": 0.4, "max_tokens": 6,
    },
    "everything": {
        "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1, "presence_penalty": 0.3,
        "frequency_penalty": 0.2, "logit_bias": _BIAS, "max_tokens": 3,
    },
}  # fmt: skip


@dataclass(slots=True)
class Recording:
    """A recording in memory. ``tensors`` are numpy arrays by name, as in the module's docstring."""

    header: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def settings(self) -> list[str]:
        """The names of the settings, in order."""
        return [name for name, _ in self.header["settings"]]

    def get(self, setting: int, prompt: int, what: str) -> Any:
        """A tensor by setting and prompt index, or None where it was not recorded."""
        return self.tensors.get(f"{setting}/{prompt}/{what}")


def _digest(tensors: dict[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def save(recording: Recording, file: Path) -> None:
    """Write a recording; the file appears whole or not at all."""
    from safetensors.numpy import save_file

    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "sha256": _digest(recording.tensors),
        "header": json.dumps(recording.header, sort_keys=True),
    }
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
            if metadata["version"] != VERSION:
                raise RecordingError(f"{file}: recording format {metadata['version']}; this vllm_compat reads {VERSION}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise RecordingError(f"{file}: damaged or truncated: {error}; record it again or fetch it again") from None
    if _digest(tensors) != metadata["sha256"]:
        raise RecordingError(f"{file}: its checksum does not match: the file is damaged; fetch or record it again")
    return Recording(json.loads(metadata["header"]), tensors)


# Below this a float32 probability underflows. V0's top-p then drops the token, for every row of a batch in which any
# row uses top-p: whether it is kept says something about the neighbors and nothing about the distribution.
_UNDERFLOW = -80.0


@dataclass(slots=True)
class Difference:
    """|logprob - reference| in nats, over the tokens both distributions keep. ``support`` counts tokens that only one of
    them keeps; ``diverged`` counts steps left out because an earlier token already differs."""

    max: float = 0.0
    total: float = 0.0
    count: int = 0
    support: int = 0
    rows: int = 0
    diverged: int = 0

    @property
    def mean(self) -> float:
        """Mean over the tokens both keep; nan where nothing was compared."""
        return self.total / self.count if self.count else math.nan

    def add(self, found: Any, reference: Any) -> None:
        """Compare distributions, float arrays [vocab]."""
        import numpy as np

        kept = np.isfinite(found) & np.isfinite(reference)
        gap = np.abs(found[kept].astype(np.float64) - reference[kept])
        lonely = np.isfinite(found) != np.isfinite(reference)
        self.total += float(gap.sum())
        self.count += int(kept.sum())
        self.support += int((lonely & (np.maximum(found, reference) > _UNDERFLOW)).sum())
        self.rows += 1
        self.max = max(self.max, float(gap.max(initial=0.0)))


def compare(found: Recording, reference: Recording) -> dict[str, tuple[Difference, Difference]]:
    """Setting -> (sampled rows, prompt rows). Raises RecordingError where the two are not of the same experiment."""
    for key in ("prompts", "settings"):
        if found.header[key] != reference.header[key]:
            raise RecordingError(f"the two recordings do not hold the same {key}: record again with the reference's")
    if found.header["model"]["weights_sha256"] != reference.header["model"]["weights_sha256"]:
        raise RecordingError("the two recordings are not of the same model weights")
    result = {}
    for s, name in enumerate(reference.settings):
        sampled, prompt = Difference(), Difference()
        for p in range(len(reference.header["prompts"])):
            ours, theirs = found.get(s, p, "tokens"), reference.get(s, p, "tokens")
            for step in range(len(theirs)):
                if step and (len(ours) <= step or (ours[:step] != theirs[:step]).any()):
                    sampled.diverged += len(theirs) - step
                    break
                sampled.add(found.get(s, p, "logprobs")[step], reference.get(s, p, "logprobs")[step])
            rows, wanted = found.get(s, p, "prompt_logprobs"), reference.get(s, p, "prompt_logprobs")
            for row in range(0 if wanted is None else len(wanted)):
                prompt.add(rows[row], wanted[row])
        result[name] = (sampled, prompt)
    return result


def dense(rows: Sequence[Any], vocab: int) -> Any:
    """vLLM's list of {token id: Logprob} as float32 [rows, vocab], -inf where a token is missing."""
    import numpy as np

    table: Any = np.full((len(rows), vocab), -np.inf, dtype=np.float32)
    for row, found in zip(rows, table):
        for token, logprob in row.items():
            found[token] = logprob.logprob
    return table
