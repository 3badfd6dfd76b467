"""An `AsyncLLM` with many requests in flight, whose weights change again and again: what every request got, and when.

    python updates.py MODEL FOLDER [--updates N] [--requests N] [--bare] [--seed N] [--engine-args JSON]

FOLDER holds one folder per update, ``000`` on, each with a model.safetensors: of all parameters, which `update.load` takes, or
of RMSNorm weights alone, which are copied in place, one parameter per call (why norms: see `norms`). ``--bare``: then one
more, sent to fresh requests by the same calls, with no hook around them and with steps in between. Prints RESULT and JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import vllm_compat  # isort: skip  (takes effect on import: before vLLM's)
from safetensors import safe_open
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

if os.environ.get("ASYNC_ON_CPU"):
    import async_on_cpu  # noqa: F401


class ParameterLoader:
    """``worker_extension_cls``: one parameter per call, in place, as many trainers send them."""

    def runs_ahead(self) -> bool:
        return bool(getattr(self.model_runner, "use_async_scheduling", False))

    def load_parameter(self, folder: str, name: str) -> bool:
        held = dict(self.model_runner.model.named_parameters())[name]
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            held.data.copy_(file.get_tensor(name).to(held.dtype))
        return True


class Load:
    """``count`` requests in flight, of random lengths; each that ends is followed by another until `stop`."""

    def __init__(self, engine: AsyncLLM, count: int, lengths: tuple[int, int], name: str, seed: int) -> None:
        self.engine, self.lengths, self.name, self.random = engine, lengths, name, random.Random(seed)
        self.made: list[dict[str, Any]] = []
        self.going = True
        self.running = [asyncio.create_task(self._line()) for _ in range(count)]

    async def _line(self) -> None:
        while self.going:
            await self._ask()

    async def _ask(self) -> None:
        prompt = [self.random.randrange(290) for _ in range(self.random.randint(3, 30))]
        asked = self.random.randint(*self.lengths)
        mine: dict[str, Any] = {
            "prompt": prompt, "asked": asked, "tokens": [], "logprobs": [], "versions": [], "ends": 0, "ids": [],
        }  # fmt: skip
        name = f"{self.name}-{len(self.made)}"
        delta = len(self.made) % 2 == 0
        self.made.append(mine)
        params = SamplingParams(
            temperature=1.0, max_tokens=asked, ignore_eos=True, logprobs=0,
            output_kind=RequestOutputKind.DELTA if delta else RequestOutputKind.CUMULATIVE,
        )  # fmt: skip
        async for out in self.engine.generate({"prompt_token_ids": prompt}, params, name):
            part, had = out.outputs[0], 0 if delta else len(mine["tokens"])
            assert list(part.token_ids[:had]) == mine["tokens"][:had], "a stream took back what it had said"
            mine["tokens"] += part.token_ids[had:]
            rows = zip(part.logprobs, part.token_ids, strict=True)
            mine["logprobs"] += [row[token].logprob for row, token in rows][had:]
            mine["versions"] += part.token_weight_versions[had:]
            mine["ends"] += out.finished
            if out.request_id not in mine["ids"]:
                mine["ids"].append(out.request_id)

    def unfinished(self) -> list[dict[str, Any]]:
        return [mine for mine in self.made if not mine["ends"]]

    def tokens(self) -> int:
        return sum(len(mine["tokens"]) for mine in self.made)

    async def more(self, tokens: int) -> None:
        """Wait until every unfinished request of now has so many tokens more, or has ended."""
        await asyncio.sleep(0)  # the first requests are made
        now = [(mine, len(mine["tokens"]) + tokens) for mine in self.unfinished()]
        while any(len(mine["tokens"]) < goal and not mine["ends"] for mine, goal in now):
            await asyncio.sleep(0.002)
            for task in self.running:
                if task.done():
                    task.result()  # raises what ended it

    async def stop(self) -> None:
        self.going = False
        await asyncio.gather(*self.running)


async def send(engine: AsyncLLM, update: Any, folder: Path, pause: float) -> None:
    """All parameters by `update.load`, or norms one call after the other, with ``pause`` seconds after each."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = list(file.keys())
    if all("norm" in name for name in names):
        for name in names:
            assert all(await engine.collective_rpc("load_parameter", args=(str(folder), name)))
            await asyncio.sleep(pause)
    else:
        await update.load(str(folder))


async def main(given: argparse.Namespace) -> dict[str, Any]:
    folders = sorted(path for path in given.folder.iterdir() if path.is_dir())
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(given.model), dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=256,
            worker_extension_cls="updates.ParameterLoader", **given.engine_args,
        )
    )  # fmt: skip
    moments = random.Random(given.seed)
    load = Load(engine, given.requests, (20, 200), "request", given.seed + 1)
    await load.more(5)
    in_flight, versions, began = [], [], time.perf_counter()
    for folder in folders[: given.updates]:
        await asyncio.sleep(moments.uniform(0, 0.05))
        async with vllm_compat.weight_update(engine) as update:
            in_flight.append(len(load.unfinished()))
            versions.append(update.version)
            await send(engine, update, folder, moments.choice((0, 0, 0, 0.005)))
    seconds, tokens = time.perf_counter() - began, load.tokens()
    await load.more(8)
    await load.stop()
    found = {
        "requests": load.made, "in_flight": in_flight, "versions": versions, "seconds": seconds, "tokens_meanwhile": tokens,
        "async_scheduling": all(await engine.collective_rpc("runs_ahead")),
    }  # fmt: skip
    if given.bare:
        fresh = Load(engine, given.requests, (80, 80), "fresh", given.seed + 2)
        await fresh.more(8)
        before = [len(mine["tokens"]) for mine in fresh.made[: given.requests]]
        await send(engine, None, folders[given.updates], 0.015)
        after = [len(mine["tokens"]) for mine in fresh.made[: given.requests]]
        await fresh.stop()
        found |= {"bare": fresh.made[: given.requests], "before": before, "after": after}
    found["proven"] = (await vllm_compat.status(engine)).to_dict()["proven"]
    engine.shutdown()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine-args", type=json.loads, default={})
    print("RESULT " + json.dumps(asyncio.run(main(parser.parse_args()))))
