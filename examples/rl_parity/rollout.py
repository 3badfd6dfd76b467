"""
The rollout side of one run: a vLLM engine that keeps requests in flight, in an environment and process of its own.

    python rollout.py DESCRIPTOR        started by train.py; the number is of a pipe's end

It is written as for V0: an `LLMEngine` that this thread steps, and weights that arrive by one ``collective_rpc`` for each part
of the model between two steps. On V0 the engine stands still meanwhile, so that all parts are one update. On V1 the same lines
leave the engine core running. Nothing here knows which engine it is, and all that vllm_compat needs is the import.

Time is counted in finished answers, not in seconds: when a batch of them is complete it goes to the trainer, and the weights
made from the batch before come back. So the trainer computes while the engine generates, and tokens are as old on a fast engine
as on a slow one.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

if os.environ.get("RL_PARITY_IMPORT"):
    import vllm_compat
else:
    vllm_compat = None
import torch
from safetensors import safe_open
from vllm import EngineArgs, LLMEngine, SamplingParams


class Loader:
    """``worker_extension_cls``: loads one part of the model, as trainers' extensions do."""

    def seed(self, seed: int) -> None:
        """Start the sampler's noise anew."""
        torch.manual_seed(seed)

    def load_part(self, file: str, names: list[str]) -> None:
        """Put these tensors of a safetensors file into the model."""
        with safe_open(file, "pt") as held:
            tensors = [(name, held.get_tensor(name)) for name in names]
        if hasattr(self.model_runner, "reload_weights"):  # a CPU's packed linear layers are reached by no other way
            self.model_runner.reload_weights(weights_iterator=iter(tensors))
        else:
            self.model_runner.model.load_weights(iter(tensors))


def parts(file: str) -> list[list[str]]:
    """The names in a safetensors file: each decoder layer's, and the rest."""
    with safe_open(file, "pt") as held:
        names = sorted(held.keys())
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.split(".")[2] if ".layers." in name else "", []).append(name)
    return list(found.values())


class Rollouts:
    """One run: answers to ``prompts`` in order, each ``group`` times, with ``in_flight`` of them running."""

    def __init__(self, engine: LLMEngine, given: dict[str, Any]) -> None:
        self.engine, self.given, self.sent = engine, given, 0
        self.sampling = {**given["sampling"], "logprobs": 0, "detokenize": False}
        self.running: dict[str, dict[str, Any]] = {}
        self.groups: dict[int, list[dict[str, Any]]] = {}
        self.complete: list[int] = []
        self.version = 0
        # As a fresh engine: nothing running or cached, the weights of the start, noise of its own.
        engine.reset_prefix_cache()
        engine.collective_rpc("seed", args=(given["seed"],))
        self._load(given["weights"])

    def _fill(self) -> None:
        group, prompts = self.given["group"], self.given["prompts"]
        while len(self.running) < self.given["in_flight"] and self.sent < group * len(prompts):
            problem, name = self.sent // group, f"{self.given['name']}-{self.sent}"
            prompt = {"prompt_token_ids": prompts[problem]}
            self.engine.add_request(name, prompt, SamplingParams(**self.sampling))
            self.running[name] = {"problem": problem, "received": []}
            self.sent += 1

    def batch(self) -> list[dict[str, Any]]:
        """Step until ``batch`` groups are complete, and hand them out."""
        while len(self.complete) < self.given["batch"]:
            self._fill()
            for output in self.engine.step():
                self._take(output)
        ready, self.complete = self.complete[: self.given["batch"]], self.complete[self.given["batch"] :]
        return [answer for problem in ready for answer in self.groups.pop(problem)]

    def _take(self, output: Any) -> None:
        mine, answer = self.running[output.request_id], output.outputs[0]
        # The updates that had been sent when a token arrived: an engine that runs on its own may be a step ahead.
        mine["received"] += [self.version] * (len(answer.token_ids) - len(mine["received"]))
        if output.finished:
            del self.running[output.request_id]
            mine["tokens"] = list(answer.token_ids)
            mine["logprobs"] = [row[token].logprob for row, token in zip(answer.logprobs, answer.token_ids)]
            mine["versions"] = getattr(answer, "token_weight_versions", None)  # exact, with vllm_compat
            group = self.groups.setdefault(mine["problem"], [])
            group.append(mine)
            if len(group) == self.given["group"]:
                self.complete.append(mine["problem"])

    def update(self, file: str) -> None:
        """All weights, part by part, as the next version."""
        self._load(file)
        self.version += 1

    def _load(self, file: str) -> None:
        for names in parts(file):
            self.engine.collective_rpc("load_part", args=(file, names))

    def end(self) -> None:
        """Leave nothing running."""
        self.engine.abort_request(list(self.running))
        while self.engine.has_unfinished_requests():
            self.engine.step()


def report(engine: LLMEngine) -> dict[str, Any]:
    """What ran, in the words of the process that ran it."""
    found = {"vllm": metadata.version("vllm"), "torch": metadata.version("torch"), "engine": type(engine).__module__}
    if vllm_compat is not None:
        told = vllm_compat.status(engine).to_dict()
        found["proven"] = told["proven"]
        found["behaviors"] = {name: [of["state"], of["reason"]] for name, of in told["behaviors"].items()}
    return found


def main(trainer: Connection) -> None:
    def send(what: Any) -> None:
        trainer.send_bytes(json.dumps(what).encode())

    def receive() -> Any:
        return json.loads(trainer.recv_bytes())

    engine = LLMEngine.from_engine_args(EngineArgs(**receive(), worker_extension_cls="rollout.Loader"))
    send(report(engine))
    while given := receive():
        run = Rollouts(engine, given)
        for step in range(given["steps"]):
            send(run.batch())
            if step:
                run.update(receive())
        run.end()


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
