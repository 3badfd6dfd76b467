"""What every release must show, whatever its routes: `make matrix` runs this file on one real engine after another.

``--engine-python`` names the Python that has the release (default: this one); what was measured goes into the file that
``--results`` names.
"""

from __future__ import annotations

import json
import shutil

import pytest
from packaging.version import Version
from replay import expected_logprobs
from safetensors.torch import load_file, save_file

from vllm_compat.behaviors import ALL
from vllm_compat.experiment import PREFIX_SETTINGS
from vllm_compat.patching.model import State
from vllm_compat.recording import KINDS
from vllm_compat.resolve import resolve

# Nats. The worst cell measured on any release is 9e-5, at T=0.1, which multiplies the forward pass's own rounding by ten.
EXACT = 3e-4


def assert_restored(recorded, reference) -> None:
    """Every cell is exact, both distributions keep the same tokens, and greedy decoding gives the same tokens."""
    for name, kinds in recorded.gaps.items():
        for kind, gap in kinds.items():
            assert gap.rows > 0 or (kind == "prefix" and name not in PREFIX_SETTINGS), f"{name}: no {kind} row was compared"
            assert gap.support == 0, f"{name}, {kind} rows: {gap.support} tokens are kept by one side only"
            assert gap.max < EXACT, f"{name}, {kind} rows: {gap.max}"
    greedy = reference.settings.index("greedy")
    for prompt in range(len(reference.prompts)):
        ours, theirs = recorded.found.get(greedy, prompt, "tokens"), reference.get(greedy, prompt, "tokens")
        assert ours.tolist() == theirs.tolist()


def figures(recorded) -> dict:
    """What a recording says about a release, for the matrix."""
    found = {}
    for kind in KINDS:
        gaps = {name: kinds[kind] for name, kinds in recorded.gaps.items() if kinds[kind].rows}
        worst = max(gaps, key=lambda name: gaps[name].max)
        found[kind] = {
            "worst": float(f"{gaps[worst].max:.2g}"),
            "at": worst,
            "mean": float(f"{sum(gap.mean for gap in gaps.values()) / len(gaps):.2g}"),
            "tokens_kept_by_one_side": sum(gap.support for gap in gaps.values()),
        }
    return found


def assert_states(status: dict, made_by: dict) -> None:
    """Every process answered, and every behavior ended where the pure plan for this release says."""
    assert status["proven"], status["failures"]
    runner = "v0" if made_by["engine"] == "V0" else "v1"
    assert status["model_runner"] == runner
    roles = [(p["role"], p["rank"]) for p in status["processes"]]
    assert roles == [("front", None), ("engine_core", None), ("worker", 0)]
    if Version(made_by["vllm"]) >= Version("0.19.0"):  # the worker is a process of its own
        assert len({p["pid"] for p in status["processes"]}) == 3
    release = Version(Version(made_by["vllm"]).base_version)
    for decision in resolve(ALL, version=release, runner=runner).decisions:
        row = status["behaviors"][decision.behavior]
        expected = {decision.state.value} if decision.state is not State.PENDING else {"applied", "exercised"}
        assert row["state"] in expected, (decision.behavior, row)
        if decision.wanted and not (runner == "v0" and decision.behavior == "fp32_lm_head"):
            assert row["evidence"], decision.behavior
    if runner == "v1":
        assert status["behaviors"]["processed_logprobs"]["state"] == "exercised"
        assert status["behaviors"]["fp32_lm_head"]["state"] in ("exercised", "native")


def test_one_import_restores_v0(record, reference, engine, results) -> None:
    """All settings in one batch meet the V0 recording, greedy tokens are equal, and every process says what is in force."""
    recorded = record("auto")
    results["with"] = {"dtype": engine.dtype, **figures(recorded)}
    made_by = recorded.found.header["made_by"]
    results.update({key: made_by[key] for key in ("engine", "vllm", "torch", "python", "device")})
    results["behaviors"] = {name: row["state"] for name, row in recorded.status["behaviors"].items()}
    results["processes"] = len(recorded.status["processes"])
    assert_states(recorded.status, made_by)
    if engine.dtype == "float32":
        assert_restored(recorded, reference)
    else:
        # This release runs no float32: rounding decides which token an edge keeps, and a mean is what can be asked.
        for name, kinds in recorded.gaps.items():
            assert max(gap.mean for gap in kinds.values() if gap.rows) < engine.rounding(name), name
    for s in range(len(recorded.found.settings)):
        tokens, rows = recorded.found.get(s, 0, "tokens"), recorded.found.get(s, 0, "logprobs")
        total = sum(float(row[token]) for row, token in zip(rows, tokens))
        assert total == pytest.approx(float(recorded.found.get(s, 0, "cumulative")[0]), abs=1e-4)


def test_as_it_comes(record, engine, results) -> None:
    """The negative control: without vllm_compat the same comparison sees V1's gap where there is one, and none on V0."""
    recorded = record("off")
    results["without"] = figures(recorded)
    assert recorded.status is None
    if recorded.found.header["made_by"]["engine"] == "V0":
        assert max(gap.max for kinds in recorded.gaps.values() for gap in kinds.values()) < EXACT
        return
    if engine.dtype == "float32":
        for name in ("greedy", "T=1"):
            assert recorded.gaps[name]["sampled"].max < EXACT
    for name, kinds in recorded.gaps.items():
        if "T=0.7" in name or "T=1.5" in name or name == "everything":
            assert all(gap.max > 0.1 for gap in kinds.values() if gap.rows)


INERT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model=sys.argv[1], dtype=sys.argv[2], enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128)
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12, logprobs=3, prompt_logprobs=2, seed=5)
    # one after the other: whether two requests meet in one step, where they round differently, is chance
    outs = [llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0] for ids in ([1, 5, 9, 13], [7, 3])]
    rows = [[list(o.outputs[0].token_ids), [{k: v.logprob for k, v in r.items()} for r in o.outputs[0].logprobs],
             [r and {k: v.logprob for k, v in r.items()} for r in o.prompt_logprobs]] for o in outs]
    loaded = sorted(m for m in sys.modules if m == "vllm_compat" or m.startswith("vllm_compat."))
    print("RESULT " + json.dumps({"loaded": loaded, "rows": rows}))
"""


def test_installed_but_unused_changes_nothing(run_engine, model, engine, results) -> None:
    """vLLM loads our plugin and it does nothing: byte-identical output to a vLLM that loads no plugin."""
    with_plugin = run_engine(INERT, str(model), engine.dtype).ok().result
    without = run_engine(INERT, str(model), engine.dtype, environment={"VLLM_PLUGINS": ""}).ok().result
    assert with_plugin["loaded"] == []
    assert json.dumps(with_plugin) == json.dumps(without)
    results["inert"] = True


UPDATE = """
import json, sys, time
import vllm_compat
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    old, new = sys.argv[1:]
    llm = LLM(model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512,
              worker_extension_cls="norms.NormLoader")
    engine, got = llm.llm_engine, {}

    def start(kind, count=4):
        for i in range(count):
            params = SamplingParams(temperature=1.0, max_tokens=300, ignore_eos=True, logprobs=0)
            engine.add_request(f"{kind}{i}", {"prompt_token_ids": [9, 40 + i, 12]}, params)
        while len([n for n in got if n.startswith(kind)]) < count or min(len(o.outputs[0].token_ids) for o in got.values()) < 20:
            step()

    def step():
        for out in engine.step():
            got[out.request_id] = out

    def send(folder):
        for half in (0, 1):
            assert all(llm.collective_rpc("load_norms", args=(folder, half)))
            time.sleep(0.4)

    start("held")
    with vllm_compat.weight_update(llm):
        send(new)
    while engine.has_unfinished_requests():
        step()
    start("torn")
    send(old)  # the negative control: no hook around the same transport
    while engine.has_unfinished_requests():
        step()
    found = {
        name: {"prompt": list(out.prompt_token_ids), "tokens": list(out.outputs[0].token_ids), "versions": out.outputs[0].token_weight_versions,
               "logprobs": [row[token].logprob for row, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)]}
        for name, out in got.items()
    }
    print("RESULT " + json.dumps(found))
"""


ASYNC_UPDATE = """
import asyncio, json, sys
import vllm_compat
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main(old, new):
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=old, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=512,
        worker_extension_cls="norms.NormLoader"))
    got = {}

    async def ask(name):
        params = SamplingParams(temperature=1.0, max_tokens=300, ignore_eos=True, logprobs=0)
        async for out in engine.generate({"prompt_token_ids": [9, 40 + len(got), 12]}, params, name):
            got[name] = out

    running = [asyncio.create_task(ask(f"held{i}")) for i in range(4)]
    while len(got) < 4 or min(len(out.outputs[0].token_ids) for out in got.values()) < 20:
        await asyncio.sleep(0.01)
    async with vllm_compat.weight_update(engine):
        for half in (0, 1):
            assert all(await engine.collective_rpc("load_norms", args=(new, half)))
            await asyncio.sleep(0.4)
    await asyncio.gather(*running)
    status = await vllm_compat.status(engine)
    found = {
        name: {"prompt": list(out.prompt_token_ids), "tokens": list(out.outputs[0].token_ids), "versions": out.outputs[0].token_weight_versions,
               "logprobs": [row[token].logprob for row, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)]}
        for name, out in got.items()
    }
    print("RESULT " + json.dumps({"status": status.to_dict(), **found}))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
"""


def _gaps(first, second, request, changed_at) -> list[float]:
    expected = expected_logprobs(first, second, request["prompt"], request["tokens"], changed_at)
    return [abs(a - b) for a, b in zip(expected, request["logprobs"], strict=True)]


def _best(first, second, request) -> tuple[int, float]:
    """Where the weights changed, and the worst gap of a token under that; both are measured and not assumed."""
    before = _gaps(first, first, request, 0)
    at = next((i for i, gap in enumerate(before) if gap > 1e-3), len(before))
    return at, max(_gaps(first, second, request, at))


def _worst_held(old, new, found) -> float:
    """The worst token of the requests that were running: exact for one place of the change, and for no other."""
    worst = []
    for i in range(4):
        request = found[f"held{i}"]
        assert len(request["tokens"]) == 300
        at, gap = _best(old, new, request)
        assert 20 <= at < 300
        assert request["versions"] == [0] * at + [1] * (300 - at)
        worst.append(gap)
        for wrong in (at - 1, at + 1):
            assert max(_gaps(old, new, request, wrong)) > 1e-3
    assert max(worst) < 1e-4
    return float(f"{max(worst):.2g}")


@pytest.fixture
def new_norms(model, tmp_path):
    """The model with other norms."""
    new = tmp_path / "new"
    shutil.copytree(model, new)
    weights = load_file(new / "model.safetensors")
    for i, name in enumerate(sorted(name for name in weights if "norm" in name)):
        weights[name] = weights[name] * (0.7 if i % 2 else 1.4)
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    return new


def test_weight_update(run_engine, model, engine, results, new_norms) -> None:
    """Sent in two halves with a pause between them, the weights change between two tokens of every request, exactly; the same
    transport without the hook leaves tokens that neither the old nor the new weights explain."""
    if engine.dtype != "float32":
        results["weight_update"] = "not measured: this release runs no float32"
        return
    allowed = {"VLLM_COMPAT_UNBRACKETED_UPDATES": "allow"}  # or the calls without the hook would be bracketed
    found = run_engine(UPDATE, str(model), str(new_norms), environment=allowed).ok().result
    worst = _worst_held(model, new_norms, found)
    torn = max(_best(new_norms, model, found[f"torn{i}"])[1] for i in range(4))
    results["weight_update"] = {"requests": 4, "worst": worst, "without_the_hook": float(f"{torn:.2g}")}
    if results["engine"] != "V0":  # V0's steps are run by the caller's own thread
        assert torn > 1e-2


def test_async_llm(run_engine, model, engine, results, new_norms) -> None:
    """`AsyncLLM` proves itself before its first token, and takes the same update between two tokens of every request."""
    if results["engine"] == "V0" or engine.dtype != "float32":
        results["async_llm"] = "not measured: " + ("no AsyncLLM on V0" if results["engine"] == "V0" else "no float32")
        return
    found = run_engine(ASYNC_UPDATE, str(model), str(new_norms)).ok().result
    assert found["status"]["proven"]
    assert [p["role"] for p in found["status"]["processes"]] == ["front", "engine_core", "worker"]
    results["async_llm"] = {"requests": 4, "worst": _worst_held(model, new_norms, found)}


SEEDED = """
import json, sys
import vllm_compat
from vllm import LLM

if __name__ == "__main__":
    import seeded
    llm = LLM(model=sys.argv[1], dtype=sys.argv[2], enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128,
              max_logprobs=seeded.VOCAB)
    asked = seeded.requests(24)
    print("RESULT " + json.dumps(seeded.compared(asked, seeded.generate(llm, asked + seeded.neighbors(24)))))
"""


def test_seeded_tokens(run_engine, model, engine, results) -> None:
    """Beside a greedy and two unseeded requests, every seeded request's tokens are what V0's rule draws from the returned
    distributions: on V0 itself, and everywhere."""
    found = run_engine(SEEDED, str(model), engine.dtype).ok().result
    assert found["equal"] == found["requests"] == 12
    assert all(len(tokens) == 24 for tokens in found["tokens"])
    results["seeded_sampling"] = {"requests": found["requests"], "tokens": 24}
