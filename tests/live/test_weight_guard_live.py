"""Calls that change weights outside a block: bracketed as one update, or refused; recognised by checksums, or by their names."""

from __future__ import annotations

import shutil

import pytest
from make_model import make
from replay import Rollout, expected_logprobs, worst_gaps
from safetensors.torch import load_file, save_file

GUARDED = """
import asyncio, json, sys
import vllm_compat
from vllm_compat.weights import guard, update as updates
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main(old, new):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3,
        max_model_len=512, worker_extension_cls="halves.HalfLoader"))
    outs, said = {}, {}

    async def ask(name):
        params = SamplingParams(temperature=1.0, max_tokens=300, ignore_eos=True, logprobs=0)
        async for out in engine.generate({"prompt_token_ids": [7, 20 + int(name), 33]}, params, name):
            outs[name] = out

    def refused(name, results):
        said[name] = [f"{type(r).__name__}: {r} {r.__cause__}" for r in results if isinstance(r, Exception)]

    running = [asyncio.create_task(ask(str(i))) for i in range(4)]
    while len(outs) < 4 or min(len(out.outputs[0].token_ids) for out in outs.values()) < 20:
        await asyncio.sleep(0.01)
    await engine.collective_rpc("check_health")
    said["harmless"] = [updates.version_of(engine), len(guard._open)]
    refused("named", await asyncio.gather(*([engine.collective_rpc("reload_weights", kwargs={"weights_path": new})]
                                            if sys.argv[3] == "refuse" else []), return_exceptions=True))
    for half in (0, 1):  # one update in two calls, as transports send it
        refused(f"half {half}", await asyncio.gather(engine.collective_rpc("load_half", args=(new, half)), return_exceptions=True))
        await asyncio.sleep(0.2)
        if said[f"half {half}"]:
            break
    results = await asyncio.gather(*running, return_exceptions=True)
    refused("waiting", results)
    said["version"] = updates.version_of(engine)
    if sys.argv[3] == "bracket":
        await engine.collective_rpc("load_half", args=(old, 0))  # half an update, and then nothing
        await asyncio.sleep(2 * guard.SETTLE)
        await ask("5")
        said["after"] = [updates.version_of(engine), sorted(set(outs["5"].outputs[0].token_weight_versions))]
        found = await vllm_compat.status(engine)
        said["proven"] = found.proven
    requests = {
        name: {"prompt": out.prompt_token_ids, "tokens": list(out.outputs[0].token_ids), "versions": out.outputs[0].token_weight_versions,
               "logprobs": [row[token].logprob for row, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)]}
        for name, out in outs.items()
    }
    print("RESULT " + json.dumps({"said": said, "requests": requests, "lag": vllm_compat.lag(list(outs.values()), 2)}))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
"""


def norms_of(folder, model, other, factor=1.5):
    """The model with the norms of another one: what `halves.HalfLoader` makes of it in two calls."""
    shutil.copytree(model, folder)
    old, new = (load_file(one / "model.safetensors") for one in (model, other))
    norms = {name: new[name] * factor for name in old if "norm" in name}
    save_file({**old, **norms}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_two_calls_are_one_update(run_python, model, tmp_path, monkeypatch) -> None:
    """The engine rests from the first call to the last: every token is exact, and carries its version; half an update is named."""
    from pathlib import Path

    new = norms_of(tmp_path / "new", model, make(tmp_path / "other", seed=1))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    ran = run_python(GUARDED, str(model), str(new), "bracket").ok()
    said, requests = ran.result["said"], ran.result["requests"]
    assert said["harmless"] == [0, 0]
    assert said["named"] == said["half 0"] == said["half 1"] == said["waiting"] == []
    assert said["version"] == 1
    for name in map(str, range(4)):
        request = requests[name]
        at = request["versions"].index(1)
        assert request["versions"] == [0] * at + [1] * (300 - at)

        def worst(at, request=request):
            expected = expected_logprobs(model, new, request["prompt"], request["tokens"], at)
            return max(abs(a - b) for a, b in zip(expected, request["logprobs"], strict=True))

        assert worst(at) < 1e-4, name
        assert worst(at + 1) > 1e-3, name
        assert worst(at - 1) > 1e-3, name
    assert said["after"] == [2, [2]]
    assert said["proven"]
    assert "were not changed by this one, so it may be incomplete" in ran.text
    assert ran.result["lag"][0] == [2 - version for version in requests["0"]["versions"]]


def test_refused(run_python, model, tmp_path, monkeypatch) -> None:
    """By its name before anything changed; by what it did afterwards, with the engine at rest and everybody told."""
    from pathlib import Path

    new = norms_of(tmp_path / "new", model, make(tmp_path / "other", seed=1))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    environment = {"VLLM_COMPAT_UNBRACKETED_UPDATES": "refuse"}
    said = run_python(GUARDED, str(model), str(new), "refuse", environment=environment).ok().result["said"]
    assert "reload_weights changes weights outside a weight update" in said["named"][0]
    assert "load_half changed" in said["half 0"][0]
    assert len(said["waiting"]) == 4
    assert all("load_half changed" in text for text in said["waiting"])
    assert said["version"] == 0


PAUSED = """
import asyncio, json, sys
import vllm_compat
from vllm_compat import errors
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main(old, new):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3,
        max_model_len=512, worker_extension_cls="halves.HalfLoader"))

    async def load(source, half):
        await engine.collective_rpc("load_half", args=(source, half))

    async def pause():
        await engine.pause_generation(mode="keep", clear_cache=False)

    async def by_hand():
        await pause()
        await load(new, 0)
        await load(new, 1)
        await engine.resume_generation()

    async def inside_a_block():
        async with vllm_compat.weight_update(engine):
            await pause()
            await load(old, 0)
            await engine.resume_generation()
            await asyncio.sleep(0.2)
            await load(old, 1)

    async def around_a_block():
        await pause()
        async with vllm_compat.weight_update(engine):
            await load(new, 0)
            await load(new, 1)
        await engine.resume_generation()

    async def during(update):
        outs = []

        async def ask():
            params = SamplingParams(temperature=1.0, max_tokens=450, ignore_eos=True, logprobs=0)
            async for out in engine.generate({"prompt_token_ids": [7, 20, 33]}, params, update.__name__):
                outs[:] = [out]

        running = asyncio.create_task(ask())
        while not outs or len(outs[0].outputs[0].token_ids) < 20:
            await asyncio.sleep(0.01)
        await update()
        await running
        found = outs[0].outputs[0]
        return {
            "prompt": list(outs[0].prompt_token_ids), "tokens": list(found.token_ids), "versions": found.token_weight_versions,
            "logprobs": [row[token].logprob for row, token in zip(found.logprobs, found.token_ids)]}

    said = [await during(update) for update in (by_hand, inside_a_block, around_a_block)]
    await pause()
    try:
        async with vllm_compat.weight_update(engine):
            await load(old, 0)
            raise OSError("the sender died")
    except OSError:
        pass
    try:
        await engine.resume_generation()
        refused = None
    except errors.WeightUpdateError as error:
        refused = str(error)
    print("RESULT " + json.dumps({"said": said, "refused": refused}))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
"""


def test_the_callers_own_pause(run_python, model, tmp_path, monkeypatch) -> None:
    """Paused, updated in two calls and resumed at once, as trainers do: the first token after it has the new version. The same
    within a weight_update block and around one; and no resume goes on with weights that may be mixed."""
    from pathlib import Path

    new = norms_of(tmp_path / "new", model, make(tmp_path / "other", seed=1))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    found = run_python(PAUSED, str(model), str(new)).ok().result
    for number, said in enumerate(found["said"]):
        before, after = (model, new) if number % 2 == 0 else (new, model)
        at = said["versions"].index(number + 1)
        assert said["versions"] == [number] * at + [number + 1] * (450 - at)

        def worst(at, said=said, before=before, after=after):
            expected = expected_logprobs(before, after, said["prompt"], said["tokens"], at)
            return max(abs(a - b) for a, b in zip(expected, said["logprobs"], strict=True))

        assert worst(at) < 1e-4
        assert min(worst(at - 1), worst(at + 1)) > 1e-3
    assert "the sender died" in found["refused"]
    assert "stays paused" in found["refused"]


STEPS = """
import json, sys
import vllm_compat
from vllm import LLM, SamplingParams
from vllm_compat.weights import guard, update as updates

if __name__ == "__main__":
    looked, look = [], guard._look
    guard._look = lambda *args, **kwargs: looked.append(1) or look(*args, **kwargs)
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=256,
              worker_extension_cls="norms.NormLoader")
    engine, outs, steps, checksums = llm.llm_engine, {}, 0, []
    params = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True, logprobs=0)
    for i in range(3):
        engine.add_request(str(i), {"prompt_token_ids": [7, 20 + i, 33]}, params)
    while engine.has_unfinished_requests():
        for out in engine.step():
            outs[out.request_id] = out
        steps += 1
        if steps in (20, 40):
            before = len(looked)
            for half in (0, 1) if steps == 20 else (0,):
                llm.collective_rpc("load_norms", args=(sys.argv[1 + steps // 20], half))
            checksums.append(len(looked) - before)
    found = [[list(out.prompt_token_ids), list(out.outputs[0].token_ids), out.outputs[0].token_weight_versions,
              [row[token].logprob for row, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)]] for out in outs.values()]
    print("RESULT " + json.dumps({"found": found, "checksums": checksums, "version": updates.version_of(engine),
                                  "proven": vllm_compat.status(llm).proven}))
"""


@pytest.mark.parametrize("named", [False, True])
def test_a_synchronous_engine(run_engine, model, tmp_path, named) -> None:
    """The calls between two steps are one update, on V0 too; a method that the profile names is taken for one without checksums."""
    updates = [norms_of(tmp_path / str(factor), model, model, factor) for factor in (1.5, 0.7)]
    held, new = load_file(updates[0] / "model.safetensors"), load_file(updates[1] / "model.safetensors")
    half = sorted(name for name in new if "norm" in name)[0::2]
    save_file({name: new[name] if name in half else held[name] for name in held}, tmp_path / "half.safetensors")
    profile = tmp_path / "mine.toml"
    profile.write_text('format = 1\nname = "mine"\n[weight_update]\nmethods = ["load_norms"]\n')
    environment = {"VLLM_COMPAT_PROFILE": str(profile)} if named else {}
    ran = run_engine(STEPS, str(model), *map(str, updates), environment=environment).ok()
    assert ran.result["proven"]
    assert ran.result["version"] == 2
    assert ran.result["checksums"] == ([0, 0] if named else [2, 1])
    rollouts = [Rollout(*one[:3]) for one in ran.result["found"]]
    assert [len(rollout.changes()) for rollout in rollouts] == [2, 2, 2]
    logprobs = [one[3] for one in ran.result["found"]]
    files = [updates[0] / "model.safetensors", tmp_path / "half.safetensors"]
    assert max(worst_gaps(model, files, rollouts, logprobs)) < 1e-4
    for change in (0, 1):
        assert min(worst_gaps(model, files, [r.shifted(change, 1) for r in rollouts], logprobs)) > 1e-3
    assert "were not changed by this one, so it may be incomplete" in ran.text
