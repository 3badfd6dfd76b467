"""
Logprobs of the distribution that was sampled from, for sampled and for prompt rows.

V0 returned log-softmax after penalties, temperature, top-k, top-p and min-p, in that order; prompt rows too, without
penalties and bias. V1 returns log-softmax of the raw logits by default. Its ``logprobs_mode="processed_logprobs"``
covers sampled rows only, and filters by min-p before top-k/top-p: top-p then keeps fewer tokens than V0 did. An
importance ratio on raw logprobs is off by the temperature and the truncation.

So: the option for the sampled rows, and two patches on Model Runner V1. `min_p_last` hands the sampler top-k/top-p
as a step in front of min-p (no body is copied); `prompt_rows` scores each request's prompt with that request's
filters.

The option came with 0.10.0 and meant what V0 did from 0.11.0. In 0.10.2 it divides greedy rows of a mixed batch by
-1 (`greedy_temperature`). Up to 0.10.1.1 it has the rows before temperature and filters, or is not there at all:
`v0_sample` samples in V0's order, always with torch's own filters (FlashInfer's sampler knows no logprobs), and leaves what
it sampled from to `v0_gather`, which comes next.

Specification: `vllm_compat.v0_formula`. Upstream: https://github.com/vllm-project/vllm/pull/21398 and issue 47680.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES, V1_RELEASES, V2_RELEASES, engine_arg
from vllm_compat.patching.model import (
    UNSET,
    Behavior,
    Check,
    CheckFailed,
    Native,
    NotNeeded,
    Patch,
    Role,
    Target,
    Unsupported,
)

# Releases whose option is missing, or means rows before temperature and filters.
_NO_OPTION = ">=0.8.5,<0.10.2"
_FLASHINFER = "VLLM_USE_FLASHINFER_SAMPLER"
# Rows filtered at a time: sorting a whole prompt's [rows, vocab] would need several times its memory.
_BLOCK_ROWS = 256


class _TopKTopPFirst:
    """Top-k/top-p in the place of a logits processor, so that it runs before min-p."""

    def __init__(self, apply: Any, top_k: Any, top_p: Any) -> None:
        self._apply, self._top_k, self._top_p = apply, top_k, top_p

    def apply(self, logits: Any) -> Any:
        return self._apply(logits, self._top_k, self._top_p)


def _min_p(processors: Any) -> Any:
    """The batch's min-p processor if a row uses it, else None."""
    return next((p for p in processors if getattr(p, "min_p_count", 0)), None)


def _build_sample(original: Any, module: Any) -> Any:
    def sample(self: Any, logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = sampling_metadata
        filters = metadata.top_k is not None or metadata.top_p is not None
        if filters and not metadata.all_greedy:
            processors = metadata.logitsprocs
            min_p = _min_p(processors.argmax_invariant)
            if min_p is not None:
                # imported by vLLM already; our own import would be wrong on a release without it
                from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

                reordered = type(processors)()
                reordered.non_argmax_invariant = processors.non_argmax_invariant
                reordered.argmax_invariant = [p for p in processors.argmax_invariant if p is not min_p]
                reordered.argmax_invariant += [_TopKTopPFirst(apply_top_k_top_p, metadata.top_k, metadata.top_p), min_p]
                metadata = dataclasses.replace(metadata, top_k=None, top_p=None, logitsprocs=reordered)
        return original(self, logits, metadata, *args, **kwargs)

    return sample


def _build_v0_sample(original: Any, module: Any) -> Any:
    def sample(self: Any, logits: Any, sampling_metadata: Any) -> Any:
        import torch
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        metadata, greedy = sampling_metadata, None
        if not metadata.all_random:
            greedy = self.greedy_sample(logits)
        if metadata.all_greedy:
            sampled = greedy
        else:
            temperature = metadata.temperature
            logits = logits.div_(torch.where(temperature < 1e-5, 1.0, temperature).unsqueeze(1))
            logits = apply_top_k_top_p(logits, metadata.top_k, metadata.top_p)
            if hasattr(metadata, "logitsprocs"):  # from 0.9.2
                for processor in metadata.logitsprocs.argmax_invariant:
                    logits = processor.apply(logits)
            elif metadata.min_p is not None:
                logits = self.apply_min_p(logits, metadata.min_p)
            sampled = self.topk_topp_sampler(logits, metadata.generators, None, None)
            if greedy is not None:
                sampled = torch.where(temperature < 1e-5, greedy, sampled)
        if metadata.max_num_logprobs is not None:
            self._vllm_compat_processed = self.compute_logprobs(logits)
        return sampled

    return sample


def _build_v0_gather(original: Any, module: Any) -> Any:
    def gather_logprobs(self: Any, logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
        processed = vars(self).pop("_vllm_compat_processed", None)  # prompt rows come without
        return original(self, logprobs if processed is None else processed, num_logprobs, token_ids)

    return gather_logprobs


def _build_temperature(original: Any, module: Any) -> Any:
    def apply_temperature(self: Any, logits: Any, temp: Any) -> Any:
        import torch

        return original(self, logits, torch.where(temp < 1e-5, 1.0, temp))

    return apply_temperature


def _filtered(logits: Any, params: Any, top_k_top_p: Any) -> Any:
    """V0's prompt-row distribution. logits: [rows, vocab], changed in place where float32. Returns logprobs [rows, vocab]."""
    import torch

    rows, vocab = logits.shape
    logits = logits.to(torch.float32)
    if params.temperature >= 1e-5:
        top_k = min(params.top_k, vocab) if params.top_k > 0 else vocab
        for start in range(0, rows, _BLOCK_ROWS):
            block = logits[start : start + _BLOCK_ROWS]
            block.div_(params.temperature)
            k = torch.full((len(block),), top_k, dtype=torch.int32, device=block.device) if top_k < vocab else None
            p = torch.full((len(block),), params.top_p, device=block.device) if params.top_p < 1 else None
            filtered = top_k_top_p(block, k, p)
            if params.min_p > 0:
                probs = filtered.softmax(dim=-1)
                filtered = filtered.masked_fill(probs < params.min_p * probs.amax(dim=-1, keepdim=True), -torch.inf)
            if filtered is not block:
                block.copy_(filtered)
    return logits.log_softmax(dim=-1, dtype=torch.float32)


def _build_prompt(original: Any, module: Any) -> Any:
    def _get_prompt_logprobs_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        holder = self if hasattr(self, "num_prompt_logprobs") else self.input_batch  # the latter up to 0.11.2
        wanted = holder.num_prompt_logprobs
        if not wanted:
            return original(self, *args, **kwargs)
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        results: dict[str, Any] = {}
        sampler = self.sampler
        try:
            # One request at a time: the original scores whatever the dictionary holds, and asks the sampler for the
            # logprobs of that request's rows.
            for request_id in list(wanted):
                params = self.requests[request_id].sampling_params
                sampler.compute_logprobs = lambda logits, params=params: _filtered(logits, params, apply_top_k_top_p)
                holder.num_prompt_logprobs = {request_id: wanted[request_id]}
                results.update(original(self, *args, **kwargs))
                if request_id not in holder.num_prompt_logprobs:
                    del wanted[request_id]
        finally:
            holder.num_prompt_logprobs = wanted
            vars(sampler).pop("compute_logprobs", None)
        return results

    return _get_prompt_logprobs_dict


# --- the self-test of a worker --------------------------------------------------------------------------------

PROBE_VOCAB = 64
_PROMPT, _OUTPUT = [3, 5, 7, 11], [5, 5, 13]
# name -> vLLM's SamplingParams arguments; one batch holds them all, so that rows that leak into others are seen.
_SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "T=0.7": {"temperature": 0.7},
    "T=0.7 top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top-k 9": {"top_k": 9},
    "min-p 0.05": {"min_p": 0.05},
    "T=0.8 top-k 30 top-p 0.85 min-p 0.1": {"temperature": 0.8, "top_k": 30, "top_p": 0.85, "min_p": 0.1},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "T=0.9 top-p 0.8 penalties and bias": {
        "temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3,
        "logit_bias": {2: 1.5, 9: -1.0},
    },
}  # fmt: skip


def self_test_logits() -> Any:
    """Synthetic logits, float32 [settings, vocab] on the CPU; the suite checks that no filter's edge is near a token."""
    import torch

    return torch.randn(len(_SETTINGS), PROBE_VOCAB, generator=torch.Generator().manual_seed(20250506)) * 2.5


def _compare(name: str, found: Any, expected: Any) -> float:
    import torch

    found = found.detach().to("cpu", torch.float64)
    if not torch.equal(found.isinf(), expected.isinf()):
        raise CheckFailed(f"{name}: keeps {int(found.isfinite().sum())} tokens, V0 keeps {int(expected.isfinite().sum())}")
    kept = expected.isfinite()
    worst = float((found - expected)[kept].abs().max())
    if not worst < 1e-4:
        raise CheckFailed(f"{name}: logprobs differ from V0's by {worst:.2g}")
    return worst


def _processors(config: Any, device: Any, params: list[Any]) -> Any:
    """vLLM's own logits processors holding these requests, or None up to 0.9.1, which has none."""
    try:
        from vllm.v1.sample import logits_processor as library
    except ImportError:
        return None
    added: list[tuple[Any, ...]]
    if hasattr(library, "build_logitsprocs"):  # from 0.10.1
        made = library.build_logitsprocs(config, device, False, False)
        stateful = list(made.all)
        added = [(row, given, _PROMPT, _OUTPUT) for row, given in enumerate(params)]
    else:
        made = library.init_builtin_logitsprocs(False, len(params), device)
        stateful = [*made.non_argmax_invariant, *made.argmax_invariant]
        added = [(row, given, _OUTPUT) for row, given in enumerate(params)]
    for processor in stateful:
        processor.update_state(library.BatchUpdate(batch_size=len(params), removed=[], added=added, moved=[]))
    return made


def probe_metadata(config: Any, device: Any, params: list[Any]) -> Any:
    """vLLM's SamplingMetadata for one row a request. Its fields differ between releases."""
    import torch
    from vllm.v1.sample.metadata import SamplingMetadata

    def column(name: str, dtype: Any = torch.float32) -> Any:
        return torch.tensor([getattr(given, name) for given in params], dtype=dtype, device=device)

    top_k, count = column("top_k", torch.int32), len(params)
    values = {
        "temperature": column("temperature"), "all_greedy": False, "all_random": False, "top_p": column("top_p"),
        "top_k": torch.where(top_k > 0, top_k, PROBE_VOCAB), "generators": {}, "max_num_logprobs": PROBE_VOCAB,
        "no_penalties": False,
        "prompt_token_ids": torch.tensor([_PROMPT] * count, device=device),
        "frequency_penalties": column("frequency_penalty"), "presence_penalties": column("presence_penalty"),
        "repetition_penalties": column("repetition_penalty"), "output_token_ids": [list(_OUTPUT) for _ in params],
        "allowed_token_ids_mask": None, "bad_words_token_ids": {}, "logitsprocs": _processors(config, device, params),
        # up to 0.9.1, where the logits processors have these
        "min_p": column("min_p"), "min_tokens": {}, "logit_bias": [given.logit_bias for given in params],
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(SamplingMetadata)}
    return SamplingMetadata(**{name: value for name, value in values.items() if name in names})


def _dense(rows: Any) -> Any:
    """vLLM's (ids, logprobs) of every token as float32 [rows, vocab], on the CPU."""
    import torch

    ids, logprobs = rows.logprob_token_ids.cpu().long(), rows.logprobs.cpu()
    return torch.full((len(ids), PROBE_VOCAB), -torch.inf).scatter_(1, ids, logprobs)


def sampled_rows(sampler: Any, config: Any, device: Any) -> float:
    """The probe's settings through vLLM's sampler, in batches of as many rows as it has room for.

    ``config``: the engine's VllmConfig; ``device``: the sampler's torch.device. Returns the largest difference from V0's
    formula, in nats. Raises CheckFailed where a row keeps other tokens than V0, or is further from it than 1e-4.
    """
    import torch
    from vllm import SamplingParams

    from vllm_compat.v0_formula import Setting, processed_logprobs

    params = [SamplingParams(**{"max_tokens": 8, **given}) for given in _SETTINGS.values()]
    logits, room = self_test_logits(), config.scheduler_config.max_num_seqs  # vLLM's logits processors have no more rows
    sampled = torch.cat(
        [
            _dense(
                sampler(
                    logits=logits[first : first + room].to(device, copy=True),
                    sampling_metadata=probe_metadata(config, device, params[first : first + room]),
                ).logprobs_tensors
            )
            for first in range(0, len(params), room)
        ]
    )
    return max(
        _compare(name, sampled[row], processed_logprobs(logits[row], Setting(**given), _PROMPT, _OUTPUT))
        for row, (name, given) in enumerate(_SETTINGS.items())
    )


def _worker(worker: Any) -> str:
    import torch
    from vllm import SamplingParams
    from vllm.distributed import get_pp_group

    from vllm_compat.v0_formula import Setting, processed_logprobs

    if worker.vllm_config.speculative_config is not None:
        raise CheckFailed("speculative decoding samples elsewhere and was not proven: turn it off")
    if worker.model_config.runner_type != "generate" or not get_pp_group().is_last_rank:
        return "this process does not sample"
    runner, count = worker.model_runner, len(_SETTINGS)
    device = runner.device  # a CPU worker's own is not always set
    logits = self_test_logits()
    # Eager: the real requests compile what they need later. The noise drawn here is given back.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"), torch.inference_mode():
        worst = sampled_rows(runner.sampler, worker.vllm_config, device)
        for name, given in _SETTINGS.items():
            prompt = _prompt_rows(runner, device, logits.to(device), SamplingParams(**{"max_tokens": 8, **given}))
            for position in range(count - 1):
                expected = processed_logprobs(logits[position], Setting(**given), prompt_row=True)
                worst = max(worst, _compare(f"prompt row, {name}", prompt[position], expected))
    room = worker.vllm_config.scheduler_config.max_num_seqs
    how = "in one batch" if room >= count else f"{room} at a time"
    return f"sampler and prompt rows, {count} settings {how}, within {worst:.1g} of V0's formula"


def _prompt_rows(runner: Any, device: Any, logits: Any, params: Any) -> Any:
    """Score a made-up prompt through the runner class's own function. Returns logprobs [rows, vocab]."""
    import torch

    length, score = len(logits) + 1, type(runner)._get_prompt_logprobs_dict
    request = SimpleNamespace(
        prompt_token_ids=list(range(length)), in_progress_prompt_logprobs_cpu=None, num_computed_tokens=0, sampling_params=params
    )
    first = torch.zeros(1, dtype=torch.int64).numpy()
    stand_in = SimpleNamespace(
        requests={"probe": request}, device=device, sampler=runner.sampler, model_config=runner.model_config,
        input_batch=SimpleNamespace(req_id_to_index={"probe": 0}, in_progress_prompt_logprobs_cpu={}),
        query_start_loc=SimpleNamespace(np=first), query_start_loc_np=first,
        model=SimpleNamespace(compute_logits=lambda hidden, *_: hidden.clone()),
        _sync_device=getattr(runner, "_sync_device", None),
    )  # fmt: skip
    holder = stand_in if hasattr(runner, "num_prompt_logprobs") else stand_in.input_batch
    holder.num_prompt_logprobs = {"probe": PROBE_VOCAB}
    scheduled: Any = {"probe": length}
    if "scheduler_output" in inspect.signature(score).parameters:  # up to 0.10.1.1
        scheduled = SimpleNamespace(num_scheduled_tokens=scheduled)
    return _dense(score(stand_in, logits, scheduled)["probe"])


BEHAVIOR = Behavior(
    name="processed_logprobs",
    v0="logprobs of the distribution sampled from: penalties, temperature, top-k, top-p, then min-p; prompt rows too",
    v1="log-softmax of the raw logits; by option processed, but min-p first and prompt rows raw",
    cost="importance ratios and KL are computed from another distribution than the tokens were drawn from",
    routes=(
        NotNeeded(versions=V0_RELEASES, runners=("v0",), reason="this is V0"),
        # Only watches: V0's FlashInfer sampler, off by default, returns logprobs before top-k and top-p.
        Native(
            versions=V0_RELEASES,
            runners=("v0",),
            option=_FLASHINFER,
            value=f"{_FLASHINFER}=0",
            read=lambda environ: environ.get(_FLASHINFER, UNSET),
            write=lambda environ: None,
            accepts=lambda given: given.strip() in ("", "0"),
            env=True,
        ),
        Patch(
            name="v0_sample",
            versions=_NO_OPTION,
            role=Role.WORKER,
            target=Target(path="vllm.v1.sample.sampler:Sampler.sample", params=("logits", "sampling_metadata")),
            build=_build_v0_sample,
            upstream="https://github.com/vllm-project/vllm/pull/21398 and its successors, complete in 0.11.0",
            remove_when="the floor is vLLM 0.10.2",
        ),
        Patch(
            name="v0_gather",
            versions=_NO_OPTION,
            role=Role.WORKER,
            target=Target(
                path="vllm.v1.sample.sampler:Sampler.gather_logprobs", params=("logprobs", "num_logprobs", "token_ids")
            ),
            build=_build_v0_gather,
            upstream="https://github.com/vllm-project/vllm/pull/21398 and its successors, complete in 0.11.0",
            remove_when="the floor is vLLM 0.10.2",
        ),
        engine_arg("logprobs_mode", "processed_logprobs", versions=">=0.10.0"),
        Patch(
            name="greedy_temperature",
            versions=">=0.10.2,<0.11.0",
            role=Role.WORKER,
            target=Target(path="vllm.v1.sample.sampler:Sampler.apply_temperature", params=("logits", "temp")),
            build=_build_temperature,
            upstream="vllm/v1/sample/sampler.py of 0.10.2 divides greedy rows by -1; mended in 0.11.0",
            remove_when="the floor is vLLM 0.11.0",
        ),
        Patch(
            name="min_p_last",
            versions=">=0.10.2",
            role=Role.WORKER,
            target=Target(path="vllm.v1.sample.sampler:Sampler.sample", params=("logits", "sampling_metadata")),
            build=_build_sample,
            upstream="vllm/v1/sample/sampler.py applies argmax-invariant processors before top-k/top-p",
            remove_when="vLLM filters by min-p after top-k/top-p",
        ),
        Patch(
            name="prompt_rows",
            versions=V1_RELEASES,
            role=Role.WORKER,
            target=Target(
                path="vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict", params=("hidden_states",)
            ),
            build=_build_prompt,
            upstream="https://github.com/vllm-project/vllm/issues/47680: prompt rows skip the sampling processors",
            remove_when="logprobs_mode='processed_logprobs' covers prompt rows",
        ),
        Unsupported(
            versions=V2_RELEASES,
            runners=("v2",),
            reason="Model Runner V2 scores prompts raw and filters by min-p first: let model_runner_v1 pin Model Runner V1",
        ),
    ),
    checks=(Check(name="sampler", role=Role.WORKER, run=_worker),),
    relies_on=(
        Target(path="vllm.v1.sample.sampler:Sampler.compute_logprobs", params=("logits",)),
        Target(path="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p", params=("logits", "k", "p")),
        Target(path="vllm.v1.sample.sampler:Sampler.apply_min_p", params=("logits", "min_p"), versions="<0.9.2"),
        Target(path="vllm.v1.sample.logits_processor:MinPLogitsProcessor.apply", params=("logits",), versions=">=0.9.2,<0.10.1"),
        Target(path="vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor.apply", params=("logits",), versions=">=0.10.1"),
        Target(path="vllm.v1.sample.sampler:Sampler.forward", params=("logits", "sampling_metadata")),
    ),
)
