"""Bytes per second of every transport of weights, against memcpy of the same bytes in the same run.

    python benchmarks/weight_transports.py [--sizes MIB ...] [--rounds N] [--threads N] [--workers N] [--bucket MIB]
                                           [--folder FOLDER] [--json FILE]

A trainer process has a model's tensors (bfloat16: large ones and norms); each worker process copies every tensor that comes
into weights of its own. Timed: from the tensors in the trainer until the last worker has its copy. ``memcpy`` is one such copy
inside the trainer, into memory that has been written before. The ways take turns within a round, each round from another
start; a ratio is taken within a round: memcpy's seconds over the way's.

``files`` is safetensors in --folder (no fsync: the page cache counts). ``shared memory, once`` makes and removes its segment,
``shared memory`` writes into the last update's, ``no checksum`` without crc32. ``gloo`` keeps its group. What was not run is
said at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["VLLM_COMPAT_PROFILE"] = "off"

import torch

from vllm_compat.weights import transports
from vllm_compat.weights.transports import process_group, shared_memory

LARGE = 8 << 20  # elements
Way = Callable[[], contextlib.AbstractContextManager[dict[str, Any]]]


def model(mib: int) -> dict[str, torch.Tensor]:
    """So many MiB of bfloat16: large tensors, and a norm for each."""
    left, tensors = (mib << 20) // 2, {}
    while left > 0:
        name, count = f"layers.{len(tensors) // 2}", min(left, LARGE)
        tensors[f"{name}.weight"] = torch.randn(count // 1024, 1024).bfloat16()
        tensors[f"{name}.norm"] = torch.ones(1024, dtype=torch.bfloat16)
        left -= count
    return tensors


def copy(tensors: Iterator[tuple[str, torch.Tensor]], place: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors:
        place[name].copy_(tensor)


def work(pipe: Connection, threads: int) -> None:
    """A worker process: an int makes its weights, a source fills them, None ends it."""
    torch.set_num_threads(threads)
    place: dict[str, torch.Tensor] = {}
    while (order := pipe.recv()) is not None:
        if isinstance(order, int):
            place = {name: torch.zeros_like(tensor) for name, tensor in model(order).items()}
            pipe.send(0.0)
            continue
        began = time.perf_counter()
        incoming = transports.open_source(order, torch.device("cpu"), 60.0)
        copy(incoming.tensors(), place)
        incoming.close(True)
        pipe.send(time.perf_counter() - began)
        del incoming
        assert all(float(place[name].view(-1)[-1]) == 1 for name in place if name.endswith("norm"))


class Files:
    """A folder that a checkpoint is saved into."""

    def __init__(self, tensors: dict[str, torch.Tensor], parent: str) -> None:
        self.tensors, self.parent = tensors, parent

    @contextlib.contextmanager
    def send(self) -> Iterator[dict[str, Any]]:
        """As the other transports do it."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(dir=self.parent) as folder:
            save_file(self.tensors, Path(folder, "model.safetensors"))
            yield {"transport": "files", "path": folder}


def timed(way: Way, pipes: list[Connection]) -> tuple[float, float, float]:
    """Seconds until the source is there, until the last worker has its copy, and of the slowest worker."""
    began = time.perf_counter()
    with way() as source:
        ready = time.perf_counter() - began
        for pipe in pipes:
            pipe.send(source)
        loads = [pipe.recv() for pipe in pipes]
        total = time.perf_counter() - began
    return ready, total, max(loads)


def measure(mib: int, rounds: int, bucket: int, folder: str, pipes: list[Connection]) -> dict[str, Any]:
    tensors = model(mib)
    size = sum(tensor.nbytes for tensor in tensors.values())
    place = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for pipe in pipes:
        pipe.send(mib)
    for pipe in pipes:
        pipe.recv()
    with (
        shared_memory.Publisher() as kept,
        shared_memory.Publisher(checksum=False) as quick,
        process_group.Sender(len(pipes), backend="gloo", bucket=bucket << 20, timeout=60.0) as sender,
    ):
        ways: dict[str, Way] = {
            "files": Files(tensors, folder).send,
            "shared memory, once": lambda: shared_memory.publish(tensors),
            "shared memory": lambda: kept.publish(tensors),
            "shared memory, no checksum": lambda: quick.publish(tensors),
            "gloo": lambda: sender.send(tensors),
        }
        found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in ways}
        copies = []
        for number in range(rounds + 1):
            began = time.perf_counter()
            copy(iter(tensors.items()), place)
            memcpy = time.perf_counter() - began
            names = list(ways)
            turned = names[number % len(names) :] + names[: number % len(names)]
            seconds = {name: timed(ways[name], pipes) for name in turned}
            if number == 0:
                continue  # makes the group and the segments
            copies.append(memcpy)
            for name, (ready, total, load) in seconds.items():
                found[name].append((ready, total, load, memcpy / total))
    rows = {
        name: {
            "GB/s": size / 1e9 / statistics.median(row[1] for row in taken),
            "seconds": [row[1] for row in taken],
            "write": statistics.median(row[0] for row in taken),
            "load": statistics.median(row[2] for row in taken),
            "ratios": [row[3] for row in taken],
        }
        for name, taken in found.items()
    }
    return {"MiB": mib, "bytes": size, "memcpy GB/s": size / 1e9 / statistics.median(copies), "ways": rows}


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['MiB']} MiB; memcpy {result['memcpy GB/s']:.2f} GB/s")
    print(f"{'':28}{'GB/s':>8}{'of memcpy':>11}{'(min, max)':>18}{'write s':>10}{'load s':>10}")
    for name, row in result["ways"].items():
        ratios = row["ratios"]
        span = f"({min(ratios):.3f}, {max(ratios):.3f})"
        middle = statistics.median(ratios)
        print(f"{name:28}{row['GB/s']:>8.2f}{middle:>11.3f}{span:>18}{row['write']:>10.3f}{row['load']:>10.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024], help="MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bucket", type=int, default=256, help="MiB, of Gloo")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="of the files")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(given.workers):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(theirs, given.threads), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {given.threads} threads a process, {given.workers} workers, "
        f"{given.rounds} rounds, load {os.getloadavg()[0]:.1f}"
    )
    results = []
    not_run = ["NCCL, and tensors on a GPU: files, shared memory and Gloo between processes of a CPU were measured"]
    for mib in given.sizes:
        if shutil.disk_usage(shared_memory.FOLDER).free < 4 * mib << 20:
            not_run.append(f"{mib} MiB: {shared_memory.FOLDER} is too small")
            continue
        results.append(measure(mib, given.rounds, given.bucket, given.folder, pipes))
        show(results[-1])
    for pipe, process in zip(pipes, processes):
        pipe.send(None)
        process.join()
    if given.json:
        given.json.write_text(json.dumps({"torch": torch.__version__, "threads": given.threads, "results": results}, indent=1))
    for part in not_run:
        print(f"NOT RUN: {part}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
