"""What prefix caching per weight version is worth on a GRPO-shaped load, and what vLLM's own costs there in correctness.

Groups of samples share a prompt, requests stay in flight, and the weights change whenever so many requests have finished.
Three engines: caching off (V0), per weight version, vLLM's own. Each round runs the same load on each of them, in turn;
fresh prompts each round. Throughput is that of output tokens, updates included. A hit is stale where the logprob of the
request's first token is not that of the weights that were in force: exact values by transformers.

    python benchmarks/prefix_caching.py [--prompts 64] [--samples 16] [--rounds 3] [--hidden 256] ...

Output lengths are drawn from half to one and a half times --tokens, so that groups straddle updates as they do in training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "v0_parity"))
MODES = {"v0": "caching off", "per_version": "per version", "v1": "vLLM's own"}
EXACT = 1e-4  # nats


class Norms:
    """``worker_extension_cls``: a transport of norms, which change in place on every backend."""

    def load_norms(self, folder: str) -> int:
        """Load a version's norms; returns how many."""
        from safetensors.torch import load_file

        held = dict(self.model_runner.model.named_parameters())  # type: ignore[attr-defined]
        new = load_file(Path(folder) / "norms.safetensors")
        for name, value in new.items():
            held[name].data.copy_(value)
        return len(new)


def load(options: argparse.Namespace, number: int) -> list[tuple[int, list[int], int]]:
    """The requests of a round, group by group: (which prompt, its tokens, how many new tokens)."""
    rng = random.Random(number)
    found = []
    for prompt in range(options.prompts):
        tokens = [rng.randrange(290) for _ in range(options.prompt)]
        found += [(prompt, tokens, rng.randint(options.tokens // 2, options.tokens * 3 // 2)) for _ in range(options.samples)]
    return found


def versions(options: argparse.Namespace) -> int:
    """As many different weights as one round can meet."""
    return options.prompts * options.samples // options.every + 2


def engine(options: argparse.Namespace) -> None:
    """A child: an engine that plays a round for each number on its standard input."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    import vllm_compat

    folder = Path(options.engine)
    llm = LLM(
        model=str(folder / "model"), dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=1024,
        max_num_seqs=options.running, block_size=options.block, worker_extension_cls="prefix_caching.Norms",
    )  # fmt: skip
    core, version = llm.llm_engine, 0

    def play(requests: list[tuple[int, list[int], int]]) -> dict[str, object]:
        nonlocal version
        firsts: dict[str, list[float]] = {}
        began, tokens, finished = time.perf_counter(), 0, 0
        for name, (_, prompt, count) in enumerate(requests):
            params = SamplingParams(
                temperature=1.0, max_tokens=count, ignore_eos=True, logprobs=0, output_kind=RequestOutputKind.DELTA
            )
            core.add_request(str(name), {"prompt_token_ids": prompt}, params)
        while core.has_unfinished_requests():
            for out in core.step():
                (one,) = out.outputs
                tokens += len(one.token_ids)
                if one.token_ids and out.request_id.split("-")[0] not in firsts:
                    token = one.token_ids[0]
                    firsts[out.request_id.split("-")[0]] = [
                        version,
                        token,
                        one.logprobs[0][token].logprob,
                        out.num_cached_tokens or 0,
                    ]
                finished += out.finished
                if out.finished and finished % options.every == 0:
                    version += 1
                    with vllm_compat.weight_update(llm):
                        assert all(llm.collective_rpc("load_norms", args=(str(folder / str(version % versions(options))),)))
        return {"seconds": time.perf_counter() - began, "tokens": tokens, "firsts": firsts}

    play([(0, list(range(options.block)), 4)] * 2)  # compiles what it compiles
    print("RESULT ready", flush=True)
    for line in sys.stdin:
        print("RESULT " + json.dumps(play(load(options, int(line)))), flush=True)


def answer(child: subprocess.Popen[str], log: Path) -> str:
    """The child's next result."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("RESULT "):
            return line.removeprefix("RESULT ")
    sys.exit(log.read_text()[-4000:])


def exact(options: argparse.Namespace, folder: Path) -> Callable[[int, int, int], list[float]]:
    """A function: the logprobs of a prompt's next token under a version's weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    prompts = cache(lambda number: {prompt: tokens for prompt, tokens, _ in load(options, number)})

    @cache
    def row(number: int, prompt: int, version: int) -> list[float]:
        new = load_file(folder / str(version) / "norms.safetensors")
        model.load_state_dict({name: value.float() for name, value in new.items()}, strict=False)
        with torch.inference_mode():
            return model(torch.tensor([prompts(number)[prompt]])).logits[0, -1].log_softmax(-1).tolist()

    return row


def stale(
    options: argparse.Namespace, row: Callable[[int, int, int], list[float]], number: int, firsts: dict[str, list[float]]
) -> int:
    """How many requests of a round began on other keys and values than their weights'. One that missed cannot."""
    found = 0
    for name, (version, token, logprob, cached) in firsts.items():
        # its output may have been on its way when the last update began
        near = {now % versions(options) for now in (version, max(version - 1, 0))}
        off = min(abs(row(number, int(name) // options.samples, now)[int(token)] - logprob) for now in near)
        if off > EXACT:
            assert cached, f"request {name} found no block and is off by {off:.2g}"
            found += 1
    return found


def make(options: argparse.Namespace, folder: Path) -> None:
    """The model, and the norms of each version."""
    import torch
    from make_model import make as make_model
    from safetensors.torch import load_file, save_file

    made = make_model(folder / "model", hidden=options.hidden)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    first = {name: value for name, value in load_file(made / "model.safetensors").items() if "norm" in name}
    for version in range(versions(options)):
        (folder / str(version)).mkdir()
        random_ = torch.Generator().manual_seed(version)
        norms = {
            name: (value.float() * (0.7 + 0.6 * torch.rand(value.shape, generator=random_))).to(value.dtype) if version else value
            for name, value in first.items()
        }
        save_file(norms, folder / str(version) / "norms.safetensors")


def parsed() -> argparse.Namespace:
    """The command line; a child gets its parent's, and where the weights are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="of each prompt")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens, on average")
    parser.add_argument("--every", type=int, default=64, help="finished requests between two updates")
    parser.add_argument("--running", type=int, default=56, help="requests that run at once: no whole groups, as it happens")
    parser.add_argument("--block", type=int, default=32, help="tokens of a KV block")
    parser.add_argument("--hidden", type=int, default=256, help="the model's width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(folder: Path, mode: str, log: Path) -> subprocess.Popen[str]:
    """An engine of this mode, ready to play."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_COMPAT_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])])
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    child = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--engine", str(folder)],
        env={**environment, "VLLM_COMPAT_NO_PREFIX_CACHING": mode},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("a"), text=True,
    )  # fmt: skip
    answer(child, log)
    return child


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[tuple[float, int, int]]]:
    """By mode, for each round: tokens per second, requests that found blocks, and those that found stale ones."""
    make(options, folder)
    row, log = exact(options, folder), folder / "log"
    found: dict[str, list[tuple[float, int, int]]] = {mode: [] for mode in MODES}
    children: dict[str, subprocess.Popen[str]] = {}
    try:
        for mode in MODES:
            children[mode] = start(folder, mode, log)
        for number in range(options.rounds):
            turn = number % len(MODES)
            for mode in (*list(MODES)[turn:], *list(MODES)[:turn]):
                told = children[mode].stdin
                assert told is not None
                told.write(f"{number}\n")
                told.flush()
                played = json.loads(answer(children[mode], log))
                hits = sum(first[3] > 0 for first in played["firsts"].values())
                found[mode].append((played["tokens"] / played["seconds"], hits, stale(options, row, number, played["firsts"])))
            words = ", ".join(f"{found[mode][-1][0]:.0f} tokens/s {word}" for mode, word in MODES.items())
            print(f"round {number + 1}: {words}", flush=True)
    finally:
        for child in children.values():
            assert child.stdin is not None
            child.stdin.close()  # an engine ends with its input
        for child in children.values():
            child.wait(60)
    return found


def main() -> None:
    options = parsed()
    if options.engine:
        engine(options)
        return
    with tempfile.TemporaryDirectory() as name:
        found = measure(options, Path(name))
    requests = options.rounds * options.prompts * options.samples
    for mode, words in MODES.items():
        hits, wrong = (sum(one[column] for one in found[mode]) for column in (1, 2))
        print(f"{words}: {hits} of {requests} requests found blocks, {wrong} of them stale ones")
    for over, under in (("per_version", "v0"), ("v1", "v0"), ("per_version", "v1")):
        ratios = [a[0] / b[0] for a, b in zip(found[over], found[under], strict=True)]
        print(
            f"throughput {MODES[over]} / {MODES[under]}: {statistics.median(ratios):.3f}, median of {options.rounds} rounds, "
            f"{min(ratios):.3f} to {max(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
