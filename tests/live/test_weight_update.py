"""`weight_update`: token k from the old weights, token k+1 from the new over the kept KV cache, to float32 precision."""

from __future__ import annotations

import pytest
from make_model import make
from replay import expected_logprobs

ASYNC = """
import asyncio, json, sys
import vllm_compat
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main(old, new, count=8):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512))
    got = {}

    async def ask(name, tokens):
        params = SamplingParams(temperature=1.0 if name != "0" else 0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        async for out in engine.generate({"prompt_token_ids": [7, 20 + len(got), 33]}, params, name):
            got[name] = out

    def lengths():
        return {name: len(out.outputs[0].token_ids) for name, out in got.items()}

    running = [asyncio.create_task(ask(str(i), 240)) for i in range(count)]
    while len(got) < count or min(lengths().values()) < 30:
        await asyncio.sleep(0.01)
    refused = {}
    try:
        with vllm_compat.weight_update(engine):
            pass
    except vllm_compat.VllmCompatError as error:
        refused["with"] = str(error)
    async with vllm_compat.weight_update(engine):
        changed_at = None
        while changed_at != lengths():  # outputs of the last step reach this process
            changed_at = lengths()
            await asyncio.sleep(0.3)
        running.append(asyncio.create_task(ask("late", 20)))
        try:
            async with vllm_compat.weight_update(engine):
                pass
        except vllm_compat.VllmCompatError as error:
            refused["second"] = str(error)
        await asyncio.sleep(0.5)
        moved = lengths() != changed_at
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": new})
        await asyncio.sleep(0.2)
        moved = moved or lengths() != changed_at
    await asyncio.gather(*running)
    status = (await vllm_compat.status(engine)).to_dict()
    requests = {
        name: {"prompt": out.prompt_token_ids, "tokens": list(out.outputs[0].token_ids), "changed_at": changed_at.get(name, 0),
               "logprobs": [row[token].logprob for row, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)]}
        for name, out in got.items()
    }
    print("RESULT " + json.dumps({"moved": moved, "refused": refused, "proven": status["proven"], "requests": requests}))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""

SYNC = """
import json, sys
import vllm_compat
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    old, new = sys.argv[1:]
    llm = LLM(model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512)
    engine = llm.llm_engine
    got, changed_at, refused = {}, {}, {}
    for i in range(4):
        params = SamplingParams(temperature=1.0, max_tokens=400, ignore_eos=True, logprobs=0)
        engine.add_request(str(i), {"prompt_token_ids": [9, 40 + i, 12]}, params)

    def step():
        for out in engine.step():
            got[out.request_id] = out

    while len(got) < 4 or min(len(o.outputs[0].token_ids) for o in got.values()) < 20:
        step()
    for changes in (False, True):
        try:
            with vllm_compat.weight_update(llm):
                if changes:
                    llm.collective_rpc("reload_weights", kwargs={"weights_path": new})
                raise RuntimeError("the trainer's transport broke")
        except RuntimeError as error:
            refused["changed" if changes else "unchanged"] = error.__notes__
        try:
            step()
        except vllm_compat.VllmCompatError as error:
            refused["step"] = [changes, str(error)]
    real = engine.engine_core.call_utility
    def broken(method, *args):
        if args[0] == "begin":
            raise KeyboardInterrupt
        return real(method, *args)
    engine.engine_core.call_utility = broken
    try:
        with vllm_compat.weight_update(llm):
            pass
    except KeyboardInterrupt:
        pass
    engine.engine_core.call_utility = real
    refused["paused"] = real("is_scheduler_paused")
    with vllm_compat.weight_update(llm):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": new})
    while engine.has_unfinished_requests():
        step()
    requests = {
        name: {"prompt": out.prompt_token_ids, "tokens": list(out.outputs[0].token_ids),
               "logprobs": [row[token].logprob for row, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)],
               "versions": out.outputs[0].token_weight_versions, "kv": out.outputs[0].kv_weight_versions[-1]}
        for name, out in got.items()
    }
    print("RESULT " + json.dumps({"refused": refused, "requests": requests}))
"""


def _worst(old, new, request, changed_at) -> float:
    expected = expected_logprobs(old, new, request["prompt"], request["tokens"], changed_at)
    return max(abs(a - b) for a, b in zip(expected, request["logprobs"], strict=True))


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory):
    return make(tmp_path_factory.mktemp("new"), seed=1)


def test_async_llm(run_python, model, new_weights) -> None:
    """Eight requests in flight: every logprob is exact, a request that came meanwhile waited, nothing moved inside."""
    found = run_python(ASYNC, str(model), str(new_weights)).ok().result
    assert found["proven"]
    assert not found["moved"]
    assert "async with" in found["refused"]["with"]
    assert "one at a time" in found["refused"]["second"]
    assert set(found["requests"]) == {*(str(i) for i in range(8)), "late"}
    for name, request in found["requests"].items():
        at = request["changed_at"]
        assert len(request["tokens"]) == (20 if name == "late" else 240)
        assert _worst(model, new_weights, request, at) < 1e-4, name
        if at:  # the negative control: one token later or earlier is not what happened
            assert _worst(model, new_weights, request, at + 1) > 1e-3, name
            assert _worst(model, new_weights, request, at - 1) > 1e-3, name


def test_llm(run_python, model, new_weights) -> None:
    """`LLM`: the change falls between two tokens of each request, and each token carries its version. A block that breaks goes on
    with the old weights where they are all there; else the engine stays paused, steps say why, also when the next update is
    interrupted on its way in, and a complete one brings it back."""
    found = run_python(SYNC, str(model), str(new_weights)).ok().result
    assert found["refused"]["paused"]
    assert "goes on with them" in found["refused"]["unchanged"][0]
    assert "stays paused" in found["refused"]["changed"][0]
    assert found["refused"]["step"][0] is True
    assert "RuntimeError: the trainer's transport broke" in found["refused"]["step"][1]
    for request in found["requests"].values():
        assert len(request["tokens"]) == 400
        old = expected_logprobs(model, model, request["prompt"], request["tokens"], 0)
        # the first token that the old weights do not explain
        at = next(i for i, (a, b) in enumerate(zip(old, request["logprobs"], strict=True)) if abs(a - b) > 1e-3)
        assert 20 <= at < 400
        assert _worst(model, new_weights, request, at) < 1e-4
        assert _worst(model, new_weights, request, at + 1) > 1e-3
        assert _worst(model, new_weights, request, at - 1) > 1e-3
        assert request["versions"] == [0] * at + [1] * (400 - at)
        assert request["kv"] == [0, 1]
