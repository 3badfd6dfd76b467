"""
The trainer's two lines: the rollout's float32 head, and the logprobs that its engine returns.

    fp32_lm_head(model)  # once; model(...) returns float32 logits from then on
    logprobs = processed_logprobs(logits, token_ids, sampling_params, prompt_token_ids=prompts, mask=mask)

Both are for an engine with ``fp32_lm_head`` and ``processed_logprobs`` in force, the defaults of vllm_compat. A float32
head on one side only makes the mismatch worse, and so does a temperature or a filter that only one side applies.

Needs torch; nothing of vLLM or transformers. Specification of the second: `vllm_compat.v0_formula`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from vllm_compat.errors import InputError
from vllm_compat.head import full_float32, linear
from vllm_compat.v0_formula import GREEDY_BELOW, Setting

# Elements of a temporary float32 block: 64 MiB.
_BLOCK = 2**24
# vLLM raises temperatures between 0 and this to it: vllm/sampling_params.py, _MAX_TEMP.
_LEAST_TEMPERATURE = 1e-2

_SHAPING = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias",
)  # fmt: skip
# Fields of SamplingParams (0.8.5 to 0.33.0) that change the distribution in ways that are not computed here.
_REFUSED = (
    "bad_words", "guided_decoding", "logits_processors", "structured_outputs", "thinking_token_budget", "watermarking",
)  # fmt: skip
_NEUTRAL = (
    "best_of", "detokenize", "extra_args", "flat_logprobs", "ignore_eos", "include_stop_str_in_output", "logprob_token_ids",
    "logprobs", "max_tokens", "n", "output_kind", "prompt_logprob_start", "prompt_logprob_token_ids", "prompt_logprobs",
    "repetition_detection", "routed_experts_prompt_start", "seed", "skip_clone", "skip_reading_prefix_cache",
    "skip_special_tokens", "spaces_between_special_tokens", "stop", "stream_interval", "trace_decode_token_ids",
    "truncate_prompt_tokens",
)  # fmt: skip


class Float32Head:
    """What `fp32_lm_head` put on a model. ``remove()`` takes it off again; ``with`` does so at the end of its block."""

    def __init__(self, head: Any, hook: Any) -> None:
        self._head, self._hook = head, hook

    def remove(self) -> None:
        """Give the head its own forward back. A second call does nothing."""
        vars(self._head).pop("forward", None)
        self._hook.remove()

    def __enter__(self) -> Float32Head:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


def fp32_lm_head(model: Any) -> Float32Head:
    """Make ``model(...)`` return float32 logits, with the arithmetic of the rollout's float32 head.

    model: a transformers causal language model. Its head is whatever ``get_output_embeddings()`` returns, tied or not.

    Hidden states and weight stay in their dtype (bfloat16, float16 or float32); products and sums are float32 and are not
    rounded back. Under autocast both are first rounded to its dtype, which is what the engine holds. The weight is read at
    each call: an update in place is visible at once, and no float32 copy stays. Gradients reach weight, bias and hidden
    states, each rounded once, to its own dtype. What a model does to its logits afterwards (scale, soft cap) happens in
    float32. A deep copy of the model keeps the head, with its own weight.

    The product is that of `vllm_compat.head`. In the backward pass blocks of the vocabulary are widened in turn and
    multiplied in float32, with TF32 off.

    Returns a handle with ``remove()``, also a context manager. Raises InputError where the head is quantized, wrapped,
    sharded or replaced; and from ``model(...)`` where a model returns no logits (a fused loss that bypasses the head) or
    rounds them back.
    """
    head = _head(model)
    head.forward = MethodType(_forward, head)  # a bound method: a deep copy binds it to the copied head
    return Float32Head(head, model.register_forward_hook(_check_output))


def _head(model: Any) -> Any:
    import torch

    if not hasattr(model, "get_output_embeddings"):
        raise InputError(f"{type(model).__name__} has no get_output_embeddings(): give the transformers model that it wraps")
    head = model.get_output_embeddings()
    what = f"the lm_head of {type(model).__name__} is a {type(head).__module__}.{type(head).__name__}"
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        raise InputError(
            f"{what}: only a plain torch.nn.Linear can be computed in float32. Exclude the lm_head from quantization and "
            f"LoRA, or give the float32 head up on both sides (VLLM_COMPAT_FP32_LM_HEAD=0)"
        )
    if "forward" in vars(head):
        raise InputError(f"{what} whose forward was already replaced: by fp32_lm_head, or by a library's hook. Remove that first")
    weight = head.weight
    if type(weight) not in (torch.nn.Parameter, torch.Tensor):
        raise InputError(f"{what} with a {type(weight).__name__} weight: quantized, or sharded before fp32_lm_head was called")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(f"{what} with a {weight.dtype} weight: want bfloat16, float16 or float32")
    return head


def _check_output(model: Any, given: Any, output: Any) -> None:
    import torch

    if isinstance(output, tuple):  # return_dict=False: which of them are the logits is the model's own business
        return
    logits = getattr(output, "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} returned no logits: a fused loss bypasses the float32 head. Switch it off")
    if logits.dtype != torch.float32:
        raise InputError(f"{type(model).__name__} returned {logits.dtype} logits: it rounds them after the float32 head")


def _forward(self: Any, hidden: Any) -> Any:
    import torch

    weight, device = self.weight, hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    logits = _float32_linear().apply(hidden.reshape(-1, hidden.shape[-1]), weight)
    if self.bias is not None:
        logits = logits + self.bias.float()
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


@functools.cache
def _float32_linear() -> Any:
    """hidden [rows, width], weight [vocab, width] -> float32 [rows, vocab], as an autograd.Function."""
    import torch

    class Float32Linear(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any) -> Any:
            ctx.save_for_backward(hidden, weight)
            return linear(hidden, weight)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            hidden, weight = ctx.saved_tensors
            rows, to_hidden, to_weight = _block_rows(weight), None, None
            with full_float32(hidden.device.type):
                if ctx.needs_input_grad[0]:
                    to_hidden = torch.zeros_like(hidden, dtype=torch.float32)
                    for part, block in zip(grad.split(rows, 1), weight.split(rows)):
                        to_hidden.addmm_(part, block.float())
                    to_hidden = to_hidden.to(hidden.dtype)
                if ctx.needs_input_grad[1]:
                    to_weight, wide = torch.empty_like(weight), hidden.float()
                    for out, part in zip(to_weight.split(rows), grad.split(rows, 1)):
                        out.copy_(part.t() @ wide)
            return to_hidden, to_weight

    return Float32Linear


def _block_rows(table: Any) -> int:
    """How many rows of [rows, width] are one block."""
    return max(1, _BLOCK // int(table.shape[-1]))


@dataclass(frozen=True, slots=True)
class _Plan:
    """One request's sampling parameters as tensors [vocab] where they name tokens."""

    setting: Setting
    bias: Any
    forbidden: Any
    stops: Any  # forbidden for the first `min_tokens` tokens
    min_tokens: int

    @property
    def counts_output(self) -> bool:
        given = self.setting
        return given.repetition_penalty != 1 or given.frequency_penalty != 0 or given.presence_penalty != 0


def processed_logprobs(
    logits: Any,
    token_ids: Any,
    params: Any,
    *,
    prompt_token_ids: Sequence[Any] | None = None,
    mask: Any = None,
    eos_token_id: int | Sequence[int] | None = None,
    prompt_rows: bool = False,
) -> Any:
    """The logprob, in nats, that a V0-equivalent engine returns for each sampled token. Differentiable, on any device.

    logits: [steps, vocab], or [batch, steps, vocab]; row t is the distribution that token t was drawn from (of a causal
        model's output for prompt + completion, the rows from len(prompt) - 1 on, without the last). Computed in float32, or
        float64 where the logits are.
    token_ids: the sampled tokens, [steps] or [batch, steps].
    params: a vLLM SamplingParams, a mapping of its fields, or a v0_formula.Setting: what the engine was given. One for
        all, or a list of one for each sequence.
    prompt_token_ids: the prompt's tokens, or a list of such; needed for repetition_penalty.
    mask: [steps] or [batch, steps], True for tokens that were sampled. Other places return 0 and have no gradient. With
        penalties or min_tokens a False may only follow: tokens of another origin belong to a request's prompt.
    eos_token_id: one or several; needed for min_tokens.
    prompt_rows: the tokens are the prompt's own and the result its prompt_logprobs: no penalties, no logit_bias.

    Returns a tensor of the shape of ``token_ids``. A token outside the kept set is -inf and has a gradient of zero. The
    kept set itself is a constant to the gradient: d logprob / d logit is (token's one-hot - renormalized probability)
    within the set, zero outside.

    Order and meaning are those of `v0_formula.processed_logprobs`. Rows are worked off in blocks and computed again in
    the backward pass, so that what is needed besides logits and their gradient does not grow with the batch. Raises
    InputError for what does not fit together, and for parameters that change the distribution in another way
    (structured outputs, bad_words, …).
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    if logits.ndim == 2:
        logits, token_ids, mask = logits[None], token_ids[None], None if mask is None else mask[None]
        prompt_token_ids = None if prompt_token_ids is None else [prompt_token_ids]
        return processed_logprobs(
            logits, token_ids, params, prompt_token_ids=prompt_token_ids, mask=mask, eos_token_id=eos_token_id,
            prompt_rows=prompt_rows,
        )[0]  # fmt: skip
    mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask.bool()
    if logits.ndim != 3 or logits.shape[:2] != token_ids.shape or token_ids.shape != mask.shape:
        shapes = ", ".join(str(list(given.shape)) for given in (logits, token_ids, mask))
        raise InputError(f"logits, token_ids and mask have shapes {shapes}: want [batch, steps, vocab] and twice [batch, steps]")
    batch, _, vocab = logits.shape
    listed = list(params) if isinstance(params, Sequence) else [params] * batch
    prompts = [None] * batch if prompt_token_ids is None else list(prompt_token_ids)
    if len(listed) != batch or len(prompts) != batch:
        raise InputError(f"{len(listed)} params and {len(prompts)} prompts for {batch} sequences")
    if ((token_ids < 0) | (token_ids >= vocab))[mask].any():
        raise InputError(f"token_ids has values outside 0 to {vocab - 1} where the mask is True")
    plans = {id(given): _plan(given, vocab, logits.device, eos_token_id) for given in listed}
    token_ids, found = token_ids.masked_fill(~mask, 0).long(), []
    for rows, tokens, valid, given, prompt in zip(logits.unbind(), token_ids, mask, listed, prompts):
        plan, count = plans[id(given)], int(valid.sum())
        length = int(valid.nonzero()[-1]) + 1 if count else 0
        if count < length and not prompt_rows and (plan.counts_output or plan.min_tokens):
            raise InputError("mask: a False in front of a True, with penalties or min_tokens; score each request by itself")
        before = None if prompt_rows else _prompt_seen(plan, prompt, vocab, logits.device)
        tokens, start, parts = tokens[:length], 0, []
        for block in rows[:length].split(_block_rows(rows)):
            parts.append(
                checkpoint(_score, block, tokens, start, plan, before, prompt_rows, use_reentrant=False, preserve_rng_state=False)
            )
            start += len(block)
        line = torch.cat(parts).masked_fill(~valid[:length], 0.0)
        found.append(torch.nn.functional.pad(line, (0, len(valid) - length)))
    return torch.stack(found)


def _score(rows: Any, tokens: Any, start: int, plan: _Plan, prompt: Any, prompt_rows: bool) -> Any:
    """Logprobs of tokens[start : start + len(rows)]. rows: [rows, vocab]."""
    import torch

    setting, end = plan.setting, start + len(rows)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if not prompt_rows:
        rows = _penalized(rows, tokens, start, plan, prompt)
    if setting.temperature >= GREEDY_BELOW:
        rows = rows / setting.temperature
        if 0 < setting.top_k < rows.shape[-1] or setting.top_p < 1 or setting.min_p > 0:
            rows = rows.masked_fill(_removed(rows.detach(), setting), -torch.inf)
    found = rows.log_softmax(-1).gather(-1, tokens[start:end, None])[:, 0]
    # masked_fill again: it ends the gradient of a removed token, which would push the kept ones down for nothing.
    return found.masked_fill(found.detach().isneginf(), -torch.inf)


def _penalized(rows: Any, tokens: Any, start: int, plan: _Plan, prompt: Any) -> Any:
    import torch

    setting, end = plan.setting, start + len(rows)
    if plan.bias is not None:
        rows = rows + plan.bias.to(rows)
    if plan.forbidden is not None:
        rows = rows.masked_fill(plan.forbidden, -torch.inf)
    if start < plan.min_tokens:
        early = torch.arange(start, end, device=rows.device) < plan.min_tokens
        rows = rows.masked_fill(early[:, None] & plan.stops, -torch.inf)
    if not plan.counts_output:
        return rows
    counts = torch.zeros_like(rows)  # how often each token was output before each row
    counts[:1] = torch.bincount(tokens[:start], minlength=rows.shape[-1])
    counts[1:].scatter_(1, tokens[start : end - 1, None], 1.0)
    counts = counts.cumsum_(0)
    penalty = setting.repetition_penalty
    if penalty != 1:
        rows = torch.where(prompt | (counts > 0), torch.where(rows > 0, rows / penalty, rows * penalty), rows)
    return rows - setting.frequency_penalty * counts - setting.presence_penalty * (counts > 0)


def _removed(rows: Any, setting: Setting) -> Any:
    """Which tokens the filters take away, bool [rows, vocab]: top-k, then top-p, then min-p."""
    import torch

    if 0 < setting.top_k < rows.shape[-1]:
        rows = rows.masked_fill(rows < rows.topk(setting.top_k).values[:, -1:], -torch.inf)
    if setting.top_p < 1:
        values, order = rows.sort(-1)
        drop = values.softmax(-1).cumsum(-1) <= 1 - setting.top_p
        drop[:, -1] = False
        rows = rows.masked_fill(torch.empty_like(drop).scatter_(1, order, drop), -torch.inf)
    if setting.min_p > 0:
        rows = rows.masked_fill(rows < rows.amax(-1, keepdim=True) + math.log(setting.min_p), -torch.inf)
    return rows.isneginf()


def _prompt_seen(plan: _Plan, prompt: Any, vocab: int, device: Any) -> Any:
    """Which tokens the prompt has, bool [vocab]; None where no penalty asks."""
    import torch

    if plan.setting.repetition_penalty == 1:
        return None
    if prompt is None:
        raise InputError("repetition_penalty counts the prompt's tokens: give prompt_token_ids")
    ids = torch.as_tensor(prompt, dtype=torch.long, device=device)
    if ids.ndim != 1 or ((ids < 0) | (ids >= vocab)).any():
        raise InputError(f"prompt_token_ids: want one list of ids from 0 to {vocab - 1} for each sequence")
    return torch.bincount(ids, minlength=vocab) > 0


def _plan(params: Any, vocab: int, device: Any, eos_token_id: int | Sequence[int] | None) -> _Plan:
    import torch

    def chosen(ids: Any) -> Any:
        try:
            found = torch.zeros(vocab, dtype=torch.bool)
            found[torch.as_tensor(list(ids), dtype=torch.long)] = True
        except IndexError:
            raise InputError(f"sampling parameters name a token outside 0 to {vocab - 1}: {sorted(ids)[-8:]}") from None
        return found.to(device)

    forbidden, stops, min_tokens = None, None, 0
    if isinstance(params, Setting):
        setting = params
        forbidden = chosen(params.forbidden) if params.forbidden else None
    else:
        given = _given(params)
        setting = Setting(**{name: given[name] for name in _SHAPING if name in given})
        if given.get("allowed_token_ids"):
            forbidden = ~chosen(given["allowed_token_ids"])
        min_tokens = given.get("min_tokens", 0)
        if min_tokens:
            if eos_token_id is None:
                raise InputError("min_tokens forbids the end of sequence at first: give eos_token_id")
            eos = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
            stops = chosen({*eos, *given.get("stop_token_ids", ())})
    bias = None
    if setting.logit_bias:
        chosen(setting.logit_bias)  # its check of the ids
        bias = torch.zeros(vocab, dtype=torch.float64)
        bias[list(setting.logit_bias)] = torch.tensor(list(setting.logit_bias.values()), dtype=torch.float64)
    return _Plan(setting, bias, forbidden, stops, min_tokens)


def _given(params: Any) -> dict[str, Any]:
    """The fields of a SamplingParams, or of a mapping, that were set to something."""
    used = (*_SHAPING, "allowed_token_ids", "min_tokens", "stop_token_ids")
    if isinstance(params, Mapping):
        unknown = set(params) - {*used, *_REFUSED, *_NEUTRAL}
        if unknown:
            raise InputError(f"no sampling parameter of vLLM: {', '.join(sorted(map(str, unknown)))}")
        given = dict(params)
    elif all(hasattr(params, name) for name in ("temperature", "top_p", "top_k")):
        given = {name: getattr(params, name, None) for name in (*used, *_REFUSED)}
    else:
        raise InputError(f"params is a {type(params).__name__}: want a SamplingParams, a mapping of its fields, or a Setting")
    refused = [name for name in _REFUSED if given.get(name)]
    if refused:
        raise InputError(f"{', '.join(refused)}: changes the distribution in a way that is not computed here")
    given = {name: value for name, value in given.items() if value is not None}
    if 0 < given.get("temperature", 1.0) < _LEAST_TEMPERATURE:
        given["temperature"] = _LEAST_TEMPERATURE
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): float(bias) for token, bias in given["logit_bias"].items()}
    return given
