"""
The study in minutes, and exactly: do the logprobs that training used belong to the weights that sampled the tokens?

    python examples/rl_parity/smoke.py [--algorithm gspo]

The installed vLLM as it comes and with the import, one seed, a few updates, everything in float32. Then every token is scored
again with transformers: the weights of its version, over the KV cache that the versions before it wrote, with the request's
temperature and top-p. With the import every one has to agree within `EXACT`; without, a quarter of them must not (most tokens of
a trained model are nearly certain: their logprobs are alike under any reading). Exit code 0, or 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import study
import torch
from objectives import OBJECTIVES
from train import MODEL, Engine, Settings, run
from transformers.utils.logging import disable_progress_bar

from vllm_compat.reference import Effect, Reference, Schedule, Semantics, effect
from vllm_compat.rollouts import Rollout, rollout

EXACT = 1e-4  # nats, float32
NAMES = {"as it comes": {}, "with the import": study.IMPORT}


def schedule(prompt: int, versions: list[int]) -> Schedule:
    """Which weights compute which positions: the pass over position prompt - 1 + i yields token i."""
    changes = [i for i in range(1, len(versions)) if versions[i] != versions[i - 1]]
    return ((versions[0], 0), *((versions[i], prompt - 1 + i) for i in changes))


def gaps(settings: Settings, folder: Path, prompts: list[list[int]]) -> list[tuple[int, float]]:
    """For every token: the version of the weights that sampled it, and |engine's logprob - exact one| in nats."""
    answers = [answer for step in range(settings.steps) for answer in json.loads((folder / f"{step}.json").read_text())]
    models = {}
    for version in range(settings.steps):
        models[version] = folder / str(version)
        models[version].mkdir()
        shutil.copy(MODEL / "config.json", models[version])
        (folder / f"{version}.safetensors").rename(models[version] / "model.safetensors")
    # Numbered from the run's first weights. An engine that does not number them: by what had been sent when a token arrived.
    first = min((min(answer["versions"]) for answer in answers if answer["versions"]), default=0)
    rows: list[Rollout] = []
    for i, answer in enumerate(answers):
        versions = [v - first for v in answer["versions"]] if answer["versions"] else answer["received"]
        row: dict[str, Any] = {
            "prompt_ids": prompts[answer["problem"]], "token_ids": answer["tokens"], "rollout_logprobs": answer["logprobs"],
            "trainer_logprobs": answer["logprobs"], "sampling_params": settings.sampling, "rollout_version": versions,
        }  # fmt: skip
        rows.append(rollout(row, f"answer {i}"))
    kind: Effect = effect(settings.sampling, Semantics())
    schedules = [schedule(len(row.prompt_ids), row.rollout_version or []) for row in rows]
    exact = Reference(models).predict(rows, schedules, [{kind}] * len(rows), "float32")
    return [
        (version, abs(given - float(want)))
        for row, found in zip(rows, exact)
        for version, given, want in zip(row.rollout_version or [], row.rollout_logprobs, found[kind])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=OBJECTIVES, default="gspo")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(study.QUIET)
    settings = Settings(dtype="float32", steps=5, answers=32, in_flight=32, engine_args={"block_size": 32})
    found: dict[str, list[float]] = {}
    disable_progress_bar()
    print(f"{given.algorithm}, float32, {settings.steps} batches of {settings.answers} answers, weights updated in between")
    print("engine            clip rate  tokens  on later weights  mean |Δ|  max |Δ| (nats)  inexact")
    for name, variables in NAMES.items():
        with tempfile.TemporaryDirectory() as held:
            folder = Path(held)
            with Engine(sys.executable, variables, folder / "log") as engine:
                engine.send(settings.engine(0))
                engine.receive()
                rows = run(settings, given.algorithm, 0, engine, keep=folder)
                engine.send(None)
            tokens = gaps(settings, folder, json.loads((folder / "prompts.json").read_text()))
        found[name] = [gap for _, gap in tokens]
        later, clip = sum(version > 0 for version, _ in tokens), statistics.mean(row["clip_rate"] for row in rows)
        share = sum(gap >= EXACT for gap in found[name]) / len(tokens)
        mean, most = statistics.mean(found[name]), max(found[name])
        print(f"{name:16}  {clip:9.3f}  {len(tokens):6}  {later:16}  {mean:8.1e}  {most:14.1e}  {share:7.0%}", flush=True)
        if not later:
            print("no token came from updated weights: nothing was shown")
            return 1
    exact = max(found["with the import"]) < EXACT
    left = sum(gap >= EXACT for gap in found["as it comes"]) > len(found["as it comes"]) / 4
    print(f"with the import {'exact' if exact else 'NOT EXACT'}; as it comes {'not V0' if left else 'NOT TOLD APART'}")
    return 0 if exact and left else 1


if __name__ == "__main__":
    sys.exit(main())
