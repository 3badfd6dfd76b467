"""Weights that the caller's own code changes in the engine's process, as TRL does when it is colocated: every token is exact, and
carries the version of its weights; nothing is taken from a cache that older weights wrote."""

from __future__ import annotations

import json

import pytest
import torch
from replay import Rollout, worst_gaps
from safetensors.torch import load_file, save_file

SCRIPT = """
import json, sys
import vllm_compat
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm_compat.weights import update as updates

def main(model, *files):
    llm = LLM(model=model, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=256,
              **json.loads(sys.argv[1]))
    engine, got, versions = llm.llm_engine, [], []
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, logprobs=0)
    inner = engine.model_executor.driver_worker.model_runner.model

    def keep(outs):
        for out in outs:
            one = out.outputs[0]
            got.append({"prompt": list(out.prompt_token_ids), "tokens": list(one.token_ids), "versions": one.token_weight_versions,
                "logprobs": [row[token].logprob for row, token in zip(one.logprobs, one.token_ids, strict=True)]})
        versions.append(updates.version_of(engine))

    def group():
        prompts = [{"prompt_token_ids": [7, 20, 33, 5] * 20 + [i]} for i in range(3)]
        keep(llm.generate(prompts, params, use_tqdm=False))

    group()
    group()
    for name, tensor in load_file(files[0]).items():  # one parameter after the other
        inner.load_weights([(name, tensor)])
    group()
    group()
    held = dict(inner.named_parameters())
    for name, tensor in load_file(files[1]).items():  # past the loader
        held[name].data[: len(tensor)].copy_(tensor)  # vLLM pads the vocabulary
    group()
    for i in range(3):
        engine.add_request(f"r{i}", {"prompt_token_ids": [9, 8, 7, i]}, params)
    outs, steps = {}, 0
    while engine.has_unfinished_requests():
        for out in engine.step():
            outs[out.request_id] = out
        steps += 1
        if steps == 10:
            inner.load_weights(load_file(files[2]).items())
    keep(outs.values())
    inner.load_weights(load_file(files[2]).items())  # what they are already
    group()
    with vllm_compat.weight_update(engine):
        inner.load_weights(load_file(files[3]).items())
    group()
    found = vllm_compat.status(engine)
    print("RESULT " + json.dumps({"got": got, "versions": versions, "proven": found.proven}))

if __name__ == "__main__":
    main(*sys.argv[2:])
"""
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Four updates of every norm and of the embedding, which is also the head."""
    held, made = load_file(model / "model.safetensors"), []
    for seed in range(1, 5):
        draw, file = torch.Generator().manual_seed(seed), tmp_path_factory.mktemp("update") / "model.safetensors"
        new = {
            k: (t * (1 + 0.25 * torch.randn(t.shape, generator=draw))).to(t.dtype)
            for k, t in held.items()
            if "norm" in k or "embed" in k
        }
        save_file(new, file)
        made.append(file)
    return made


@pytest.mark.parametrize("launcher", ["in process", "external launcher"])
def test_versions_advance_with_the_weights(run_engine, engine, model, files, launcher) -> None:
    """By the loader, past it, in flight, inside a block; weights that are what they were are no update."""
    more, environment = {}, dict(IN_PROCESS)
    if engine.environment.get("VLLM_USE_V1") != "0":
        more = {"enable_prefix_caching": True, "block_size": 32}
        environment["VLLM_COMPAT_NO_PREFIX_CACHING"] = "per_version"
    if launcher == "external launcher":
        more["distributed_executor_backend"] = "external_launcher"
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    ran = run_engine(SCRIPT, json.dumps(more), str(model), *map(str, files), environment=environment).ok()
    assert ran.result["proven"]
    assert ran.result["versions"] == [0, 0, 1, 1, 2, 3, 3, 4]
    got = ran.result["got"]
    rollouts = [Rollout(one["prompt"], one["tokens"], one["versions"]) for one in got]
    in_flight = [rollout for rollout in rollouts if rollout.changes()]
    assert [(r.versions[0], r.versions[-1], len(r.changes())) for r in in_flight] == [(2, 3, 1)] * 3
    gaps = worst_gaps(model, files, rollouts, [one["logprobs"] for one in got])
    assert max(gaps) < 1e-4
    # The negative control: the update one token later.
    logprobs = [one["logprobs"] for one in got if one["versions"][0] != one["versions"][-1]]
    assert min(worst_gaps(model, files, [r.shifted(0, 1) for r in in_flight], logprobs)) > 1e-3
    assert "parameters changed outside a weight_update block, bracketed: weight version 3" in ran.text


def test_a_cache_that_knows_no_versions_is_stale(run_engine, model, files) -> None:
    """The negative control: with vLLM's own prefix caching, the same prompts after an update are served from old blocks."""
    more = json.dumps({"enable_prefix_caching": True, "block_size": 32})
    environment = {**IN_PROCESS, "VLLM_COMPAT_NO_PREFIX_CACHING": "v1"}
    got = run_engine(SCRIPT, more, str(model), *map(str, files), environment=environment).ok().result["got"]
    rollouts = [Rollout(one["prompt"], one["tokens"], one["versions"]) for one in got]
    gaps = worst_gaps(model, files, rollouts, [one["logprobs"] for one in got])
    assert max(gaps[:6]) < 1e-4  # before the first update
    assert min(gaps[6:9]) > 1e-3  # after it


REFUSED = """
import json, sys
import vllm_compat
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    llm.generate(["abc"], params, use_tqdm=False)
    llm.llm_engine.model_executor.driver_worker.model_runner.model.model.norm.weight.data.mul_(1.5)
    said = []
    for _ in range(2):
        try:
            llm.generate(["abc"], params, use_tqdm=False)
        except vllm_compat.VllmCompatError as error:
            said.append(str(error))
    print("RESULT " + json.dumps(said))
"""


def test_refused(run_engine, model) -> None:
    """Under ``refuse`` the next step raises, and so does every one after it."""
    environment = {**IN_PROCESS, "VLLM_COMPAT_UNBRACKETED_UPDATES": "refuse"}
    said = run_engine(REFUSED, str(model), environment=environment).ok().result
    assert len(said) == 2
    assert all("code in the engine's process changed model.norm.weight and 0 more parameters" in text for text in said)
