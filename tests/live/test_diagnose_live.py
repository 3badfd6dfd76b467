"""`vllm-compat diagnose` on real engines: each with one behavior switched off or bypassed, and it names that one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vllm_compat.cli import main
from vllm_compat.trainer import fp32_lm_head, processed_logprobs

COMMON = """
import json, sys, time
import vllm_compat
from vllm import LLM, SamplingParams

def engine(model, dtype="float32", **more):
    return LLM(model=model, dtype=dtype, enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512, **more)

def keep(found):  # more than a pipe takes at once, between lines of other processes
    with open("found.json", "w") as file:
        json.dump(found, file)

def row(out, params, **more):
    best = out.outputs[0]
    return {"prompt_ids": list(out.prompt_token_ids), "token_ids": list(best.token_ids), "sampling_params": params,
            "rollout_logprobs": [r[t].logprob for r, t in zip(best.logprobs, best.token_ids)],
            "top_logprobs": [[[t, l.logprob] for t, l in r.items()] for r in best.logprobs], **more}

def generate(llm, prompts, params, **more):
    made = [SamplingParams(**p, ignore_eos=True, logprobs=5) for p in params]
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    if more.get("engine"):  # one by one: which requests meet in a step is chance, and so then are the samples
        outs = [llm.generate([request], one, use_tqdm=False)[0] for request, one in zip(requests, made)]
    else:
        outs = llm.generate(requests, made, use_tqdm=False)
    return [row(out, p, **more) for out, p in zip(outs, params)]

PARAMS = [{"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.03}, {"temperature": 0.0}]

def batch(llm, **more):
    prompts = [[5 + i, *range(40, 46 + i % 5)] for i in range(24)]
    return generate(llm, prompts, [{**PARAMS[i % 3], "max_tokens": 24} for i in range(24)], **more)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices of this size wait for each other's threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


ROLLOUT = (
    COMMON
    + """
if __name__ == "__main__":
    model, dtype, count = sys.argv[1:]
    rows = []
    for k in range(int(count)):
        llm = engine(model, dtype)
        rows += batch(llm, **({"engine": f"replica {k}"} if count != "1" else {}))
        del llm
    keep(rows)
"""
)

PREFIX = (
    COMMON
    + """
if __name__ == "__main__":
    versions = sys.argv[1:]
    llm = engine(versions[0], block_size=32, worker_extension_cls="halves.HalfLoader")
    prompts = [[10 + i, *range(60, 100 + i)] for i in range(12)]
    params = [{"temperature": 0.7, "max_tokens": 16}] * len(prompts)
    first = generate(llm, prompts, params, rollout_version=0)
    with vllm_compat.weight_update(llm):
        for half in (0, 1):
            llm.collective_rpc("load_half", args=(versions[1], half))
    keep({"first": first, "second": generate(llm, prompts, params, rollout_version=1)})
"""
)

UPDATES = (
    COMMON
    + """
if __name__ == "__main__":
    versions = sys.argv[1:]
    llm = engine(versions[0], worker_extension_cls="halves.HalfLoader")
    core, got = llm.llm_engine, {}
    found = {"whole": batch(llm)}

    def step():
        for out in core.step():
            got[out.request_id] = out

    def start():
        got.clear()
        for i in range(4):
            params = SamplingParams(temperature=1.0, max_tokens=300, ignore_eos=True, logprobs=5)
            core.add_request(f"{time.time()}", {"prompt_token_ids": [9, 40 + i, 12]}, params)
        while len(got) < 4 or min(len(out.outputs[0].token_ids) for out in got.values()) < 20:
            step()

    def send(folder):
        for half in (0, 1):
            llm.collective_rpc("load_half", args=(folder, half))
            time.sleep(0.3)

    def finish():
        while core.has_unfinished_requests():
            step()
        return [row(out, {"temperature": 1.0}) for out in got.values()]

    start()
    with vllm_compat.weight_update(llm):
        send(versions[1])
    found["held"] = finish()
    start()
    send(versions[2])  # the same transport without the hook
    found["torn"] = finish()
    keep(found)
"""
)


def change(model: Path, folder: Path, factor: float) -> Path:
    """The model with other norms."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    for i, name in enumerate(sorted(name for name in weights if "norm" in name)):
        weights[name] = weights[name] * (factor if i % 2 else 1 / factor)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> list[str]:
    """Three versions of the weights; 0 is the shipped model."""
    from support import PARITY

    place = tmp_path_factory.mktemp("versions")
    one = change(PARITY / "model", place / "1", 0.75)
    return [str(PARITY / "model"), str(one), str(change(one, place / "2", 1.2))]


@pytest.fixture
def rolled(run_engine, tmp_path: Path) -> Callable[..., list | dict]:
    """Run a script on a real engine and read what it kept."""

    def run(script: str, *args: str, **behaviors: str) -> list | dict:
        run_engine(script, *args, environment=behaviors).ok()
        return json.loads((tmp_path / "found.json").read_text())

    return run


@pytest.fixture
def diagnosed(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., dict]:
    """Score the rows with the trainer's two lines, write JSONL, and run the command. Adds the causes named, by share."""

    def run(rows: list[dict], versions: list[str], trainer: int, dtype: str = "float32", **more: object) -> dict:
        model = AutoModelForCausalLM.from_pretrained(versions[trainer], dtype=getattr(torch, dtype))
        fp32_lm_head(model)
        file = tmp_path / "rollouts.jsonl"
        with file.open("w") as out, torch.inference_mode():
            for row in rows:
                prompt, tokens = row["prompt_ids"], row["token_ids"]
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
                scored = processed_logprobs(logits, torch.tensor(tokens), row["sampling_params"], prompt_token_ids=prompt)
                out.write(json.dumps({**row, "trainer_logprobs": scored.tolist(), "trainer_version": trainer, **more}) + "\n")
        capsys.readouterr()
        given = [word for i, folder in enumerate(versions) for word in ("--model", f"{i}={folder}")]
        code = main(["diagnose", str(file), *given, "--dtype", dtype, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert code == int(not found["healthy"])
        innocent = ("rounding", "policy_lag")
        found["named"] = {f["cause"]: f["share"] for f in found["findings"] if f["cause"] not in innocent}
        return found

    return run


def test_nothing_is_wrong(rolled, diagnosed, versions) -> None:
    """Everything on, float32 and bfloat16: healthy, both heads seen to be float32, nothing named."""
    for dtype in ("float32", "bfloat16"):
        rows = rolled(ROLLOUT, versions[0], dtype, "1")
        found = diagnosed(rows, versions, 0, dtype, rollout_version=0)
        assert found["named"] == {}, dtype
        assert found["healthy"]
        assert found["heads"] == {"trainer": "float32", "rollout": "float32"}


def test_raw_logprobs(rolled, diagnosed, versions) -> None:
    """processed_logprobs switched off: raw, and nothing else."""
    rows = rolled(ROLLOUT, versions[0], "float32", "1", VLLM_COMPAT_PROCESSED_LOGPROBS="0")
    named = diagnosed(rows, versions, 0, rollout_version=0)["named"]
    assert set(named) == {"raw_logprobs"}
    assert named["raw_logprobs"] > 0.99


def test_rounded_head(rolled, diagnosed, versions) -> None:
    """fp32_lm_head switched off in bfloat16, the trainer's on: the one-sided head is named, though hidden in the rounding."""
    rows = rolled(ROLLOUT, versions[0], "bfloat16", "1", VLLM_COMPAT_FP32_LM_HEAD="0")
    found = diagnosed(rows, versions, 0, "bfloat16", rollout_version=0)
    assert set(found["named"]) == {"one_sided_head"}
    assert found["heads"] == {"trainer": "float32", "rollout": "rounded"}


def test_stale_prefix_cache(rolled, diagnosed, versions) -> None:
    """no_prefix_caching switched off and an update between two generations of the same prompts: the KV blocks are named."""
    found = rolled(PREFIX, *versions[:2], VLLM_COMPAT_NO_PREFIX_CACHING="0")
    assert diagnosed(found["first"], versions, 0)["healthy"]
    named = diagnosed(found["second"], versions, 1)["named"]
    assert set(named) == {"stale_prefix_cache"}
    assert named["stale_prefix_cache"] > 0.99


def test_weights(rolled, diagnosed, versions) -> None:
    """Weights that are not what the rows say: older by one update and by two, changed inside requests, and torn."""
    found = rolled(UPDATES, *versions, VLLM_COMPAT_UNBRACKETED_UPDATES="allow")
    assert diagnosed(found["whole"], versions, 0, rollout_version=0)["healthy"]
    lag = diagnosed(found["whole"], versions, 2, rollout_version=0)
    assert lag["healthy"]
    assert {f["cause"]: f["share"] for f in lag["findings"]}["policy_lag"] > 0.99
    for claimed, updates in ((1, "1 update behind"), (2, "2 updates behind")):
        stale = diagnosed(found["whole"], versions, claimed, rollout_version=claimed)
        assert set(stale["named"]) == {"stale_weights"}
        assert updates in stale["findings"][0]["evidence"]
        assert stale["findings"][0]["share"] > 0.99
    held = diagnosed(found["held"], versions, 1, rollout_version=1)
    assert set(held["named"]) == {"unreported_update"}
    assert held["named"]["unreported_update"] > 0.99
    torn = diagnosed(found["torn"], versions, 2, rollout_version=2)
    assert set(torn["named"]) == {"mixed_weights"}
    assert torn["named"]["mixed_weights"] > 0.99


def test_shared_seed(rolled, diagnosed, versions) -> None:
    """unshared_engine_seed switched off: two engines draw the same samples, and that is named; their logprobs are right."""
    rows = rolled(ROLLOUT, versions[0], "float32", "2", VLLM_COMPAT_UNSHARED_ENGINE_SEED="0")
    found = diagnosed(rows, versions, 0, rollout_version=0)
    assert set(found["named"]) == {"shared_seed"}
    assert not found["healthy"]
