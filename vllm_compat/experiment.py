"""
The experiment behind a recording: which requests, under which sampling settings, and who answers them.

Requests come in two groups. *Settings*: every prompt under every setting, all in one batch, so that a row that leaks into
another is seen. *Prefixes*: every prompt followed by the first 0, 1, 2, … tokens of a fixed continuation, one token each:
sampled rows at fixed positions, teacher-forced. Then everything once more, one request at a time: the difference is the
maker's own noise floor.

An engine answers through its public API; a trainer (`transformers`) is scored by `vllm_compat.v0_formula`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_compat import recording
from vllm_compat.errors import RecordingError

# The second and fourth are longer than a KV block of 32 bytes-as-tokens, so that chunks and cache hits occur.
PROMPTS = (
    "The answer is",
    "def add(a, b):\n    return a + b\n\nadd(1, 2)",
    "3 + 4 * 2 =",
    "Once upon a time there was a small model that",
)
PROMPT_ROWS = 2  # how many of the prompts also have their own rows scored
WHOLE_UP_TO = 1024  # vocabularies up to this size are recorded whole

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
PREFIX_SETTINGS = ("T=1", "T=0.7 top-p 0.9")


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is asked. Equal experiments on equal weights are comparable; ``top_n`` may differ.

    prompts: token ids. settings: pairs of a name and vLLM SamplingParams arguments. continuations: token ids that follow
    each prompt in the prefix requests. prefix_settings: the names of the settings those use. vocab: the vocabulary's size.
    top_n: how many tokens of a distribution are kept; None keeps all.
    """

    prompts: list[list[int]]
    settings: list[list[Any]]
    continuations: list[list[int]]
    prefix_settings: list[str]
    vocab: int
    top_n: int | None

    def to_dict(self) -> dict[str, Any]:
        """For a recording's header."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the experiment: the prefix request of ``position`` tokens, or (None) one of the settings group."""

    setting: int
    prompt: int
    position: int | None
    token_ids: tuple[int, ...]
    params: Mapping[str, Any]
    scored: bool  # whether the prompt's own rows are asked for

    @property
    def key(self) -> str:
        """Its place among the answers."""
        return f"{self.setting}/{self.prompt}" + ("" if self.position is None else f"/{self.position}")


@dataclass(slots=True)
class Answer:
    """What came back. Rows are {token id: logprob}; ``prompt_rows`` are those of tokens 1 … len - 1."""

    tokens: list[int]
    rows: list[dict[int, float]]
    cumulative: float
    prompt_rows: list[dict[int, float]] | None = None

    def to_json(self) -> list[Any]:
        """For a part file; JSON's keys are text, hence lists of pairs."""

        def pairs(rows: list[dict[int, float]] | None) -> Any:
            return None if rows is None else [list(row.items()) for row in rows]

        return [self.tokens, pairs(self.rows), self.cumulative, pairs(self.prompt_rows)]

    @classmethod
    def from_json(cls, data: list[Any]) -> Answer:
        """Read `to_json`."""
        tokens, rows, cumulative, prompt = data
        return cls(tokens, [dict(row) for row in rows], cumulative, None if prompt is None else [dict(row) for row in prompt])


def requests(experiment: Experiment) -> list[Request]:
    """All requests: the settings group, then the prefixes."""
    found = []
    for s, (_, params) in enumerate(experiment.settings):
        for p, prompt in enumerate(experiment.prompts):
            found.append(Request(s, p, None, tuple(prompt), {"max_tokens": 1, **params}, p < PROMPT_ROWS))
    names = [name for name, _ in experiment.settings]
    for name in experiment.prefix_settings:
        params = {**experiment.settings[names.index(name)][1], "max_tokens": 1}
        for p, (prompt, continuation) in enumerate(zip(experiment.prompts, experiment.continuations)):
            for k in range(len(continuation)):
                found.append(Request(names.index(name), p, k, (*prompt, *continuation[:k]), params, False))
    return found


def assemble(experiment: Experiment, answers: Mapping[str, Answer]) -> dict[str, Any]:
    """The recording's tensors from the answer to every request."""
    import numpy as np

    tensors: dict[str, Any] = {}
    prefixes: dict[str, list[dict[int, float]]] = {}
    for request in requests(experiment):
        answer, name = answers[request.key], f"{request.setting}/{request.prompt}"
        if request.position is not None:
            prefixes.setdefault(f"{name}/prefix_logprobs", []).append(answer.rows[0])
            continue
        tensors[f"{name}/tokens"] = np.array(answer.tokens, dtype=np.int32)
        tensors[f"{name}/cumulative"] = np.array([answer.cumulative], dtype=np.float64)
        recording.put(tensors, f"{name}/logprobs", answer.rows, experiment.vocab, experiment.top_n)
        if answer.prompt_rows is not None:
            recording.put(tensors, f"{name}/prompt_logprobs", answer.prompt_rows, experiment.vocab, experiment.top_n)
    for name, rows in prefixes.items():
        recording.put(tensors, name, rows, experiment.vocab, experiment.top_n)
    return tensors


# --- an engine ----------------------------------------------------------------------------------------------------


class Engine:
    """A vLLM engine that answers requests."""

    def __init__(self, llm: Any, top: int, seeded: bool) -> None:
        self.llm, self.top, self.seeded = llm, top, seeded
        self.cached = 0

    def continuations(self, prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        """What the engine samples after each prompt at temperature 1."""
        import vllm

        params = [
            vllm.SamplingParams(max_tokens=length, ignore_eos=True, seed=7 + p if self.seeded else None)
            for p in range(len(prompts))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def answer(self, batch: Sequence[Request], together: bool) -> Iterator[Answer]:
        """The answers in order; one batch, or one request at a time."""
        asked = [({"prompt_token_ids": list(request.token_ids)}, self._params(request)) for request in batch]
        if together:
            outputs = self.llm.generate([ids for ids, _ in asked], [params for _, params in asked], use_tqdm=False)
        else:
            outputs = (self.llm.generate([ids], [params], use_tqdm=False)[0] for ids, params in asked)
        for request, output in zip(batch, outputs):
            best = output.outputs[0]
            self.cached += output.num_cached_tokens or 0
            prompt = [_plain(row) for row in output.prompt_logprobs[1:]] if request.scored else None
            yield Answer(list(best.token_ids), [_plain(row) for row in best.logprobs], best.cumulative_logprob, prompt)

    def _params(self, request: Request) -> Any:
        import vllm

        more = dict(request.params)
        if "logit_bias" in more:
            more["logit_bias"] = {int(token): bias for token, bias in more["logit_bias"].items()}
        # The token drawn after a prefix is used by nobody, and vLLM 0.32 on the CPU stops at a chunked prompt with a seed.
        seed = 1000 * request.setting + request.prompt if self.seeded and request.position is None else None
        return vllm.SamplingParams(**more, seed=seed, logprobs=self.top, prompt_logprobs=self.top if request.scored else None)


def _plain(row: Mapping[int, Any]) -> dict[int, float]:
    return {int(token): float(logprob.logprob) for token, logprob in row.items()}


# --- a trainer ----------------------------------------------------------------------------------------------------


def load_model(folder: Path, dtype: str, device: str) -> Any:
    """A transformers causal language model, for scoring. dtype: a torch dtype's name.

    Attention is eager where the config has a soft cap on its logits (Gemma 2): transformers' default, sdpa, leaves that out.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    more = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    recent = int(transformers.__version__.partition(".")[0]) >= 5
    if recent and dtype == "float64":
        more["experts_implementation"] = "eager"  # the default's grouped product has no float64
    name = "dtype" if recent else "torch_dtype"
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, **{name: getattr(torch, dtype)}, **more)
    return made.to(device).eval()


class Trainer:
    """A transformers causal language model that answers the same requests: a forward pass, then V0's formula.

    ``reference``: where given, its sampled tokens are scored instead of tokens of our own.
    """

    def __init__(self, model: Any, vocab: int, top: int, reference: recording.Recording | None, seed: int = 0) -> None:
        import torch

        self.model, self.vocab, self.top, self.reference = model, vocab, top, reference
        self._generator = torch.Generator().manual_seed(seed)

    def continuations(self, prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
        """What the model samples after each prompt at temperature 1."""
        found: list[list[int]] = [[] for _ in prompts]
        for _ in range(length):
            rows = self._logits([[*prompt, *tokens] for prompt, tokens in zip(prompts, found)], True)
            for tokens, logits in zip(found, rows):
                tokens.append(self._draw(logits[-1].double().log_softmax(-1)))
        return found

    def answer(self, batch: Sequence[Request], together: bool) -> Iterator[Answer]:
        """The answers in order, scored in padded batches, or each sequence by itself."""
        size = 16 if together else 1
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            tokens: list[list[int]] = [self._given(request) for request in part]
            wanted = [len(given) or request.params["max_tokens"] for request, given in zip(part, tokens)]
            while any(len(given) < count for given, count in zip(tokens, wanted)):
                logits = self._logits([[*r.token_ids, *given] for r, given in zip(part, tokens)], together)
                for request, given, count, rows in zip(part, tokens, wanted, logits):
                    if len(given) < count:
                        given.append(self._sample(request, given, rows[-1]))
            logits = self._logits([[*r.token_ids, *given] for r, given in zip(part, tokens)], together)
            for request, given, rows in zip(part, tokens, logits):
                yield self._score(request, given, rows)

    def _given(self, request: Request) -> list[int]:
        if self.reference is None or request.position is not None:
            return []
        found: list[int] = self.reference.get(request.setting, request.prompt, "tokens").tolist()
        return found

    def _logits(self, sequences: Sequence[Sequence[int]], together: bool) -> list[Any]:
        """float [len, vocab] of each sequence, on the CPU. Padded right: a causal model does not look there."""
        import torch

        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        device = self.model.device
        with torch.inference_mode():
            more = {} if not together else {"attention_mask": mask.to(device)}
            logits = self.model(ids.to(device), **more).logits.cpu()
        return [rows[: len(sequence), : self.vocab] for rows, sequence in zip(logits, sequences)]

    def _processed(self, request: Request, logits: Any, output: Sequence[int], prompt_row: bool = False) -> Any:
        from vllm_compat.v0_formula import Setting, processed_logprobs

        given = dict(request.params)
        given.pop("max_tokens")
        forbidden: tuple[int, ...] = ()
        if "allowed_token_ids" in given:
            forbidden = tuple(set(range(self.vocab)) - set(given.pop("allowed_token_ids")))
        if len(output) < given.pop("min_tokens", 0):
            eos = self.model.generation_config.eos_token_id
            forbidden = (*forbidden, *([eos] if isinstance(eos, int) else eos or ()))
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        return processed_logprobs(logits, Setting(**given, forbidden=forbidden), request.token_ids, output, prompt_row=prompt_row)

    def _sample(self, request: Request, output: Sequence[int], logits: Any) -> int:
        row = self._processed(request, logits, output)
        return int(row.argmax()) if request.params.get("temperature") == 0 else self._draw(row)

    def _draw(self, logprobs: Any) -> int:
        return int(logprobs.exp().multinomial(1, generator=self._generator))

    def _score(self, request: Request, tokens: list[int], logits: Any) -> Answer:
        start = len(request.token_ids)
        rows = [self._processed(request, logits[start - 1 + k], tokens[:k]) for k in range(len(tokens))]
        prompt = None
        if request.scored:
            prompt = [
                self._listed(self._processed(request, logits[k - 1], (), prompt_row=True), request.token_ids[k])
                for k in range(1, start)
            ]
        total = sum(float(row[token]) for row, token in zip(rows, tokens))
        return Answer(tokens, [self._listed(row, token) for row, token in zip(rows, tokens)], total, prompt)

    def _listed(self, row: Any, own: int) -> dict[int, float]:
        """What an engine returns of a distribution: the most probable tokens and the row's own."""
        values, ids = row.topk(self.top)
        return {**dict(zip(ids.tolist(), values.tolist())), own: float(row[own])}


def check(experiment: Experiment, header: Mapping[str, Any], vocab: int) -> None:
    """Raises RecordingError where an experiment that was read does not fit the model at hand."""
    if vocab != experiment.vocab:
        raise RecordingError(
            f"the reference is of a vocabulary of {experiment.vocab} tokens ({header['model']['name']}), this model has {vocab}"
        )
    if not experiment.prompts or any(not prompt for prompt in experiment.prompts):
        raise RecordingError("the experiment has an empty prompt")


def progress(done: int, total: int, what: str) -> None:
    """One line that is written over, on a terminal; a line each tenth elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or math.floor(10 * done / total) > math.floor(10 * (done - 1) / total):
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
