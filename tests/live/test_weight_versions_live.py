"""Versions per token on a real engine: they are those whose exact replay gives the logprobs, also of requests that were preempted."""

from __future__ import annotations

import pytest
import torch
from replay import Rollout, worst_gaps
from safetensors.torch import load_file, save_file

SCRIPT = """
import asyncio, json, sys
import vllm_compat
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

KINDS = (RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)

async def main(model, *folders):
    # 36 blocks hold about half of these requests at their end: some are preempted
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=model, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=256, block_size=32,
        num_gpu_blocks_override=36, worker_extension_cls="norms.NormLoader"))
    got = {}

    async def ask(number, prompt, count):
        mine = got[number] = {"prompt": prompt, "tokens": [], "logprobs": [], "versions": [], "kv": [], "native": []}
        kind = KINDS[number % 3]
        params = SamplingParams(temperature=1.0, max_tokens=count, ignore_eos=True, logprobs=0, output_kind=kind)
        async for out in engine.generate({"prompt_token_ids": prompt}, params, str(number)):
            part = out.outputs[0]
            if kind is not RequestOutputKind.DELTA:
                for key in ("tokens", "logprobs", "versions", "kv"):
                    mine[key].clear()
            mine["tokens"] += part.token_ids
            mine["logprobs"] += [row[token].logprob for row, token in zip(part.logprobs, part.token_ids, strict=True)]
            mine["versions"] += part.token_weight_versions
            mine["kv"] += part.kv_weight_versions
            if out.finished:
                mine["native"] = [(span.version, span.start, span.end) for span in part.weight_versions]

    running = [asyncio.create_task(ask(i, [7, 20 + i, 33] * (2 + i % 5), 150 + 3 * i)) for i in range(12)]
    for number, folder in enumerate(folders, 1):
        while len(got) < 12 or min(len(got[i]["tokens"]) for i in range(12) if i % 3 != 2) < 30 * number:
            await asyncio.sleep(0.002)
            for task in running:
                if task.done():
                    task.result()
        async with vllm_compat.weight_update(engine):
            for half in (0, 1):
                await engine.collective_rpc("load_norms", args=(folder, half))
        running.append(asyncio.create_task(ask(100 + number, [9, 9, number], 25)))
    await asyncio.gather(*running)
    engine.shutdown()
    print("RESULT " + json.dumps(got))

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def updates(model, tmp_path_factory):
    """Three updates of every norm."""
    held, made = load_file(model / "model.safetensors"), []
    for seed in (1, 2, 3):
        draw, folder = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("update")
        new = {k: (t * (1 + 0.25 * torch.randn(t.shape, generator=draw))).to(t.dtype) for k, t in held.items() if "norm" in k}
        save_file(new, folder / "model.safetensors")
        made.append(folder)
    return made


def runs(values: list) -> list:
    return [(i, value) for i, value in enumerate(values) if not i or value != values[i - 1]]


def test_versions_are_what_computed_each_token(run_engine, model, updates) -> None:
    """Deltas, cumulative and final outputs: the versions, and those of the KV cache, replay to the exact logprobs."""
    got = run_engine(SCRIPT, str(model), *map(str, updates)).ok().result
    files = [folder / "model.safetensors" for folder in updates]
    kept, renewed, as_if_kept = [], [], []
    for number, one in got.items():
        assert (
            len(one["tokens"]) == len(one["versions"]) == len(one["kv"]) == (25 if int(number) >= 100 else 150 + 3 * int(number))
        )
        # vLLM's own, of finished outputs: what it calls "default" is our version 0
        native = [(start, 0 if version == "default" else int(version)) for version, start, _ in one["native"]]
        assert native == [(i, version) for i, version in runs(one["versions"])]
        # The first token of the last time that its KV cache was computed anew: a version is gone from it.
        at = max((i for i in range(1, len(one["kv"])) if not set(one["kv"][i - 1]) <= set(one["kv"][i])), default=0)
        for i, versions in enumerate(one["kv"][at:], at):
            assert versions == sorted(set(one["versions"][at : i + 1])), (number, i)
        whole = Rollout(one["prompt"], one["tokens"], one["versions"])
        tail = Rollout(one["prompt"] + one["tokens"][:at], one["tokens"][at:], one["versions"][at:])
        (renewed if at else kept).append((tail, one["logprobs"][at:]))
        if at:
            as_if_kept.append((whole, one["logprobs"]))
    moved = [(rollout.shifted(0, 1), logprobs) for rollout, logprobs in kept if rollout.changes()]
    assert moved
    assert renewed
    assert max(worst_gaps(model, files, *zip(*kept, *renewed, strict=True))) < 1e-4
    # The negative controls: an update one token later, and a preempted request whose old KV had stayed.
    assert min(worst_gaps(model, files, *zip(*moved, strict=True))) > 1e-3
    assert min(worst_gaps(model, files, *zip(*as_if_kept, strict=True))) > 1e-3
