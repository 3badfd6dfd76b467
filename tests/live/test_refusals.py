"""The error paths on the real engine: each a named error that says what to do, and never a token in between."""

from __future__ import annotations

import pytest

IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

# make(**kwargs) builds an LLM in this process; caught(f) turns what f raises into data
PRELUDE = """
import json, sys, traceback, warnings
MODEL = sys.argv[1]

def make(**more):
    from vllm import LLM
    more = {"enforce_eager": True, "gpu_memory_utilization": 0.3, "max_model_len": 128, **more}
    return LLM(model=MODEL, **more)

def caught(function):
    try:
        function()
    except BaseException as error:
        return [type(error).__name__, str(error), getattr(error, "failures", None)]
    return None

def say(found):
    print("RESULT " + json.dumps(found))

def generate(llm):
    from vllm import SamplingParams
    (out,) = llm.generate(["ab"], SamplingParams(temperature=0.5, max_tokens=1, logprobs=0), use_tqdm=False)
    return len(out.outputs[0].token_ids)
"""


def test_vllm_plugins_that_excludes_us(run_python, model) -> None:
    """``VLLM_PLUGINS`` without our name: refused before anything starts."""
    script = PRELUDE + "import vllm_compat\nif __name__ == '__main__': say(caught(make))"
    name, text, _ = run_python(script, str(model), environment={"VLLM_PLUGINS": "other_plugin"}).ok().result
    assert name == "PluginExcludedError"
    assert "add vllm_compat to it" in text


def test_an_unsupported_vllm(run_python, model) -> None:
    """A release nobody read: refused by name, with the range that was; the way out is profile off."""
    script = (
        PRELUDE
        + """
import vllm_compat
from packaging.version import Version
from vllm_compat import vllm_info
import dataclasses
real = vllm_info.installed()
vllm_info.installed = lambda: dataclasses.replace(real, version="0.34.0", release=Version("0.34.0"))
if __name__ == "__main__":
    say(caught(make))
"""
    )
    name, text, _ = run_python(script, str(model)).ok().result
    assert name == "UnsupportedVLLMError"
    assert "0.34.0" in text
    assert "from 0.8.5 to 0.33.0" in text
    assert "VLLM_COMPAT_PROFILE=off" in text


def test_too_late(run_python, model) -> None:
    """A configuration made before the import is refused, and so is an import while an engine runs."""
    script = (
        PRELUDE
        + """
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine
if __name__ == "__main__":
    config = EngineArgs(model=MODEL, enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128).create_engine_config()
    import vllm_compat
    before = caught(lambda: LLMEngine.from_vllm_config(config))
    from vllm_compat import bootstrap
    bootstrap.deactivate()
    engine = LLMEngine.from_vllm_config(config)
    say([before, caught(bootstrap.activate)])
"""
    )
    before, during = run_python(script, str(model), environment=IN_PROCESS).ok().result
    assert before[0] == during[0] == "TooLateError"
    assert "make the configuration again" in before[1]
    assert "an engine already runs in this process" in during[1]


FOREIGN = (
    PRELUDE
    + """
import vllm_compat
from vllm.v1.sample import sampler
from vllm_compat import bootstrap
if __name__ == "__main__":
    original = sampler.Sampler.sample
    def sample(self, *args, **kwargs):
        return original(self, *args, **kwargs)
    sampler.Sampler.sample = sample
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        kept = []
        error = caught(lambda: kept.append(make()))
    generated = generate(kept[0]) if kept else None
    states = {n: r["state"] for n, r in vllm_compat.status()[0].to_dict()["behaviors"].items()} if kept else None
    ours = [str(w.message) for w in warned if issubclass(w.category, vllm_compat.VllmCompatWarning)]
    say([error, ours, generated, states, sampler.Sampler.sample is sample])
"""
)


def test_a_foreign_patch_on_our_target(run_python, model) -> None:
    """Somebody replaced `Sampler.sample` first: the proof names behavior, process, rank and the other patch."""
    error, _, generated, _, untouched = run_python(FOREIGN, str(model), environment=IN_PROCESS).ok().result
    assert error[0] == "ProofError"
    (failure,) = [row for row in error[2] if "already replaced" in row[3]]
    assert failure[:3] == ["processed_logprobs", "worker", 0]
    assert "script.py" in failure[3]
    assert generated is None
    assert untouched


def test_not_strict_warns_and_names_the_state(run_python, model) -> None:
    """``VLLM_COMPAT_STRICT=0``: the same foreign patch is a warning and a failed state, and the engine runs."""
    environment = {**IN_PROCESS, "VLLM_COMPAT_STRICT": "0"}
    error, warned, generated, states, _ = run_python(FOREIGN, str(model), environment=environment).ok().result
    assert error is None
    assert any("already replaced" in text for text in warned)
    assert generated == 1
    assert states["processed_logprobs"] == "failed"
    assert states["fp32_lm_head"] == "applied"  # the last word is of the engine's start, before the first request


def test_a_target_that_is_not_as_declared(run_python, model) -> None:
    """The installed source no longer has what a patch relies on: refused before the configuration is made."""
    script = (
        PRELUDE
        + """
import vllm_compat, pathlib, shutil, dataclasses
from vllm_compat import vllm_info
from vllm_compat.patching import probe
if __name__ == "__main__":
    real = vllm_info.installed()
    copy = pathlib.Path("copy/vllm")
    for name in ("v1/sample", "v1/worker", "v1/engine", "model_executor/layers"):
        shutil.copytree(real.root / name, copy / name)
    file = copy / "v1/sample/sampler.py"
    file.write_text(file.read_text().replace("def sample(", "def draw("))
    vllm_info.installed = lambda: dataclasses.replace(real, root=copy)
    first = caught(make)
    file.write_text(file.read_text().replace("def draw(\\n        self,\\n        logits:", "def sample(\\n        self,\\n        scores:"))
    probe._lines.cache_clear()
    say([first, caught(make)])
"""
    )
    missing, changed = run_python(script, str(model), environment=IN_PROCESS).ok().result
    assert missing[0] == "TargetMissingError"
    assert "vllm.v1.sample.sampler:Sampler.sample" in missing[1]
    assert changed[0] == "TargetChangedError"
    assert "logits" in changed[1]


QUANTIZED = (
    PRELUDE
    + """
import vllm_compat
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
import torch

class PackedHeadMethod(UnquantizedEmbeddingMethod.__mro__[1]):
    create_weights = UnquantizedEmbeddingMethod.create_weights
    embedding = UnquantizedEmbeddingMethod.embedding
    def process_weights_after_loading(self, layer):
        pass
    def apply(self, layer, x, bias=None):
        return torch.nn.functional.linear(x, layer.weight, bias)

@register_quantization_config("packed_head")
class PackedHead(QuantizationConfig):
    def get_name(self): return "packed_head"
    def get_supported_act_dtypes(self): return [torch.bfloat16, torch.float32]
    @classmethod
    def get_min_capability(cls): return -1
    @staticmethod
    def get_config_filenames(): return []
    @classmethod
    def from_config(cls, config): return cls()
    def get_quant_method(self, layer, prefix):
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return PackedHeadMethod() if isinstance(layer, ParallelLMHead) else None

if __name__ == "__main__":
    kept = []
    refused = caught(lambda: kept.append(make(quantization="packed_head", dtype="bfloat16")))
    say([refused, generate(kept[0]) if kept else None])
"""
)


def test_a_quantized_lm_head(run_python, model) -> None:
    """A head with its own quantization method cannot be float32: refused by name, or given up on purpose and run."""
    refused, _ = run_python(QUANTIZED, str(model), environment=IN_PROCESS).ok().result
    assert refused[0] == "ProofError"
    (failure,) = refused[2]
    assert failure[:3] == ["fp32_lm_head", "worker", 0]
    assert "quantized (PackedHeadMethod)" in failure[3]
    allowed, generated = (
        run_python(QUANTIZED, str(model), environment={**IN_PROCESS, "VLLM_COMPAT_FP32_LM_HEAD": "0"}).ok().result
    )
    assert allowed is None
    assert generated == 1


def test_speculative_decoding_is_refused(run_python, model) -> None:
    """It samples in another way than `processed_logprobs` was proven for: refused by name."""
    more = "speculative_config={'method': 'ngram', 'num_speculative_tokens': 2, 'prompt_lookup_max': 3}"
    script = PRELUDE + f"import vllm_compat\nif __name__ == '__main__': say(caught(lambda: make({more})))"
    name, _, failures = run_python(script, str(model), environment=IN_PROCESS).ok().result
    assert name == "ProofError"
    ((found, process, rank, reason),) = failures
    assert (found, process, rank) == ("processed_logprobs", "worker", 0)
    assert "speculative decoding" in reason


def test_precedence_and_the_users_own_object(run_python, model) -> None:
    """Engine argument beats environment beats profile beats default, also where the value is vLLM's default; functions in
    ``hf_overrides`` are kept; nothing of the user's EngineArgs changes."""
    script = (
        PRELUDE
        + """
import vllm_compat, os
def overrides(config):
    config.my_mark = 1
    return config
def lower(config):
    config.head_dtype = "bfloat16"
    return config
if __name__ == "__main__":
    from vllm.engine.arg_utils import EngineArgs
    base = dict(model=MODEL, enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128, dtype="bfloat16")
    from vllm_compat import plan
    def states(**more):
        args = EngineArgs(**base, **more)
        before = dict(vars(args))
        config = args.create_engine_config()
        after = dict(vars(args))
        untouched = all(before[k] == after[k] for k in ("seed", "logprobs_mode", "enable_prefix_caching", "async_scheduling", "hf_overrides", "additional_config"))
        found = plan.of(config)
        head = str(config.model_config.head_dtype)
        return {
            "states": {d.behavior: [d.state.value, d.origin] for d in found.decisions}, "untouched": untouched, "head": head,
            "mark": getattr(config.model_config.hf_config, "my_mark", 0), "mode": config.model_config.logprobs_mode,
            "seed": config.model_config.seed, "caching": config.cache_config.enable_prefix_caching,
            "text": found.text(),
        }
    say({
        "plain": states(), "again": states(),
        "raw": states(logprobs_mode="raw_logprobs"), "same": states(logprobs_mode="processed_logprobs"),
        "seed": states(seed=7), "zero": states(seed=0), "caching": states(enable_prefix_caching=True),
        "function": states(hf_overrides=overrides), "lower": states(hf_overrides=lower),
        "ranks": caught(lambda: states(distributed_executor_backend="external_launcher", tensor_parallel_size=2)),
        "dict": states(hf_overrides={"my_mark": 2}), "low_dict": states(hf_overrides={"head_dtype": "bfloat16"}),
    })
"""
    )
    environment = {"VLLM_COMPAT_NO_ASYNC_SCHEDULING": "0", "VLLM_COMPAT_NO_PREFIX_CACHING": "1"}
    found = run_python(script, str(model), environment=environment).ok().result
    name, text, _ = found.pop("ranks")
    assert name == "UnsupportedBehaviorError"
    assert "pass seed=<your own> to every rank" in text
    assert all(row["untouched"] for row in found.values())
    plain = found["plain"]
    assert plain["states"] == {
        "model_runner_v1": ["native", "default"],
        "processed_logprobs": ["pending", "profile"],
        "seeded_sampling": ["pending", "default"],
        "no_prefix_caching": ["native", "environment"],
        "no_async_scheduling": ["disabled", "environment"],
        "fp32_lm_head": ["pending", "profile"],
        "synchronized_weight_update": ["native", "default"],
        "unshared_engine_seed": ["pending", "default"],
    }
    assert (plain["mode"], plain["head"], plain["caching"]) == ("processed_logprobs", "torch.float32", False)
    # two engines, two seeds, one plan: the text is in vLLM's compile cache key
    assert plain["seed"] != found["again"]["seed"]
    assert plain["text"] == found["again"]["text"]
    assert found["raw"]["states"]["processed_logprobs"] == ["overridden", "engine argument"]
    assert found["raw"]["mode"] == "raw_logprobs"
    assert found["same"]["states"]["processed_logprobs"] == ["pending", "engine argument"]
    assert found["seed"]["states"]["unshared_engine_seed"] == ["overridden", "engine argument"]
    assert found["seed"]["seed"] == 7
    assert found["zero"]["seed"] == 0
    assert found["caching"]["states"]["no_prefix_caching"] == ["overridden", "engine argument"]
    assert found["caching"]["caching"] is True
    assert (found["function"]["mark"], found["function"]["head"]) == (1, "torch.float32")
    assert (found["dict"]["mark"], found["dict"]["head"]) == (2, "torch.float32")
    for name in ("lower", "low_dict"):
        assert found[name]["states"]["fp32_lm_head"] == ["overridden", "engine argument"]
        assert found[name]["head"] == "torch.bfloat16"


def test_model_runner_v2_by_the_user(run_python, model) -> None:
    """``VLLM_USE_V2_MODEL_RUNNER=1``: refused for what does not hold there; where that is given up, vLLM has the word (here:
    no Triton, no V2)."""
    script = PRELUDE + "import vllm_compat\nif __name__ == '__main__': say(caught(make))"
    variables = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    name, text, _ = run_python(script, str(model), environment=variables).ok().result
    assert name == "UnsupportedBehaviorError"
    assert "processed_logprobs: Model Runner V2 scores prompts raw" in text
    given_up = {"VLLM_COMPAT_PROCESSED_LOGPROBS": "0", "VLLM_COMPAT_SEEDED_SAMPLING": "0"}
    name, text, _ = run_python(script, str(model), environment={**variables, **given_up}).ok().result
    assert name == "ValidationError"
    assert "Model Runner V2 requires Triton" in text


def test_two_engines_in_one_process_that_disagree(run_python, model) -> None:
    """Patches act on a process: a second in-process engine that needs others is refused, one that agrees is not."""
    script = (
        PRELUDE
        + """
import vllm_compat
if __name__ == "__main__":
    first = make()
    second = caught(lambda: make(logprobs_mode="raw_logprobs"))
    say([generate(first), second, [s.proven for s in vllm_compat.status()]])
"""
    )
    generated, refused, proven = run_python(script, str(model), environment=IN_PROCESS).ok().result
    assert generated == 1
    assert refused[0] == "PlanConflictError"
    assert proven == [True]


def test_an_engine_that_loses_a_patch_is_seen(run_python, model) -> None:
    """`status(engine)` asks again: a replacement that somebody covered after the start shows as failed."""
    script = (
        PRELUDE
        + """
import vllm_compat
if __name__ == "__main__":
    llm = make()
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    GPUModelRunner._get_prompt_logprobs_dict = lambda self, *args, **kwargs: {}
    status = vllm_compat.status(llm)
    say([status.proven, status.failures])
"""
    )
    proven, failures = run_python(script, str(model), environment=IN_PROCESS).ok().result
    assert not proven
    assert any("somebody replaced" in row[3] for row in failures)


def test_async_llm_refuses_before_the_first_token(run_python, model, tmp_path) -> None:
    """A patch that only the worker process has, put in by a worker extension: `AsyncLLM` refuses its first request, and
    every later one, naming the worker; nothing is generated."""
    (tmp_path / "extension.py").write_text(
        "from vllm.v1.sample.sampler import Sampler\n"
        "class Extension: pass\n"
        "Sampler.sample = (lambda original: lambda self, *args, **kwargs: original(self, *args, **kwargs))(Sampler.sample)\n"
    )
    script = (
        PRELUDE
        + """
import asyncio, vllm_compat
async def main():
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=MODEL, enforce_eager=True, gpu_memory_utilization=0.3,
        max_model_len=128, worker_extension_cls="extension.Extension"))
    tokens, errors = [], []
    async def ask(name):
        try:
            async for out in engine.generate("ab", SamplingParams(max_tokens=2), name):
                tokens.append(name)
        except vllm_compat.VllmCompatError as error:
            errors.append([type(error).__name__, error.failures])
    await asyncio.gather(ask("a"), ask("b"))
    await ask("c")
    say([tokens, errors])
if __name__ == "__main__":
    asyncio.run(main())
"""
    )
    tokens, refused = run_python(script, str(model), environment={"PYTHONPATH": str(tmp_path)}).ok().result
    assert tokens == []
    assert len(refused) == 3
    for name, failures in refused:
        assert name == "ProofError"
        assert [row[:3] for row in failures] == [["processed_logprobs", "worker", 0]]
        assert "somebody replaced vllm.v1.sample.sampler:Sampler.sample" in failures[0][3]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_another_family(run_python, tmp_path, tied) -> None:
    """Llama, untied and tied, bfloat16, compiled: the profile matches and the head is float32 by its own self-test."""
    from make_model import make as make_model

    folder = make_model(tmp_path / "llama", architecture="llama", tied=tied, seed=3)
    script = (
        PRELUDE
        + """
import vllm_compat
if __name__ == "__main__":
    llm = make(dtype="bfloat16", enforce_eager=False)
    found = vllm_compat.status(llm).to_dict()
    say([found["proven"], found["profile"], found["behaviors"]["fp32_lm_head"]["evidence"][0]["saw"], generate(llm)])
"""
    )
    proven, profile, saw, generated = run_python(script, str(folder), environment=IN_PROCESS).ok().result
    assert proven
    assert profile == "llama3"
    assert "live torch.bfloat16 weight" in saw
    assert generated == 1
