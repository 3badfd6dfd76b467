"""
A seeded request's tokens follow from its seed and its distributions, on every release with the same torch.

V0 gave every request with a ``seed`` a `torch.Generator` on the model's device. Each sampled token drew one exponential a
token of the vocabulary from it, and was ``argmax(probs / q)``, probs being the float32 softmax of the processed logits; a
prompt that was not complete drew nothing. Model Runner V1 keeps that rule where it takes torch's own path
(`TopKTopPSampler.forward_native`), and leaves it in four places:

- On a CPU, 0.11.0 to 0.28.0 ignore the generators as soon as one row of the batch has none, and from 0.32.0 a kernel makes
  Gumbel noise of its own. 0.29.0 to 0.31.0 draw as V0 did. `native_rows` sends every batch with a seeded row down torch's
  path.
- On a GPU, 0.8.5 hands FlashInfer uniform numbers of the request's generator: `native_filters` does the same for it.
- The engine argument ``use_fp64_gumbel`` draws float64 numbers, which are others (0.23.0 on).
- A row whose prompt is not complete is sampled all the same, its token dropped, and its generator set back by CUDA's count
  of numbers. A CPU's generator has no such count and stops the engine. Here the row has no generator until its prompt is
  complete (`undrawn_prefill`, `unrewound_prefill`; from 0.12.0, where the runner marks these rows).

A batch without a seeded row runs vLLM's own code. ``n > 1`` gives sample i the seed ``seed + i``, in V0 as in V1. Not
restored: V0 started a generator again when a preempted request was recomputed, V1 goes on with it; and V0's chunked prefill,
off by default, mixed up the generators of its rows.

Specification: `vllm_compat.v0_formula.sampled_token`. Upstream: vllm/v1/sample/ops/topk_topp_sampler.py. Delete when: vLLM
draws a seeded row's noise in one way on every device.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm_compat.behaviors._common import V0_RELEASES, V2_RELEASES, engine_arg
from vllm_compat.behaviors.processed_logprobs import PROBE_VOCAB, probe_metadata
from vllm_compat.patching.model import Behavior, Check, CheckFailed, NotNeeded, Patch, Role, Target, Unsupported

_SAMPLER = "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


def _build_native(original: Any, module: Any) -> Any:
    def forward(self: Any, logits: Any, generators: Any, k: Any, p: Any) -> Any:
        if generators:
            return self.forward_native(logits, generators, k, p)
        return original(self, logits, generators, k, p)

    return forward


def _build_whole_prompts(original: Any, module: Any) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators  # row -> generator; the sampler's metadata holds the same dictionary
        partial = {row: generators[row] for row in generators if self.discard_request_mask.np[row]}
        for row in partial:
            del generators[row]
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(partial)

    return method


# --- the self-test of a worker --------------------------------------------------------------------------------

# One batch: seeded rows beside a greedy and an unseeded one. No row's filters depend on their order, which is another
# behavior's business.
_ROWS: dict[str, dict[str, Any]] = {
    "T=1": {"seed": 11},
    "T=0.7 top-p 0.9": {"temperature": 0.7, "top_p": 0.9, "seed": 12},
    "greedy": {"temperature": 0.0, "seed": 13},
    "top-k 9": {"top_k": 9, "seed": 0},
    "unseeded": {},
    "T=1.3 min-p 0.05": {"temperature": 1.3, "min_p": 0.05, "seed": 11},
}
_STEPS = 4


def _worker(worker: Any) -> str:
    import torch
    from vllm import SamplingParams
    from vllm.distributed import get_pp_group

    from vllm_compat.v0_formula import GREEDY_BELOW, Setting, processed_logprobs, sampled_token

    if worker.model_config.runner_type != "generate" or not get_pp_group().is_last_rank:
        return "this process does not sample"
    runner = worker.model_runner
    device = runner.device
    params = [SamplingParams(**{"max_tokens": 8, **given}) for given in _ROWS.values()]
    seeded = [row for row, given in enumerate(params) if given.seed is not None and given.temperature >= GREEDY_BELOW]
    # the engine's generators, and as many of our own
    live, ours = ({row: torch.Generator(device=device).manual_seed(params[row].seed) for row in seeded} for _ in range(2))
    metadata = dataclasses.replace(probe_metadata(worker.vllm_config, device, params), generators=live)
    noise = torch.Generator().manual_seed(20250506)
    # Eager: the real requests compile what they need later. The unseeded row's noise is given back.
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"), torch.inference_mode():
        for step in range(_STEPS):
            logits = torch.randn(len(params), PROBE_VOCAB, generator=noise) * 2.5
            found = runner.sampler(logits=logits.to(device, copy=True), sampling_metadata=metadata).sampled_token_ids
            for row, (name, given) in enumerate(_ROWS.items()):
                filters = {key: value for key, value in given.items() if key != "seed"}
                logprobs, token = processed_logprobs(logits[row], Setting(**filters)), int(found[row, 0])
                if row in ours:
                    expected = sampled_token(logprobs, ours[row])
                    if token != expected:
                        raise CheckFailed(f"{name}, seed {given['seed']}, step {step}: token {token}, V0's is {expected}")
                elif name == "greedy" and token != int(logprobs.argmax()):
                    raise CheckFailed(f"{name}: token {token}, V0's is {int(logprobs.argmax())}")
    return f"{len(seeded)} seeded rows beside a greedy and an unseeded one, {_STEPS} steps: V0's tokens"


BEHAVIOR = Behavior(
    name="seeded_sampling",
    v0="a seeded request draws its noise from its own generator, one exponential a token of the vocabulary each step",
    v1="on a CPU the generator is ignored beside unseeded rows, or seeds other noise (from vLLM 0.32.0); float64 by option",
    cost="one seed gives other tokens on another release, and on some beside other requests",
    routes=(
        NotNeeded(versions=V0_RELEASES, runners=("v0",), reason="this is V0"),
        NotNeeded(versions=">=0.9.0,<0.11.0", reason="this release draws a seeded row's noise as V0 did"),
        Patch(
            name="native_filters",
            versions=">=0.8.5,<0.9.0",
            role=Role.WORKER,
            target=Target(path=f"{_SAMPLER}.forward_cuda", params=("logits", "generators", "k", "p")),
            build=_build_native,
            upstream="FlashInfer before 0.2.3 takes uniform numbers; vLLM 0.9.0 falls back to torch for seeded rows",
            remove_when="the floor is vLLM 0.9.0",
        ),
        engine_arg("use_fp64_gumbel", False, versions=">=0.23.0"),
        Patch(
            name="native_rows",
            versions=">=0.11.0",
            role=Role.WORKER,
            target=Target(path=f"{_SAMPLER}.forward_cpu", params=("logits", "generators", "k", "p")),
            build=_build_native,
            upstream="vllm/v1/sample/ops/topk_topp_sampler.py: forward_cpu has noise of its own, another from 0.32.0 on",
            remove_when="forward_cpu draws a seeded row's exponentials from its generator",
        ),
        Patch(
            name="undrawn_prefill",
            versions=">=0.12.0",
            role=Role.WORKER,
            target=Target(path=f"{_RUNNER}._sample"),
            build=_build_whole_prompts,
            upstream="vllm/v1/worker/gpu_model_runner.py samples rows whose prompt is not complete",
            remove_when="Model Runner V1 does not sample them",
        ),
        Patch(
            name="unrewound_prefill",
            versions=">=0.12.0",
            role=Role.WORKER,
            target=Target(path=f"{_RUNNER}._bookkeeping_sync"),
            build=_build_whole_prompts,
            upstream="vllm/v1/worker/gpu_model_runner.py: set_offset(get_offset() - 4), which a CPU's generator has not",
            remove_when="Model Runner V1 does not sample them",
        ),
        Unsupported(
            versions=V2_RELEASES,
            runners=("v2",),
            reason="Model Runner V2 makes its own counter-based noise: let model_runner_v1 pin Model Runner V1",
        ),
    ),
    checks=(Check(name="seeded tokens", role=Role.WORKER, run=_worker),),
    relies_on=(
        Target(path=f"{_SAMPLER}.forward_native", params=("logits", "generators", "k", "p")),
        Target(path="vllm.v1.sample.ops.topk_topp_sampler:random_sample", params=("probs", "generators")),
    ),
)
