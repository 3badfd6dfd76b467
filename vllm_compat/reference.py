"""
What a logprob should have been, and what it would have been under each known fault: a transformers model, scored.

A *schedule* says which weights each position of prompt + completion is computed with: `((weights, start), ...)`, over one
KV cache. One entry is an ordinary engine; two are an update inside a request (token k from the new weights over the KV cache
of the old), or a prefix whose KV blocks older weights wrote.

A *semantics* says what is made of the logits. Its defaults are V0's: `vllm_compat.trainer.processed_logprobs`, float32 head.

Needs torch and transformers, imported when a model is loaded.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from vllm_compat.errors import InputError
from vllm_compat.experiment import load_model
from vllm_compat.rollouts import Rollout
from vllm_compat.trainer import fp32_lm_head, processed_logprobs
from vllm_compat.v0_formula import GREEDY_BELOW

PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
FILTERS = ("top_k", "top_p", "min_p")
_NEUTRAL = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
    "presence_penalty": 0.0, "min_tokens": 0, "logit_bias": {}, "allowed_token_ids": [],
}  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class Mix:
    """Weights of an update that is not whole: of what changed from ``old`` to ``new``, the ``part`` is new."""

    old: int
    new: int
    part: str


Weights = int | Mix
Schedule = tuple[tuple[Weights, int], ...]

# Which of the changed parameters (in the model's order) are new. A transport sends one after the other, in its order; or
# what it sends never reaches some kernels.
MIXES: dict[str, Callable[[int, int, str], bool]] = {
    "the first half": lambda i, n, name: i < (n + 1) // 2,
    "the second half": lambda i, n, name: i >= (n + 1) // 2,
    "the first quarter": lambda i, n, name: i < (n + 3) // 4,
    "the first three quarters": lambda i, n, name: i < n - n // 4,
    "every other, the first too": lambda i, n, name: i % 2 == 0,
    "every other, the second on": lambda i, n, name: i % 2 == 1,
    "the norms only": lambda i, n, name: "norm" in name,
    "all but head and embedding": lambda i, n, name: "lm_head" not in name and "embed" not in name,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Semantics:
    """What is made of the logits. ``raw`` leaves nothing but their log-softmax."""

    raw: bool = False
    temperature: str = "once"  # never, twice
    penalties: bool = True
    filters: str = "v0"  # none: the full vocabulary; min-p first: V1's order
    greedy: str = "argmax"  # one-hot: divided by almost 0; negated: divided by -1
    head: str = "float32"  # rounded, to 16 bits
    result: str = "float32"  # rounded: the logprob itself

    @property
    def faults(self) -> tuple[str, ...]:
        """The fields that are not V0's."""
        return tuple(name for name in self.__slots__ if getattr(self, name) != getattr(V0, name))


V0 = Semantics()


def semantics() -> list[Semantics]:
    """Every combination, those with fewer faults first."""
    found = [Semantics(raw=True, head=head, result=result) for head, result in product(*[("float32", "rounded")] * 2)]
    found += [
        Semantics(temperature=temperature, penalties=penalties, filters=filters, greedy=greedy, head=head, result=result)
        for temperature, penalties, filters, greedy, head, result in product(
            ("once", "never", "twice"), (True, False), ("v0", "none", "min-p first"), ("argmax", "one-hot", "negated"),
            ("float32", "rounded"), ("float32", "rounded"),
        )
    ]  # fmt: skip
    return sorted(found, key=lambda how: len(how.faults))


@dataclass(frozen=True, slots=True)
class Effect:
    """What a semantics comes to for one request's sampling parameters: equal effects give equal logprobs."""

    params: str  # JSON
    min_p_first: float | None = None  # the log of min-p, times the temperature: the filter as a distance of logits
    negated: bool = False
    rounded_head: bool = False
    rounded_result: bool = False


def effect(given: Mapping[str, Any], how: Semantics) -> Effect:
    """The effect of ``how`` for a request with these sampling parameters (vLLM's names)."""
    params = {key: value for key, value in given.items() if key in (*_NEUTRAL, "stop_token_ids")}
    temperature, min_p_first = float(params.get("temperature", 1.0)), None
    greedy = temperature < GREEDY_BELOW
    if how.raw:
        params, temperature = {}, 1.0
    elif greedy:  # vLLM raises a temperature that is nearly 0 to 0.01
        temperature = 1e-2 if how.greedy == "one-hot" else 1.0
    else:
        temperature = {"once": temperature, "never": 1.0, "twice": temperature**2}[how.temperature]
    dropped = {*(PENALTIES if not how.penalties else ()), *(FILTERS if greedy or how.filters == "none" else ())}
    params = {key: value for key, value in params.items() if key not in dropped} | {"temperature": temperature}
    params = {key: value for key, value in params.items() if value != _NEUTRAL.get(key) and (key != "top_k" or value > 0)}
    # With penalties or a bias the other order would need the penalized logits; that rare case is left to V0's order.
    filters, shaped = {"top_k", "top_p"} & set(params), {*PENALTIES, "logit_bias"} & set(params)
    if how.filters == "min-p first" and "min_p" in params and filters and not shaped:
        min_p_first = math.log(params.pop("min_p")) * temperature
    return Effect(
        json.dumps(params, sort_keys=True), min_p_first, greedy and how.greedy == "negated", how.head == "rounded",
        how.result == "rounded",
    )  # fmt: skip


def folders(given: Sequence[str]) -> dict[int, Path]:
    """``FOLDER``, or ``VERSION=FOLDER`` several times, as {version: folder}. Raises InputError."""
    found: dict[int, Path] = {}
    for text in given:
        version, equals, rest = text.partition("=")
        numbered = bool(equals) and version.lstrip("-").isdigit()
        if not numbered and len(given) > 1:
            raise InputError(f"--model {text}: of several models each needs its version: --model 3=FOLDER")
        number, folder = (int(version), Path(rest)) if numbered else (0, Path(text))
        if not (folder / "config.json").is_file():
            raise InputError(f"--model {text}: {folder} is no model folder: there is no config.json in it")
        if number in found:
            raise InputError(f"--model {text}: version {number} is given twice")
        found[number] = folder
    return dict(sorted(found.items()))


def dtype_of(folder: Path) -> str:
    """The dtype a model folder says it is stored in; float32 where it says nothing."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


class Reference:
    """Scores sequences with the given model versions. Each (weights, dtype) is loaded once and kept."""

    def __init__(self, models: Mapping[int, Path], *, device: str = "cpu", batch_size: int = 8) -> None:
        self.versions, self.device, self.batch_size = dict(models), device, batch_size
        self._models: dict[tuple[Weights, str], Any] = {}

    def predict(
        self, rollouts: Sequence[Rollout], schedules: Sequence[Schedule], effects: Sequence[set[Effect]], dtype: str,
        *, alone: bool = False, progress: Callable[[int], None] = lambda done: None,
    ) -> list[dict[Effect, Any]]:  # fmt: skip
        """For each sequence {effect: logprobs}, float64 arrays [tokens] in nats; -inf for a token that is not kept.

        dtype: the forward pass's, "float32", "float64", "bfloat16" or "float16". Sequences of one set of weights run in padded
        batches, unless ``alone``; others one by one, over a KV cache.
        """
        found: list[dict[Effect, Any]] = [{} for _ in rollouts]
        batches: dict[Any, list[int]] = {}
        for i, schedule in enumerate(schedules):
            batches.setdefault(schedule if len(schedule) == 1 else i, []).append(i)
        done = 0
        for members in batches.values():
            step = 1 if alone else self.batch_size
            for chosen in (members[at : at + step] for at in range(0, len(members), step)):
                parts = [rollouts[i] for i in chosen]
                for i, logits in zip(chosen, self._logits(parts, schedules[chosen[0]], dtype)):
                    found[i] = {kind: self._score(logits, rollouts[i], kind, dtype) for kind in effects[i]}
                done += len(chosen)
                progress(done)
        return found

    def _logits(self, rollouts: list[Rollout], schedule: Schedule, dtype: str) -> list[Any]:
        """Logits [tokens, vocab] of each. Several sequences have one set of weights."""
        import torch

        rows = [torch.tensor([*r.prompt_ids, *r.token_ids[:-1]]) for r in rollouts]
        with torch.inference_mode():
            if len(rows) > 1:
                length = max(map(len, rows))
                ids = torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows]).to(self.device)
                valid = torch.stack([torch.arange(length) < len(row) for row in rows]).long().to(self.device)
                logits = list(self._model(schedule[0][0], dtype)(ids, attention_mask=valid).logits)
            else:
                cache, parts = None, []
                for (weights, start), (_, stop) in pairwise([*schedule, (0, len(rows[0]))]):
                    piece = rows[0][None, start:stop].to(self.device)
                    out = self._model(weights, dtype)(piece, past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    parts.append(out.logits[0])
                logits = [torch.cat(parts)]
        return [each[len(r.prompt_ids) - 1 : len(row)] for each, r, row in zip(logits, rollouts, rows)]

    def _score(self, logits: Any, rollout: Rollout, kind: Effect, dtype: str) -> Any:
        import torch

        with torch.inference_mode():
            narrow = torch.float16 if dtype == "float16" else torch.bfloat16
            if kind.rounded_head:
                logits = logits.to(narrow).float()
            if kind.negated:
                logits = -logits
            if kind.min_p_first is not None:
                logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + kind.min_p_first, -torch.inf)
            mask = torch.tensor(rollout.mask, device=logits.device)
            eos = self._eos()
            try:
                found = processed_logprobs(
                    logits, torch.tensor(rollout.token_ids, device=logits.device), json.loads(kind.params),
                    prompt_token_ids=rollout.prompt_ids, mask=mask, eos_token_id=eos,
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"{rollout.where}: {error}") from None
            if kind.rounded_result:
                found = found.to(narrow)
        return found.masked_fill(~mask, math.nan).double().cpu().numpy()

    def _eos(self) -> Any:
        model = next(iter(self._models.values()))
        return getattr(getattr(model, "generation_config", None), "eos_token_id", None) or model.config.eos_token_id

    def check(self, rollouts: Sequence[Rollout]) -> None:
        """Raise InputError where a sequence cannot be scored: its versions, a token id, a sampling parameter."""
        import torch

        config = json.loads((next(iter(self.versions.values())) / "config.json").read_text(encoding="utf-8"))
        vocab, seen = int({**config, **config.get("text_config", {})}["vocab_size"]), set()
        for rollout in rollouts:
            unknown = {*(rollout.rollout_version or ()), *({rollout.trainer_version} - {None})} - set(self.versions)
            if unknown:
                raise InputError(
                    f"{rollout.where}: names weights of version {min(map(str, unknown))}, where --model gives "
                    f"{', '.join(map(str, self.versions))}: want --model VERSION=FOLDER for each"
                )
            if max(*rollout.prompt_ids, *rollout.token_ids) >= vocab:
                raise InputError(f"{rollout.where}: holds a token id that the model does not have: its vocabulary is {vocab}")
            params = json.dumps(rollout.sampling_params, sort_keys=True, default=str)
            if params not in seen:
                seen.add(params)
                row, token = torch.zeros(1, vocab), torch.zeros(1, dtype=torch.long)
                try:
                    processed_logprobs(row, token, rollout.sampling_params, prompt_token_ids=[0], eos_token_id=0)
                except (InputError, TypeError, ValueError) as error:
                    raise InputError(f"{rollout.where}: sampling_params: {error}") from None

    def _model(self, weights: Weights, dtype: str) -> Any:
        if (weights, dtype) not in self._models:
            if isinstance(weights, Mix):
                old, new = self._model(weights.old, dtype), self._model(weights.new, dtype)
                made = self._mixed(old, new, weights.part)
            else:
                made = load_model(self.versions[weights], dtype, self.device)
                if dtype in ("bfloat16", "float16"):
                    fp32_lm_head(made)
            self._models[weights, dtype] = made
        return self._models[weights, dtype]

    @staticmethod
    def _mixed(old: Any, new: Any, part: str) -> Any:
        import torch

        made = copy.deepcopy(old)
        theirs = dict(new.named_parameters())
        changed = [(name, held) for name, held in made.named_parameters() if not torch.equal(held, theirs[name])]
        with torch.no_grad():
            for i, (name, held) in enumerate(changed):
                if MIXES[part](i, len(changed), name):
                    held.copy_(theirs[name])
        return made
