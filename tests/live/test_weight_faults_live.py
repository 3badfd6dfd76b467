"""What goes wrong in a weight update: the old weights are all there and the engine goes on, or it stays paused and says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from make_model import make
from replay import expected_logprobs
from safetensors.torch import load_file, save_file
from support import Ran, clean_environment

FAULTS = """
import asyncio, json, os, signal, sys
import vllm_compat
from vllm_compat.weights import update as updates
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main(old, new, broken):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3,
        max_model_len=512, worker_extension_cls="faults.Faults"))
    found, said, outs = {}, {}, {}

    async def ask(name, tokens=12):
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0)
        async for out in engine.generate({"prompt_token_ids": [7, 20, 33, 5]}, params, name):
            outs[name] = out

    def request(name):
        out = outs[name].outputs[0]
        return {"tokens": list(out.token_ids), "versions": out.token_weight_versions,
                "logprobs": [row[token].logprob for row, token in zip(out.logprobs, out.token_ids)]}

    async def changed():
        (answer,) = await engine.collective_rpc("vllm_compat_weights", args=("changes", "{}"))
        return json.loads(answer)["changed"]

    async def goes_on(name):
        asked = asyncio.create_task(ask(name))
        await asyncio.wait_for(asked, 60)
        return request(name)

    # Each of these is refused, changes nothing, and leaves the running request running.
    running = asyncio.create_task(ask("running", 480))
    while "running" not in outs:
        await asyncio.sleep(0.01)
    for name, (path, more) in json.loads(broken).items():
        try:
            async with vllm_compat.weight_update(engine) as update:
                await update.load(path, **more)
        except vllm_compat.VllmCompatError as error:
            said[name] = [str(error), *getattr(error, "__notes__", ())]
        said[name].append(await changed())
    async with vllm_compat.weight_update(engine) as update:  # also where the block swallows it
        try:
            await update.load("/nowhere")
        except vllm_compat.VllmCompatError:
            pass
    found["version after refusals"] = updates.version_of(engine)
    try:
        async with vllm_compat.weight_update(engine, version=0) as update:
            pass
    except vllm_compat.VllmCompatError as error:
        said["version"] = str(error)

    async def cancelled():
        async with vllm_compat.weight_update(engine):
            await asyncio.sleep(100)
    task = asyncio.create_task(cancelled())
    await asyncio.sleep(1)
    task.cancel()
    said["cancelled"] = [type((await asyncio.gather(task, return_exceptions=True))[0]).__name__, await changed()]

    # The loader stops half-way: rolled back.
    await engine.collective_rpc("vllm_compat_break_loader", args=(5,))  # between gate and up, which are one layer
    try:
        async with vllm_compat.weight_update(engine) as update:
            await update.load(new)
    except vllm_compat.VllmCompatError as error:
        said["loader"] = [str(error), *error.__notes__, await changed()]
    await engine.collective_rpc("vllm_compat_break_loader", args=(0,))
    found["running"] = len(outs["running"].outputs[0].token_ids)
    await running
    found["old"] = request("running")

    # A transport of the user's own breaks half-way: paused, everybody is told, and a complete update brings it back.
    running = asyncio.create_task(ask("lost", 480))
    while "lost" not in outs:
        await asyncio.sleep(0.01)
    try:
        async with vllm_compat.weight_update(engine):
            await engine.collective_rpc("vllm_compat_scale", args=("model.norm.weight", 3.0))
            raise RuntimeError("the trainer died")
    except RuntimeError as error:
        said["own"] = list(error.__notes__)
    (lost,) = await asyncio.gather(running, return_exceptions=True)
    said["waiting"] = [str(lost), str(lost.__cause__)]
    try:
        await ask("late")
    except vllm_compat.VllmCompatError as error:
        said["late"] = str(error)
    async with vllm_compat.weight_update(engine, version=7) as update:
        await update.load(new, finite=True)
    found["new"] = await goes_on("after")
    async with vllm_compat.weight_update(engine) as update:
        await update.load({"transport": "files", "path": old})
    found["again"] = await goes_on("again")

    # Weights of a transport of the user's own are in: where the loader then stops half-way, nobody has the old ones. A complete
    # update brings the engine back; also one of the user's own, after one that stopped half-way.
    async with vllm_compat.weight_update(engine):
        await engine.collective_rpc("vllm_compat_scale", args=("model.norm.weight", 3.0))
    await engine.collective_rpc("vllm_compat_break_loader", args=(5,))
    try:
        async with vllm_compat.weight_update(engine) as update:
            await update.load(new)
    except vllm_compat.VllmCompatError as error:
        said["nobody kept"] = list(error.__notes__)
    async with vllm_compat.weight_update(engine) as update:
        await update.load(new)
    found["kept"] = await goes_on("kept")
    await engine.collective_rpc("vllm_compat_break_loader", args=(5,))
    try:
        async with vllm_compat.weight_update(engine):
            await engine.collective_rpc("reload_weights", kwargs={"weights_path": old})
    except Exception as error:
        said["own half-way"] = list(error.__notes__)
    async with vllm_compat.weight_update(engine):
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": old})
    found["own"] = await goes_on("own")

    # Last, since it is the end of the engine: a process is killed inside the block.
    (pid,) = await engine.collective_rpc("vllm_compat_pid")
    running = asyncio.create_task(ask("dead", 480))
    while "dead" not in outs:
        await asyncio.sleep(0.01)
    try:
        async with vllm_compat.weight_update(engine) as update:
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(1)
            await update.load(new, timeout=20)
    except BaseException as error:
        said["killed"] = [type(error).__name__, *getattr(error, "__notes__", ())]
    (dead,) = await asyncio.wait_for(asyncio.gather(running, return_exceptions=True), 60)
    said["killed"].append(type(dead).__name__)
    print("RESULT " + json.dumps({"found": found, "said": said}), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""

RANKS = """
import json, os, signal, sys
import vllm_compat
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm_compat.weights.transports import process_group, shared_memory

if __name__ == "__main__":
    old, new = sys.argv[1:]
    llm = LLM(model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=256, tensor_parallel_size=2,
              worker_extension_cls="faults.Faults")

    def changed():
        return [json.loads(a)["changed"] for a in llm.collective_rpc("vllm_compat_weights", args=("changes", "{}"))]

    def ask():
        params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, logprobs=0)
        (out,) = llm.generate([{"prompt_token_ids": [7, 20, 33, 5]}], params, use_tqdm=False)
        best = out.outputs[0]
        return {"tokens": list(best.token_ids), "versions": best.token_weight_versions,
                "logprobs": [row[token].logprob for row, token in zip(best.logprobs, best.token_ids)]}

    said = {}
    llm.collective_rpc("vllm_compat_break_loader", args=(3, 1))  # on rank 1 only
    try:
        with vllm_compat.weight_update(llm) as update:
            update.load(new)
    except vllm_compat.VllmCompatError as error:
        said["one rank"] = [str(error), *error.__notes__]
    before, rows = changed(), {"old": ask()}
    llm.collective_rpc("vllm_compat_break_loader", args=(0,))
    try:
        with vllm_compat.weight_update(llm) as update:
            llm.collective_rpc("vllm_compat_scale", args=("model.norm.weight", 3.0, 1))
    except vllm_compat.VllmCompatError as error:
        said["ranks differ"] = str(error)
    with vllm_compat.weight_update(llm) as update:
        update.load(new)
    rows["new"] = ask()
    with shared_memory.publish(load_file(old + "/model.safetensors")) as source, vllm_compat.weight_update(llm) as update:
        update.load(source)
    rows["shared memory"] = ask()
    with process_group.Sender(2) as sender, sender.send(load_file(new + "/model.safetensors")) as source:
        with vllm_compat.weight_update(llm) as update:
            update.load(source)
    rows["process group"] = ask()
    print("RESULT " + json.dumps({"said": said, "changed": before, "rows": rows}), flush=True)
    with vllm_compat.weight_update(llm):
        os.kill(os.getpid(), signal.SIGTERM)
"""

EXTENSION = '''
import os


class Faults:
    """``worker_extension_cls``: faults that are put into a worker."""

    def vllm_compat_break_loader(self, after, rank=None):
        """From now on the model's loader raises after so many tensors; 0: no more. ``rank``: that one only."""
        model = self.model_runner.get_model()
        vars(model).pop("load_weights", None)
        if after and rank in (None, self.rank):
            whole = model.load_weights

            def load_weights(tensors):
                def some():
                    for i, pair in enumerate(tensors):
                        if i == after:
                            raise RuntimeError("the loader stops here")
                        yield pair

                calls.append(1)
                return whole(some() if len(calls) == 1 else tensors)

            calls = []
            model.load_weights = load_weights

    def vllm_compat_scale(self, name, factor, rank=None):
        if rank in (None, self.rank):
            dict(self.model_runner.get_model().named_parameters())[name].data.mul_(factor)

    def vllm_compat_pid(self):
        return os.getpid()
'''


def run_group(folder: Path, script: str, *args: str, environment: dict[str, str]) -> Ran:
    """Run a script whose engine may outlive it: its whole group ends with it."""
    (folder / "script.py").write_text(script)
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, str(folder / "script.py"), *args], env=clean_environment(**environment), cwd=folder, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(200)
            time.sleep(1)
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    return Ran(code, (folder / "log").read_text())


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("new"), seed=1)


def variants(folder: Path, model: Path) -> dict[str, tuple[str, dict]]:
    """Updates that must be refused: name -> (path, arguments of load)."""
    tensors = load_file(model / "model.safetensors")
    first = "model.layers.0.self_attn.q_proj.weight"
    changed = {
        "unknown name": {**tensors, "model.layers.9.weight": tensors[first].clone()},
        "wrong shape": {**tensors, first: tensors[first][:-1].contiguous()},
        "wrong dtype": {**tensors, first: tensors[first].to(torch.int8)},
        "missing name": {name: value for name, value in tensors.items() if name != first},
        "not finite": {**tensors, first: torch.full_like(tensors[first], float("nan"))},
    }
    found = {}
    for name, values in changed.items():
        file = folder / f"{name}.safetensors"
        save_file(values, file)
        found[name] = (str(file), {"finite": True})
    cut = folder / "cut.safetensors"
    shutil.copy(model / "model.safetensors", cut)
    with cut.open("r+b") as opened:
        opened.truncate(cut.stat().st_size - 1000)
    shards = folder / "shards"
    shards.mkdir()
    shutil.copy(model / "model.safetensors", shards / "model-00001-of-00002.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    pickled = folder / "pytorch_model.bin"
    pickled.write_bytes(b"\x80\x04N.")
    return {
        **found, "truncated file": (str(cut), {}), "missing shard": (str(shards), {}), "pickle": (str(pickled), {}),
        "no such folder": (str(folder / "nothing"), {}),
    }  # fmt: skip


def worst(weights: Path, request: dict) -> float:
    expected = expected_logprobs(weights, weights, [7, 20, 33, 5], request["tokens"], 0)
    return max(abs(a - b) for a, b in zip(expected, request["logprobs"], strict=True))


def test_every_fault(run_python, model, new_weights, tmp_path) -> None:
    """One engine, one fault after the other: what is said, what happened to weights, requests and version."""
    (tmp_path / "faults.py").write_text(EXTENSION)
    broken = variants(tmp_path, new_weights)
    ran = run_python(FAULTS, str(model), str(new_weights), json.dumps(broken), environment={"PYTHONPATH": str(tmp_path)})
    said, found = ran.result["said"], ran.result["found"]
    for name, words in {
        "unknown name": "the model has no tensor model.layers.9.weight", "wrong shape": "q_proj.weight has shape",
        "wrong dtype": "is int8", "missing name": "the update lacks model.layers.0.self_attn.q_proj.weight",
        "not finite": "values that are not finite", "truncated file": "damaged or not whole", "missing shard": "lacks the shard",
        "pickle": "only safetensors", "no such folder": "no such file or folder",
    }.items():  # fmt: skip
        text, *notes, changed = said[name]
        assert words in text, name
        assert "the engine goes on with them" in notes[-1], name
        assert changed == [], name
    assert found["version after refusals"] == 0
    assert "not newer" in said["version"]
    assert said["cancelled"] == ["CancelledError", []]
    text, *notes, changed = said["loader"]
    assert "the loader stops here" in text
    assert "vllm_compat: the old weights are back" in notes
    assert changed == []
    assert found["running"] < 480
    assert len(found["old"]["tokens"]) == 480
    assert set(found["old"]["versions"]) == {0}
    assert worst(model, found["old"]) < 1e-4  # nothing of all this reached the running request

    assert "stays paused" in said["own"][0]
    assert any("the trainer died" in text for text in said["waiting"])
    assert "the trainer died" in said["late"]
    assert set(found["new"]["versions"]) == {7}
    assert worst(new_weights, found["new"]) < 1e-4
    assert worst(model, found["new"]) > 1e-2
    assert set(found["again"]["versions"]) == {8}
    assert worst(model, found["again"]) < 1e-4
    assert any("nobody kept them" in note for note in said["nobody kept"])
    assert "stays paused" in said["nobody kept"][-1]
    assert set(found["kept"]["versions"]) == {10}
    assert worst(new_weights, found["kept"]) < 1e-4
    assert "stays paused" in said["own half-way"][-1]
    assert set(found["own"]["versions"]) == {11}
    assert worst(model, found["own"]) < 1e-4
    assert said["killed"][0] in ("EngineDeadError", "WeightUpdateError")
    assert said["killed"][-1] == "EngineDeadError"


def test_an_exception_on_one_rank(run_python, model, new_weights, tmp_path) -> None:
    """TP=2: what one rank cannot load, none has; ranks that differ afterwards are found out; each transport reaches both. A program that SIGTERM ends inside
    the block leaves an engine that never goes on (vLLM's processes outlive such a program, block or not)."""
    (tmp_path / "faults.py").write_text(EXTENSION)
    environment = {"PYTHONPATH": str(tmp_path), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    ran = run_group(tmp_path, RANKS, str(model), str(new_weights), environment=environment)
    assert ran.code == -signal.SIGTERM
    _, _, ended = ran.text.rpartition("RESULT ")
    assert "PAUSED_ALL" in ended  # inside the block: nothing brings the engine back
    assert "UNPAUSED" not in ended
    found = ran.result
    assert "the loader stops here (rank 1 of 2)" in found["said"]["one rank"][0]
    assert "the old weights are back" in found["said"]["one rank"][1]
    assert found["changed"] == [[], []]
    assert worst(model, found["rows"]["old"]) < 1e-4
    assert set(found["rows"]["old"]["versions"]) == {0}
    assert "ranks hold different weights" in found["said"]["ranks differ"]
    assert worst(new_weights, found["rows"]["new"]) < 1e-4
    assert set(found["rows"]["new"]["versions"]) == {1}
    for version, name, weights in ((2, "shared memory", model), (3, "process group", new_weights)):
        assert worst(weights, found["rows"][name]) < 1e-4
        assert set(found["rows"][name]["versions"]) == {version}
