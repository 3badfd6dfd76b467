"""Engine against trainer, in bfloat16, with and without the float32 head: |Δlogprob| of sampled tokens, for every architecture.

    python benchmarks/lm_head_effect.py [MODEL ...] [--engine-python PYTHON] [--results FILE] [--write]

The small model of each family (tests/families) with a head like a language model's: a vocabulary of 8,200 and logits with a
standard deviation of 3, so that the best token of a position has a logit of 11 to 17 and bfloat16 rounds it to steps of 1/16 or 1/8.
(With small logits the trunk's rounding would hide the head's.) The engine samples at temperature 1, with its own head and
with the float32 one; the trainer, transformers with the float32 head, computes the logprobs of the same tokens. Both trunks
are in bfloat16, and round by themselves: that part remains. "Head alone" is the trainer with its own head against the
trainer with the float32 one, over the same hidden states.

``--results`` keeps what was measured, and takes in what it has; ``--write`` puts all of that into docs/lm_head.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "lm_head.md"
MARK = re.compile(r"(<!-- made by `benchmarks/lm_head_effect.py --write` -->\n).*?(<!-- end -->)", re.DOTALL)
VOCAB, SPREAD, SOFT_CAP = 8_200, 3.0, 30.0  # the cap is Gemma 2's own; that of the small model would leave no spread
REQUESTS, PROMPT, TOKENS = 32, 16, 128
HEADS = {"own": "model", "float32": "accumulate"}  # of the engine; its VLLM_COMPAT_FP32_LM_HEAD


@contextmanager
def families() -> Iterator[ModuleType]:
    """tests/families/models.py, with heads like a language model's."""
    spec = importlib.util.spec_from_file_location("families", ROOT / "tests" / "families" / "models.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    models = {}
    for name, model in found.MODELS.items():
        if not name.endswith("-window"):  # the same head as the one without
            capped = model.config.get("final_logit_softcapping")
            models[name] = replace(model, config={**model.config, "final_logit_softcapping": SOFT_CAP}) if capped else model
    common = {**found.COMMON, "vocab_size": VOCAB}
    with mock.patch.multiple(found, VOCAB=VOCAB, COMMON=common, PEAK=SPREAD, MODELS=models):
        yield found


class EngineFailed(Exception):
    """An engine that ended without an answer."""


def head_of(model: Any) -> str:
    """What is special about a family's head, in words."""
    words = ["tied" if model.tied else "untied"]
    words += ["soft-capped"] if model.config.get("final_logit_softcapping") else []
    words += ["scaled"] if model.config.get("logits_scaling") else []
    return ", ".join(words)


def engine(folder: str, arguments: str) -> None:
    """In a process of its own: what the engine samples, as JSON after RESULT."""
    import random

    import vllm_compat  # isort: skip  (takes effect on import: before vLLM's)
    from vllm import LLM, SamplingParams, __version__

    draw = random.Random(0)
    prompts = [{"prompt_token_ids": [draw.randrange(VOCAB) for _ in range(PROMPT)]} for _ in range(REQUESTS)]
    llm = LLM(
        model=folder, dtype="bfloat16", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=256, seed=0,
        skip_tokenizer_init=True, **json.loads(arguments),
    )  # fmt: skip
    params = SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    rows = []
    for out in llm.generate(prompts, params, use_tqdm=False):
        tokens = list(out.outputs[0].token_ids)
        logprobs = [row[token].logprob for row, token in zip(out.outputs[0].logprobs, tokens, strict=True)]
        rows.append((list(out.prompt_token_ids), tokens, logprobs))
    status = vllm_compat.status(llm).to_dict()
    head = status["behaviors"]["fp32_lm_head"]["state"]
    print("RESULT " + json.dumps({"rows": rows, "vllm": __version__, "proven": status["proven"], "head": head}))


def sampled(python: str, folder: Path, model: Any, head: str) -> dict[str, Any]:
    """`engine`, started for one kind of head."""
    release = (
        subprocess.run(
            [python, "-c", "from importlib.metadata import version as v; print(v('vllm'))"],
            capture_output=True,
            text=True,
            check=True,
        )
        .stdout.partition("+")[0]
        .strip()
    )
    environment = {"VLLM_COMPAT_FP32_LM_HEAD": HEADS[head], **model.environment.get(release, {})}
    done = subprocess.run(
        [python, __file__, "--engine", str(folder), json.dumps(model.engine_args)],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise EngineFailed(f"the engine did not answer:\n{done.stdout[-4000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    if not found["proven"] or (found["head"] == "disabled") != (head == "own"):
        raise SystemExit(f"the engine does not have the head that was asked for: {found['head']}, proven {found['proven']}")
    return found


def measure(python: str, name: str, spec: Any, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    import torch

    from vllm_compat.experiment import load_model
    from vllm_compat.trainer import fp32_lm_head

    row: dict[str, Any] = {"head": head_of(spec)}
    trainer = load_model(folder, "bfloat16", "cpu")
    for head in HEADS:
        answer, gaps = sampled(python, folder, spec, head), []
        alone, spread, top = [], [], []
        for prompt, tokens, logprobs in answer["rows"]:
            asked = torch.tensor([[*prompt, *tokens[:-1]]])
            with torch.no_grad():
                rounded = trainer(asked).logits[0, len(prompt) - 1 :].float()
                with fp32_lm_head(trainer):
                    logits = trainer(asked).logits[0, len(prompt) - 1 :]
            exact, other = (found.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0] for found in (logits, rounded))
            gaps.append(torch.tensor(logprobs) - exact)
            alone.append((other - exact).abs())
            spread.append(logits.std(-1))
            top.append(logits.amax(-1))
        gap = torch.cat(gaps)
        ratio = gap.neg().exp()  # trainer / engine
        row[head] = {
            "mean": float(gap.abs().mean()), "p99": float(gap.abs().quantile(0.99)),
            "outside": float(((ratio < 0.9) | (ratio > 1.1)).float().mean()),
        }  # fmt: skip
        row |= {"vllm": answer["vllm"].partition("+")[0], "tokens": len(gap)}
        row |= {
            "alone": float(torch.cat(alone).mean()),
            "spread": float(torch.cat(spread).mean()),
            "top": float(torch.cat(top).mean()),
        }
    print(name, json.dumps(row), flush=True)
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| family | head | logits: std, top | head alone: mean | mean: bfloat16 head | float32 | 99th percentile: bfloat16 head "
        "| float32 | outside [0.9, 1.1]: bfloat16 head | float32 |",
        "|" + " --- |" * 10,
    ]
    for name, row in rows.items():
        cells = [name, row["head"], f"{row['spread']:.1f}, {row['top']:.0f}", f"{row['alone']:.2g}"]
        for what in ("mean", "p99"):
            cells += [f"{row[head][what]:.2g}" for head in HEADS]
        cells += [f"{100 * row[head]['outside']:.2f} %" for head in HEADS]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(sorted({row["vllm"] for row in rows.values()}))
    tokens = ", ".join(sorted({f"{row['tokens']:,}" for row in rows.values()}))
    return "\n".join(lines) + f"\n\nvLLM {versions}, {tokens} tokens each.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="families of tests/families (default: all)")
    parser.add_argument("--engine-python", default=sys.executable, help="the Python that has the vLLM (default: this one)")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    kept: dict[str, Any] = json.loads(given.results.read_text()) if given.results and given.results.is_file() else {}
    failed: list[str] = []
    with families() as made, tempfile.TemporaryDirectory() as folder:
        unknown = set(given.models) - set(made.MODELS)
        if unknown:
            parser.error(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(made.MODELS)}")
        for name in given.models or [name for name in made.MODELS if name not in kept]:
            try:
                kept[name] = measure(given.engine_python, name, made.MODELS[name], made.make(Path(folder) / name, name))
            except EngineFailed as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed.append(name)
                continue
            if given.results:
                given.results.write_text(json.dumps(kept, indent=1) + "\n")
        text = table({name: kept[name] for name in made.MODELS if name in kept})
    print(text)
    if given.write:
        page, count = MARK.subn(lambda found: found[1] + text + found[2], PAGE.read_text())
        if count != 1:
            raise SystemExit(f"{PAGE} has no place for the table: {MARK.pattern}")
        PAGE.write_text(page)
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--engine"]:
        engine(*sys.argv[2:])
    else:
        main()
