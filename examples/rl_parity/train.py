"""
Runs of one engine: a policy gradient trainer around a vLLM that another process, perhaps with another release, steps.

    python train.py OUT --workloads gspo --seed 0 [--python PYTHON] [--environment JSON]      (study.py starts these)

Writes OUT/<workload>/<name>.json. Several workloads follow each other on one engine, each from the first weights.

Batch k is trained on with weights that have seen k updates, while the engine generates on; its tokens come from up to three
versions of the weights, and each update lands inside the requests that run. Nothing is recomputed: the importance ratio is
exp(trainer's logprob - engine's logprob).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import objectives
import task
import torch
from objectives import OBJECTIVES
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from vllm_compat.metrics import mismatch
from vllm_compat.trainer import fp32_lm_head, processed_logprobs

HERE = Path(__file__).parent
MODEL = HERE / "model"
# What the four curves are, in the names of vllm_compat.metrics; the clip rate is the one of what an objective clips.
CURVES = ("clip_rate", "kl_new_old", "entropy", "reward")
# What is studied: an objective, and what of Settings is different.
WORKLOADS: dict[str, tuple[str, dict[str, Any]]] = {
    "gspo": ("gspo", {}),
    "grpo": ("grpo", {}),
    "ppo": ("ppo", {}),
    "gspo-t1": ("gspo", {"temperature": 1.0, "top_p": 1.0}),
}
LIMIT = 300  # seconds without a word from the engine after which it is given up


@dataclass(frozen=True)
class Settings:
    """The hyperparameters: the same in every arm, fixed before the first run of the study (docs/rl_parity.md)."""

    model: Path = MODEL
    dtype: str = "bfloat16"
    temperature: float = 0.7
    top_p: float = 0.95
    steps: int = 24
    answers: int = 48  # in a batch
    in_flight: int = 64
    rate: float = 2e-4
    engine_args: dict[str, Any] = field(default_factory=dict)

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams`, for the engine and for the trainer's logprobs."""
        return {
            "temperature": self.temperature, "top_p": self.top_p, "max_tokens": task.MOST_TOKENS, "stop_token_ids": [task.EOS],
        }  # fmt: skip

    def engine(self, seed: int) -> dict[str, Any]:
        """`EngineArgs` of any release. What V1 made of V0's defaults is not among them: that is what the arms differ by."""
        return {
            "model": str(self.model), "dtype": self.dtype, "seed": seed, "skip_tokenizer_init": True, "enforce_eager": True,
            "max_model_len": 160, "max_num_seqs": self.in_flight, "gpu_memory_utilization": 0.3, "disable_log_stats": True,
            **self.engine_args,
        }  # fmt: skip


class Policy:
    """The model with float32 master weights, its optimizer, and a critic where the algorithm has one."""

    def __init__(self, settings: Settings, algorithm: str) -> None:
        self.settings, self.objective = settings, OBJECTIVES[algorithm]
        self.surrogate = getattr(objectives, algorithm)
        self.model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        fp32_lm_head(self.model)
        self.critic = torch.nn.Linear(self.model.config.hidden_size, 1)
        torch.nn.init.zeros_(self.critic.weight)
        torch.nn.init.zeros_(self.critic.bias)
        groups = [{"params": self.model.parameters()}, {"params": self.critic.parameters(), "lr": 10 * settings.rate}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0)

    def _arithmetic(self) -> Any:
        """Weights and activations as the engine's dtype has them."""
        dtype = getattr(torch, self.settings.dtype)
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)

    def step(self, problems: list[task.Problem], batch: list[dict[str, Any]]) -> dict[str, float]:
        """One gradient step on a batch, and what the batch measured before it."""
        begin = min(len(problems[answer["problem"]].prompt) for answer in batch) - 1
        tokens, mask, old = self._padded([problems[answer["problem"]].prompt for answer in batch], batch)
        with self._arithmetic():
            out = self.model(tokens, output_hidden_states=self.objective.critic)
        logits, targets = out.logits[:, begin:-1], tokens[:, begin + 1 :]
        mask, old = mask[:, begin + 1 :], old[:, begin + 1 :]
        new = processed_logprobs(logits, targets, self.settings.sampling, mask=mask, eos_token_id=task.EOS)
        with torch.no_grad():
            full = (logits.detach().float() / self.settings.temperature).log_softmax(-1)
            entropies = -(full.exp() * full).sum(-1)
        rewards = torch.tensor([problems[answer["problem"]].reward(answer["tokens"]) for answer in batch])
        clip = (self.objective.low, self.objective.high)
        measured = mismatch(old, new.detach(), mask=mask, clip=clip, entropies=entropies)
        # A token that today's policy no longer keeps has no ratio: it counts in `outside`, and nowhere else.
        kept = mask & new.detach().isfinite() & old.isfinite()
        new, old = new.masked_fill(~kept, 0.0), old.masked_fill(~kept, 0.0)
        if self.objective.critic:
            values = self.critic(out.hidden_states[-1][:, begin:-1].detach().float())[..., 0]
            advantages, returns = objectives.generalized_advantages(rewards, values.detach(), mask)
            loss = objectives.value_loss(values, returns, mask)
        else:
            advantages, loss = objectives.group_advantages(rewards, self.objective.group), 0.0
        loss = loss + self.surrogate(new, old, kept, advantages, self.objective)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {
            "clip_rate": measured["clip_rate_sequence" if self.objective.by_sequence else "clip_rate"],
            "kl_new_old": measured["kl_rollout_trainer_k3_by_sequence"],
            "entropy": measured["entropy"],
            "reward": float(rewards.mean()),
            "abs_dlogprob": measured["abs_dlogprob_mean"],
            "outside": (measured["outside_trainer"] + measured["outside_rollout"]) / float(mask.sum()),
            "length": float(mask.sum() / len(batch)),
            "gradient": float(norm),
        }

    @staticmethod
    def _padded(prompts: list[list[int]], batch: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = [prompt + answer["tokens"] for prompt, answer in zip(prompts, batch)]
        shape = (len(rows), max(map(len, rows)))
        tokens, mask, old = torch.full(shape, task.PAD), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        for i, (row, prompt, answer) in enumerate(zip(rows, prompts, batch)):
            tokens[i, : len(row)] = torch.tensor(row)
            mask[i, len(prompt) : len(row)] = True
            old[i, len(prompt) : len(row)] = torch.tensor(answer["logprobs"])
        return tokens, mask, old

    def save(self, file: Path) -> None:
        """In the engine's dtype, as a transport would send them."""
        dtype = getattr(torch, self.settings.dtype)
        save_file({name: held.detach().to(dtype).contiguous() for name, held in self.model.state_dict().items()}, file)


class Engine:
    """`rollout.py` in another environment, and a pipe to it. ``with`` ends it, and the engine core that would outlive it."""

    def __init__(self, python: str, environment: dict[str, str], log: Path) -> None:
        self.log, (self.pipe, theirs) = log, Pipe()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [python, str(HERE / "rollout.py"), str(theirs.fileno())], stdout=output, stderr=output, start_new_session=True,
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ, **environment,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
                },
            )  # fmt: skip
        theirs.close()

    def send(self, what: Any) -> None:
        """What JSON holds."""
        self.pipe.send_bytes(json.dumps(what).encode())

    def receive(self) -> Any:
        """What it sends next. Raises RuntimeError with the end of its log where it died, or said nothing for `LIMIT`."""
        until = time.monotonic() + LIMIT
        try:
            while not self.pipe.poll(1):
                if self.process.poll() is not None or time.monotonic() > until:
                    raise EOFError
            return json.loads(self.pipe.recv_bytes())
        except EOFError:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(
                f"the engine's process ended, or was silent for {LIMIT} s; the end of {self.log}:\n{tail}"
            ) from None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *raised: object) -> None:
        self.pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=0 if raised[0] else 20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(settings: Settings, algorithm: str, seed: int, engine: Engine, keep: Path | None = None) -> list[dict[str, float]]:
    """One run: what each batch measured. keep: a folder for all weights and rollouts, for who wants to score them again."""
    torch.manual_seed(seed)
    rng, objective, rows = random.Random(seed), OBJECTIVES[algorithm], []
    groups = settings.answers // objective.group
    # More problems than are trained on: the engine is as full at the end as at the start.
    count = settings.steps * groups + 2 * settings.in_flight // objective.group
    problems = [task.problem(rng) for _ in range(count)]
    policy = Policy(settings, algorithm)
    if keep:
        (keep / "prompts.json").write_text(json.dumps([each.prompt for each in problems]))
    with tempfile.TemporaryDirectory() as folder:
        files = [(keep or Path(folder)) / f"{version}.safetensors" for version in range(settings.steps)]
        policy.save(files[0])
        engine.send({
            "name": algorithm, "seed": seed, "weights": str(files[0]), "sampling": settings.sampling, "group": objective.group,
            "batch": groups, "steps": settings.steps, "in_flight": settings.in_flight,
            "prompts": [each.prompt for each in problems],
        })  # fmt: skip
        for step in range(settings.steps):
            batch = engine.receive()
            if keep:
                (keep / f"{step}.json").write_text(json.dumps(batch))
            lags = [step - sum(answer["received"]) / len(answer["received"]) for answer in batch]
            rows.append(policy.step(problems, batch) | {"lag": sum(lags) / len(lags)})
            if step + 1 < settings.steps:
                policy.save(files[step + 1])
                engine.send(str(files[step + 1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="run")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["gspo"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--python", default=sys.executable, help="of the engine's environment")
    parser.add_argument("--environment", type=json.loads, default={}, help="JSON: variables for the engine's process")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON: what differs from Settings")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(**given.settings)
    files = [given.out / workload / f"{given.name}.json" for workload in given.workloads]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
    with Engine(given.python, given.environment, files[0].with_suffix(".log")) as engine:
        engine.send(settings.engine(given.seed))
        report = engine.receive()
        for workload, file in zip(given.workloads, files):
            (algorithm, changed), began = WORKLOADS[workload], time.monotonic()
            rows = run(Settings(**given.settings, **changed), algorithm, given.seed, engine)
            found = {"seed": given.seed, "report": report, "rows": rows}
            part = file.with_suffix(".part")
            part.write_text(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}) + "\n")
            part.replace(file)  # a run is there whole, or not
        engine.send(None)


if __name__ == "__main__":
    main()
