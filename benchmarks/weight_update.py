"""What a weight update costs beyond its copy: `vllm_compat.weight_update` beside vLLM's own pause and resume.

    python benchmarks/weight_update.py [--transport norms|ipc|group] [--rounds N] [--pairs N] [--window S] [--requests N]
                                       [--hidden N] [--json FILE]

One `AsyncLLM` with ``--requests`` in flight all the time. The ways, in turn, in an order that changes with the round:
``ours``, an `async with weight_update` block; ``vLLM``, ``pause_generation(mode="keep", clear_cache=False)`` and
``resume_generation()``; ``core``, the two calls to vLLM's engine core that these make, without what `AsyncLLM` adds (20 ms of
sleep). Inside each the same copy runs, and 10 ms in which outputs under way arrive. The copy is ``--transport``'s:

``norms`` (default): the model's norms, in place, by one RPC: hardly anything, so that nothing hides the rest.
``ipc``: all weights, from tensors of this process that each worker opens: CUDA IPC on a card, shared memory on a CPU; handles
go by one RPC, and vLLM's ``reload_weights`` takes them in.
``group``: all weights over `vllm_compat`'s own process group: NCCL, from a second card (a trainer may not share its card with a
worker), or Gloo on a CPU. Only ``ours`` has that transport, so there is no ratio.

``quiet``: from the call to the last rank at rest. ``next``: from the last byte to the next token at the caller. ``stall``: the
sum, which is what a way costs beyond the ``copy``, whose time has its own column. A ratio is taken within a round. ``ours``
does more before the next token: every worker tests its head against the new weights, ranks compare checksums, and the new
version reaches the outputs.

Then throughput with an update of all weights from files every 2 seconds, against none, in windows in turn. Needs a vLLM from
0.17.0 on. Exit code 1 if the median ratio of the stalls is above the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PARITY = HERE.parent / "examples" / "v0_parity"
LIMIT = 1.0
EVERY = 2.0  # seconds between updates

Way = Callable[[Any], AbstractAsyncContextManager[Any]]
Send = Callable[[Any, Any], Awaitable[None]]  # engine, what the way's block gave


class Copy:
    """``worker_extension_cls``: the norms in place, or all weights from another process's tensors, in one call."""

    def load_shared(self, pickled: str) -> int:
        """``pickled``: [(name, tensor), ...] by torch.multiprocessing, base64. Returns how many."""
        import torch.multiprocessing

        torch.multiprocessing.set_sharing_strategy("file_system")
        tensors = pickle.loads(base64.b64decode(pickled))  # from the process that started us
        self.model_runner.reload_weights(weights_iterator=iter(tensors))  # type: ignore[attr-defined]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return len(tensors)

    def copy_norms(self) -> int:
        """Returns how many were copied."""
        import torch

        names = 0
        for name, value in self.model_runner.model.named_parameters():  # type: ignore[attr-defined]
            if "norm" in name:
                value.data.copy_(value.data.clone())
                names += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return names


class Load:
    """``count`` requests in flight; each that ends is followed by another."""

    def __init__(self, engine: Any, count: int) -> None:
        self.engine, self.random = engine, random.Random(0)
        self.made = self.tokens = 0
        self.news = asyncio.Event()
        self.last = 0.0
        self.lines = [asyncio.create_task(self._line()) for _ in range(count)]

    async def _line(self) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        while True:
            self.made += 1
            params = SamplingParams(
                temperature=1.0, max_tokens=self.random.randint(100, 400), ignore_eos=True, logprobs=0,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            prompt = {"prompt_token_ids": [self.random.randrange(290) for _ in range(16)]}
            async for out in self.engine.generate(prompt, params, f"request-{self.made}"):
                self.tokens += len(out.outputs[0].token_ids)
                self.last = time.perf_counter()
                self.news.set()

    async def next(self) -> float:
        """When the next token arrives."""
        self.news.clear()
        await asyncio.wait_for(self.news.wait(), 60)
        return self.last


@asynccontextmanager
async def ours(engine: Any) -> AsyncIterator[Any]:
    import vllm_compat

    async with vllm_compat.weight_update(engine) as update:
        yield update


@asynccontextmanager
async def vllms(engine: Any) -> AsyncIterator[Any]:
    await engine.pause_generation(mode="keep", clear_cache=False)
    yield None
    await engine.resume_generation()


@asynccontextmanager
async def core(engine: Any) -> AsyncIterator[Any]:
    await engine.engine_core.call_utility_async("pause_scheduler", "keep", False)
    yield None
    await engine.engine_core.call_utility_async("resume_scheduler")


@asynccontextmanager
async def transport(given: argparse.Namespace, model: Path) -> AsyncIterator[Send]:
    """How the weights get to the workers."""
    import torch
    import torch.multiprocessing
    from safetensors.torch import load_file

    if given.transport == "norms":

        async def norms(engine: Any, _: Any) -> None:
            assert all(await engine.collective_rpc("copy_norms"))

        yield norms
        return
    cuda = torch.cuda.is_available()
    # IPC opens tensors of the worker's card; a group wants one of its own for its sender.
    device = ("cuda:0" if given.transport == "ipc" else f"cuda:{torch.cuda.device_count() - 1}") if cuda else "cpu"
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file, device=device)
    if given.transport == "ipc":
        torch.multiprocessing.set_sharing_strategy("file_system")

        async def ipc(engine: Any, _: Any) -> None:
            # Anew each time: a handle is good for one reader, once.
            pickled = base64.b64encode(bytes(ForkingPickler.dumps(list(tensors.items())))).decode()
            assert all(await engine.collective_rpc("load_shared", args=(pickled,)))

        yield ipc
        return
    from vllm_compat.weights.transports import process_group

    with process_group.Sender(given.tensor_parallel, device=device, timeout=60.0) as sender:

        async def group(_: Any, update: Any) -> None:
            with sender.send(tensors) as source:
                await update.load(source)

        yield group


async def once(engine: Any, load: Load, way: Way, send: Send) -> dict[str, float]:
    """Milliseconds of one update."""
    began = time.perf_counter()
    async with way(engine) as update:
        quiet = time.perf_counter()
        await send(engine, update)
        sent = time.perf_counter()
        await asyncio.sleep(0.01)
        copied = time.perf_counter()
        waiting = asyncio.create_task(load.next())
        await asyncio.sleep(0)
    left = time.perf_counter()
    token = await waiting
    found = {
        "quiet": quiet - began, "copy": sent - quiet, "left": left - copied, "next": token - copied,
        "stall": quiet - began + token - copied,
    }  # fmt: skip
    return {name: 1e3 * value for name, value in found.items()}


async def stalls(engine: Any, load: Load, rounds: int, send: Send, alone: bool) -> dict[str, list[dict[str, float]]]:
    ways: dict[str, Way] = {"ours": ours} if alone else {"ours": ours, "vLLM": vllms, "core": core}
    moments, found = random.Random(1), {name: [] for name in ways}
    for way in ways.values():  # what is done once, is done
        await once(engine, load, way, send)
    for number in range(rounds):
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            await asyncio.sleep(moments.uniform(0.03, 0.1))
            found[name].append(await once(engine, load, ways[name], send))
    return found


async def throughput(engine: Any, load: Load, model: Path, pairs: int, window: float) -> list[dict[str, float]]:
    """Tokens per second in pairs of windows: with an update every 2 s, and without."""
    import vllm_compat

    async def measured(updates: bool) -> tuple[float, int]:
        began, tokens, made = time.perf_counter(), load.tokens, 0
        while time.perf_counter() - began < window:
            if updates:
                async with vllm_compat.weight_update(engine) as update:
                    await update.load(str(model))
                made += 1
            await asyncio.sleep(max(0.0, min(EVERY * made if updates else window, window) - (time.perf_counter() - began)))
        return (load.tokens - tokens) / (time.perf_counter() - began), made

    found = []
    for number in range(pairs):
        order = (True, False) if number % 2 else (False, True)
        speeds = {updates: await measured(updates) for updates in order}
        found.append({"none": speeds[False][0], "updates": speeds[True][0], "count": speeds[True][1]})
    return found


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


async def measure(given: argparse.Namespace, model: Path) -> dict[str, Any]:
    import vllm_compat  # noqa: F401, I001  (takes effect on import, before vLLM's)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model), dtype=given.dtype, enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512,
            worker_extension_cls="weight_update.Copy", tensor_parallel_size=given.tensor_parallel,
        )
    )  # fmt: skip
    load = Load(engine, given.requests)
    try:
        while load.tokens < 20 * given.requests:
            await load.next()
        async with transport(given, model) as send:
            found: dict[str, Any] = {"stalls": await stalls(engine, load, given.rounds, send, given.transport == "group")}
        if given.pairs:
            found["throughput"] = await throughput(engine, load, model, given.pairs, given.window)
        return found
    finally:
        for line in load.lines:
            line.cancel()
        await asyncio.gather(*load.lines, return_exceptions=True)
        engine.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=("norms", "ipc", "group"), default="norms")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=3, help="of throughput windows; 0: none")
    parser.add_argument("--window", type=float, default=8.0, help="seconds")
    parser.add_argument("--requests", type=int, default=64, help="in flight")
    parser.add_argument("--hidden", type=int, default=128, help="the model's width; 128 is the shipped model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    given = parser.parse_args()
    if given.transport == "ipc" and given.tensor_parallel > 1:
        parser.error("--transport ipc: a handle is for one reader, so --tensor-parallel 1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_COMPAT_UNBRACKETED_UPDATES"] = "allow"  # vLLM's own way is measured as it is
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        model = PARITY / "model"
        if given.hidden != 128:
            sys.path.insert(0, str(PARITY))
            from make_model import make

            model = make(Path(folder) / "model", hidden=given.hidden)
        found = asyncio.run(measure(given, model))

    from importlib.metadata import version

    rounds = found["stalls"]
    ratios = {
        name: [a["stall"] / b["stall"] for a, b in zip(rounds["ours"], rounds[name], strict=True)]
        for name in rounds
        if name != "ours"
    }
    print(
        f"\nvLLM {version('vllm')}, {given.requests} requests in flight, {given.transport}, width {given.hidden}, {given.dtype}, "
        f"TP={given.tensor_parallel}, {given.rounds} rounds, load {os.getloadavg()[0]:.1f}; ms, median (range)"
    )
    print("| way | quiet | copy | next | stall | ours against it |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, took in rounds.items():
        cells = [spread([one[part] for one in took]) for part in ("quiet", "copy", "next", "stall")]
        print(f"| {name} | {' | '.join(cells)} | {spread(ratios[name], 2) if name in ratios else ''} |")
    for pair in found.get("throughput", []):
        print(
            f"{pair['none']:.0f} tokens/s; {pair['updates']:.0f} with {pair['count']} updates, one every {EVERY:.0f} s "
            f"(ratio {pair['updates'] / pair['none']:.3f})"
        )
    if pairs := found.get("throughput"):
        print(f"throughput ratio {spread([pair['updates'] / pair['none'] for pair in pairs], 3)}, of {len(pairs)} pairs")
    if given.json:
        given.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(given).items()}, **found}, indent=1))
    if not ratios:
        print("NOT COMPARED: no other way has this transport")
        return 0
    ratio = statistics.median(ratios["vLLM"])
    print(f"stall ratio {ratio:.2f} (limit {LIMIT}): {'held' if ratio <= LIMIT else 'MISSED'}")
    return ratio > LIMIT


if __name__ == "__main__":
    sys.exit(main())
