"""What the float32 head costs: time, bytes and error of every way to compute it, beside the model's own 16-bit head.

    python benchmarks/lm_head.py [--rounds N] [--threads N] [--skip-cpu] [--skip-cuda]

The ways: ``model``, the 16-bit head; ``ours``, `vllm_compat.head`; ``blocks``, the same where nothing better is to be had;
``copy``, a float32 copy of the weight that stays (PipelineRL's way); ``cast``, which widens the whole weight at every step
(vLLM's own from 0.26.0 on without CUDA, in its own code where vLLM is installed).

They run in turn in one process; a ratio is taken within a round. ``held`` is what stays in memory, ``peak`` what a call adds
beside its result. Errors are against float64, of the largest logit. Exit code 1 if a limit is missed; what was not run is
said at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["VLLM_COMPAT_PROFILE"] = "off"  # vLLM's own head is measured as it is

import torch

from vllm_compat import head

CPU_SHAPES = {"Qwen3-0.6B": (151_936, 1_024), "Llama-3.2-1B": (128_256, 2_048)}
CUDA_SHAPES = {"Qwen2.5-7B": (152_064, 3_584), "Qwen3-0.6B": (151_936, 1_024), "Llama-3-8B": (128_256, 4_096)}
CPU_BATCHES, CUDA_BATCHES = (1, 8, 64, 512), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LIMITS = {1: 7.0, 8: 4.0, 64: 2.0}  # how many times faster than ``cast`` on the CPU, median
CHECKED = 2_048  # columns compared with float64

Way = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cast(device: str) -> tuple[str, Way]:
    """vLLM's own float32 head on the CPU, or what it does."""
    plain: Way = lambda x, w: torch.nn.functional.linear(x.float(), w.float())  # noqa: E731
    if device == "cuda":
        return "the formula", plain
    try:
        from importlib.metadata import version

        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        apply_head = LogitsProcessor._apply_head
    except (ImportError, AttributeError):
        return "the formula: no vLLM from 0.26.0 on here", plain
    processor, method = SimpleNamespace(head_dtype=torch.float32), UnquantizedEmbeddingMethod()
    return (
        f"vLLM {version('vllm')}, LogitsProcessor._apply_head",
        lambda x, w: apply_head(processor, SimpleNamespace(weight=w, quant_method=method), x, None),
    )


def ways(device: str, wide: torch.Tensor) -> dict[str, Way]:
    return {
        "model": torch.nn.functional.linear,
        "ours": head.linear,
        "blocks": head.blocked,
        "copy": lambda x, w: head.linear(x, wide),
        "cast": cast(device)[1],
    }


def peak_rss(call: Callable[[], object]) -> int:
    """Bytes by which the process grew while it ran, at most. Linux: a 5 in clear_refs resets the peak."""
    status = Path("/proc/self/status")

    def read(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        assert found
        return int(found[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def peak_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(device: str, rounds: int) -> Iterator[tuple[int, float]]:
    """Prints a table for each shape; yields (batch, median ratio of ``cast`` to ``ours``)."""
    shapes, batches = (CPU_SHAPES, CPU_BATCHES) if device == "cpu" else (CUDA_SHAPES, CUDA_BATCHES)
    for model, (vocab, width) in shapes.items():
        random = torch.Generator(device).manual_seed(0)
        weight = torch.randn(vocab, width, generator=random, device=device).mul_(0.02).bfloat16()
        wide = weight.float()
        calls = ways(device, wide)
        print(f"\n{model}, {vocab:,} x {width:,}, bfloat16; cast is {cast(device)[0]}")
        print(f"ours is {head.way(weight[:1], weight)[0]}")
        print("| batch | way | median ms | best ms | x cast, median (range) | held MiB | peak MiB | error |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for batch in batches:
            hidden = torch.randn(batch, width, generator=random, device=device).bfloat16()
            exact = hidden.double() @ weight[:CHECKED].double().t()
            times: dict[str, list[float]] = {name: [] for name in calls}
            with torch.inference_mode():
                error = {
                    name: float((way(hidden, weight)[:, :CHECKED] - exact).abs().max() / exact.abs().max())
                    for name, way in calls.items()
                }
                for _ in range(rounds):
                    for name, way in calls.items():
                        times[name].append(seconds(partial(way, hidden, weight), device))
                measured = peak_rss if device == "cpu" else peak_cuda
                peak = {name: measured(partial(way, hidden, weight)) for name, way in calls.items()}
            for name, found in times.items():
                ratios = [a / b for a, b in zip(times["cast"], found)]
                held = 4 * vocab * width if name == "copy" else 0
                result = vocab * batch * (2 if name == "model" else 4)
                print(
                    f"| {batch} | {name} | {1e3 * statistics.median(found):.2f} | {1e3 * min(found):.2f} "
                    f"| {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) "
                    f"| {held / 2**20:.0f} | {max(0, peak[name] - result) / 2**20:.0f} | {error[name]:.1e} |",
                    flush=True,
                )
                if name == "ours":
                    yield batch, statistics.median(ratios)


def same_rows(product: Way, device: str) -> list[int]:
    """The batches in which a row's logits differ from those it has alone."""
    random = torch.Generator(device).manual_seed(0)
    weight = torch.randn(151_936, 1_024, generator=random, device=device).mul_(0.02).bfloat16()
    hidden = torch.randn(512, 1_024, generator=random, device=device).bfloat16()
    alone = product(hidden[:1], weight)
    return [batch for batch in (2, 3, 8, 33, 64, 128, 512) if not torch.equal(product(hidden[:batch], weight)[:1], alone)]


def invariance(device: str) -> None:
    """Prints whether a row's logits depend on the batch, on CUDA under vLLM's batch-invariant mode."""
    found = {"ours": same_rows(head.linear, device)}
    if device == "cuda":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        try:
            from vllm.model_executor.determinism.batch_invariant import enable_batch_invariant_mode
        except ImportError:
            from vllm.model_executor.layers.batch_invariant import enable_batch_invariant_mode
        enable_batch_invariant_mode()
        found["ours under VLLM_BATCH_INVARIANT=1, by mm(out_dtype)"] = same_rows(head.linear, device)
        found["ours under VLLM_BATCH_INVARIANT=1, as the engine does it"] = same_rows(
            lambda x, w: head.linear(x, w, batch_invariant=True), device
        )
    for name, batches in found.items():
        print(f"{device}: {name}: " + (f"a row differs in batches of {batches}" if batches else "batch-invariant, to the bit"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--skip-cpu", action="store_true")
    parser.add_argument("--skip-cuda", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    missed, not_run = [], []
    print(f"torch {torch.__version__}, {given.threads} threads, {given.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    if given.skip_cpu:
        not_run.append("the CPU part (--skip-cpu)")
    else:
        held = [(batch, ratio, LIMITS[batch]) for batch, ratio in measure("cpu", given.rounds) if batch in LIMITS]
        print()
        for batch, ratio, limit in held:
            print(
                f"batch {batch}: {ratio:.1f} times as fast as cast (limit {limit:.0f}): {'held' if ratio >= limit else 'MISSED'}"
            )
        missed = [row for row in held if row[1] < row[2]]
        invariance("cpu")
    if torch.cuda.is_available() and not given.skip_cuda:
        print(f"\n{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
        for _ in measure("cuda", given.rounds):
            pass
        try:
            invariance("cuda")
        except ImportError as error:
            not_run.append(f"batch-invariance under vLLM ({error})")
    else:
        shapes = ", ".join(f"{model} {vocab:,} x {width:,}" for model, (vocab, width) in CUDA_SHAPES.items())
        why = "--skip-cuda" if given.skip_cuda else "no CUDA device"
        not_run.append(f"the CUDA part ({why}): {shapes} at batch 1 to 512, and batch-invariance under VLLM_BATCH_INVARIANT=1")
    for part in not_run:
        print(f"NOT RUN: {part}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
