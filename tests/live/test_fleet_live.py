"""Two engines in actors on two nodes of a Ray cluster, one coordinator: one version everywhere, or who has what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_model import make
from replay import expected_logprobs

PROMPT = [7, 20, 33, 5]

CLUSTER = """
import asyncio, json, os, sys, time
import ray
from ray.cluster_utils import Cluster
import vllm_compat
from vllm_compat.weights.fleet import AsyncRayEngine, FleetUpdateError, RayEngine, ray_runtime_env, update_engines

ENGINE = dict(dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512)

def row(out):
    best = out.outputs[0]
    return {"tokens": list(best.token_ids), "versions": list(best.token_weight_versions),
            "logprobs": [r[t].logprob for r, t in zip(best.logprobs, best.token_ids)]}

def params(tokens):
    from vllm import SamplingParams
    return SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0)

class Sync(RayEngine):
    def __init__(self, model):
        from vllm import LLM
        self.llm = LLM(model=model, **ENGINE)

    def about(self):
        return [vllm_compat.status(self.llm).proven, ray.get_runtime_context().get_node_id(), os.getpid(),
                os.environ.get("VLLM_COMPAT_PROFILE")]

    def ask(self, tokens=12):
        (out,) = self.llm.generate([{"prompt_token_ids": [7, 20, 33, 5]}], params(tokens), use_tqdm=False)
        return row(out)

    def sleep(self, seconds):
        time.sleep(seconds)

class Async(AsyncRayEngine):
    def __init__(self, model):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **ENGINE))
        self.tokens = 0

    async def about(self):
        status = await vllm_compat.status(self.llm)
        return [status.proven, ray.get_runtime_context().get_node_id(), os.getpid(), os.environ.get("VLLM_COMPAT_PROFILE")]

    async def ask(self, tokens=12):
        async for out in self.llm.generate({"prompt_token_ids": [7, 20, 33, 5]}, params(tokens), f"r{time.monotonic()}"):
            self.tokens = len(out.outputs[0].token_ids)
        return row(out)

    async def so_far(self):
        return self.tokens

def told(call):
    try:
        return {"results": [vars(one) for one in call()], "error": ""}
    except FleetUpdateError as error:
        return {"results": [vars(one) for one in error.results], "error": str(error)}

if __name__ == "__main__":
    old, new, broken = sys.argv[1:]
    node = dict(num_cpus=1, object_store_memory=100 * 2**20)
    cluster = Cluster(initialize_head=True, head_node_args={**node, "resources": {"first": 1}, "include_dashboard": False})
    cluster.add_node(**node, resources={"second": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    found = {}
    try:
        def actor(cls, place):
            made = ray.remote(cls).options(num_cpus=0, resources={place: 1}, runtime_env=ray_runtime_env())
            return made.remote(old)
        a = actor(Async, "first")
        found["about"] = [ray.get(a.about.remote())]  # one after the other: two cores
        b = actor(Sync, "second")
        found["about"].append(ray.get(b.about.remote()))
        found["before"] = ray.get([a.ask.remote(), b.ask.remote()])

        running = a.ask.remote(480)
        while ray.get(a.so_far.remote()) in (0, 12):
            time.sleep(0.02)
        began = time.perf_counter()
        found["update"] = told(lambda: update_engines([a, b], new, timeout=60))
        found["update"]["seconds"] = time.perf_counter() - began
        found["running"] = ray.get(running)
        found["after"] = ray.get([a.ask.remote(), b.ask.remote()])

        found["broken"] = told(lambda: update_engines([a, b], [old, broken], timeout=60))
        found["other bytes"] = told(lambda: update_engines([a, b], [old, new], timeout=60))
        asleep = b.sleep.remote(6)
        found["straggler"] = told(lambda: update_engines([a, b], old, timeout=2))
        ray.get(asleep)
        found["still"] = ray.get([a.ask.remote(), b.ask.remote()])
        ray.kill(b)
        found["killed"] = told(lambda: update_engines([a, b], old, timeout=20))
        found["intact"] = ray.get(a.ask.remote())
        found["alone"] = told(lambda: update_engines([a], old, version=9, timeout=60))
        found["last"] = ray.get(a.ask.remote())
        print("RESULT " + json.dumps(found), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("weights")
    made = make(folder / "old", seed=0), make(folder / "new", seed=1)
    (folder / "broken").mkdir()
    (folder / "broken" / "model.safetensors").write_bytes((folder / "new" / "model.safetensors").read_bytes()[:-1000])
    return *made, folder / "broken"


def worst(weights: Path, request: dict) -> float:
    expected = expected_logprobs(weights, weights, PROMPT, request["tokens"], 0)
    return max(abs(a - b) for a, b in zip(expected, request["logprobs"], strict=True))


def test_two_engines_on_two_nodes(run_python, weights) -> None:
    """Proven on both nodes; one call updates both in flight; a broken file, other bytes, a straggler and a dead actor are
    reported by engine, and no engine is left with other weights than the rest."""
    old, new, broken = weights
    found = run_python(CLUSTER, str(old), str(new), str(broken), environment={"RAY_USAGE_STATS_ENABLED": "0"}).ok().result
    about = found["about"]
    assert [(proven, profile) for proven, _, _, profile in about] == [(True, "auto"), (True, "auto")]
    assert len({node for _, node, _, _ in about}) == 2

    def states(name: str) -> list[tuple[str, int | None]]:
        return [(one["state"], one["version"]) for one in found[name]["results"]]

    assert all(worst(old, one) < 1e-4 for one in found["before"])
    assert (found["update"]["error"], states("update")) == ("", [("updated", 1), ("updated", 1)])
    running = found["running"]
    assert (len(running["tokens"]), set(running["versions"])) == (480, {0, 1})
    at = running["versions"].index(1)
    expected = expected_logprobs(old, new, PROMPT, running["tokens"], at)
    assert max(abs(x - y) for x, y in zip(expected, running["logprobs"], strict=True)) < 1e-4
    assert all(worst(new, one) < 1e-4 and set(one["versions"]) == {1} for one in found["after"])

    assert states("broken") == states("other bytes") == [("old", 1), ("old", 1)]
    assert "damaged or not whole" in found["broken"]["results"][1]["error"]
    assert found["broken"]["results"][0]["error"] == ""
    assert "received other bytes" in found["other bytes"]["error"]
    assert states("straggler")[0] == ("old", 1)
    assert found["straggler"]["results"][1]["state"] == "unknown"
    assert "no answer to version within 2 s" in found["straggler"]["results"][1]["error"]
    assert all(worst(new, one) < 1e-4 and set(one["versions"]) == {1} for one in found["still"])

    assert states("killed") == [("old", 1), ("unknown", None)]
    assert "ActorDiedError" in found["killed"]["results"][1]["error"]
    assert worst(new, found["intact"]) < 1e-4
    assert states("alone") == [("updated", 9)]
    assert worst(old, found["last"]) < 1e-4
    assert set(found["last"]["versions"]) == {9}
    print(json.dumps(found["update"]))
