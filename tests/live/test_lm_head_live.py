"""The float32 head on the real engine: every kind of head, every way in which its weight changes, in every mode.

Logits are compared with a float64 product of the weights in the model's file, not of what the engine holds. Models are so
large that the product is the compiled one where there is a compiler.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import make_model
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from support import ROOT

HERE = Path(__file__).parent
VOCAB, WIDTH = 8200, 128  # not a multiple of 64: vLLM pads it
EXACT = 1e-6  # of the largest logit: float32 sums of 128 products


def _families():
    spec = importlib.util.spec_from_file_location("family_models", ROOT / "tests" / "families" / "models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _biased(folder: Path) -> None:
    """Phi: the one architecture here whose lm_head has a bias."""
    random, hidden = torch.Generator().manual_seed(0), WIDTH

    def made(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) * scale).bfloat16()

    tensors = {"model.embed_tokens.weight": made(VOCAB, hidden, scale=1.0)}
    for name, rows, columns in (
        ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", hidden, hidden), ("self_attn.v_proj", hidden, hidden),
        ("self_attn.dense", hidden, hidden), ("mlp.fc1", 2 * hidden, hidden), ("mlp.fc2", hidden, 2 * hidden),
    ):  # fmt: skip
        tensors[f"model.layers.0.{name}.weight"] = made(rows, columns, scale=columns**-0.5)
        tensors[f"model.layers.0.{name}.bias"] = made(rows, scale=0.1)
    for name in ("model.layers.0.input_layernorm", "model.final_layernorm"):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(hidden).bfloat16(), made(hidden, scale=0.1)
    tensors["lm_head.weight"], tensors["lm_head.bias"] = made(VOCAB, hidden, scale=0.2), made(VOCAB, scale=2.0)
    config = {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "vocab_size": VOCAB, "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "hidden_act": "gelu_new", "max_position_embeddings": 512, "layer_norm_eps": 1e-5, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5, "qk_layernorm": False, "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": 298, "pad_token_id": 299, "torch_dtype": "bfloat16", "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    make_model.tokenizer(folder)


# name: (model of tests/families, or phi; the head's parameter in the file, and in the engine)
KINDS = {
    "untied": ("mistral", "lm_head.weight"),
    "tied": ("qwen3", "model.embed_tokens.weight"),
    "soft-capped": ("gemma2", "model.embed_tokens.weight"),
    "scaled": ("granite", "model.embed_tokens.weight"),
    "biased": ("phi", "lm_head.weight"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a kind's model once, and a second one with other weights where ``seed`` is 1."""
    families, kept = _families(), {}

    def make(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in kept:
            folder = tmp_path_factory.mktemp("models") / f"{kind}-{seed}"
            name = KINDS[kind][0]
            with mock.patch.multiple(families, VOCAB=VOCAB, COMMON={**families.COMMON, "vocab_size": VOCAB}):
                if name == "phi":
                    _biased(folder)
                else:
                    families.make(folder, name, seed)
            kept[kind, seed] = folder
        return kept[kind, seed]

    return make


def expected(folder: Path, kind: str, hidden: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """float64 logits of what lies in the folder, or of another weight under its config."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    weight = tensors[KINDS[kind][1]] if weight is None else weight
    logits = hidden.double() @ weight.double().t()
    if "lm_head.bias" in tensors:
        logits = logits + tensors["lm_head.bias"].double()
    if cap := config.get("final_logit_softcapping"):
        logits = torch.tanh(logits / cap) * cap
    return logits / config.get("logits_scaling", 1.0)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The worst logit, of the largest."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


# Every change inside a `weight_update` block, each followed by the logits of the same rows.
CHANGES = """
import json, sys
import vllm_compat
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    llm = LLM(model=given["model"], dtype="bfloat16", enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128,
              worker_extension_cls="heads.HeadLoader", **given["arguments"])
    dtypes, refused = {}, None

    def logits(name):
        dtypes[name] = llm.collective_rpc("head_logits", args=(given["hidden"], given["out"] + name))

    logits("start")
    for name, method, arguments in given["changes"]:
        with vllm_compat.weight_update(llm):
            if method == "reload_weights":
                llm.collective_rpc("reload_weights", kwargs={"weights_path": arguments[0]})
            else:
                assert all(llm.collective_rpc(method, args=tuple(arguments))), method
        logits(name)
    if given["broken"]:
        try:
            with vllm_compat.weight_update(llm):
                llm.collective_rpc("break_head", args=(given["parameter"],))
                llm.collective_rpc("scale_in_place", args=(given["parameter"], 3.0))
        except vllm_compat.VllmCompatError as error:
            refused = [type(error).__name__, str(error)]
        with vllm_compat.weight_update(llm):
            llm.collective_rpc("mend_head")
        logits("mended")
    status = vllm_compat.status(llm).to_dict()
    params = SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=1, temperature=0.7, ignore_eos=True)
    (out,) = llm.generate([{"prompt_token_ids": [1, 5, 9]}], params, use_tqdm=False)
    kept = llm.collective_rpc("parameter_dtype", args=(given["parameter"],))
    print("RESULT " + json.dumps({
        "dtypes": dtypes, "refused": refused, "kept": kept, "state": status["behaviors"]["fp32_lm_head"]["state"],
        "proven": status["proven"], "saw": [row["saw"] for row in status["behaviors"]["fp32_lm_head"]["evidence"]],
        "tokens": len(out.outputs[0].token_ids), "vllm": status["vllm"],
    }))
"""


@pytest.fixture
def run(run_engine, engine, made, tmp_path):
    """Runs `CHANGES`: (result, the logits after each step, the rows)."""

    def go(kind, changes, *, environment=None, broken=False, ranks=(0,), **arguments):
        hidden = torch.randn(11, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
        torch.save(hidden, tmp_path / "hidden.pt")
        given = {
            "model": str(made(kind)), "hidden": str(tmp_path / "hidden.pt"), "out": str(tmp_path / "logits-"), "broken": broken,
            "parameter": KINDS[kind][1], "changes": changes, "arguments": arguments,
        }  # fmt: skip
        found = run_engine(CHANGES, json.dumps(given), environment=environment).ok().result
        names = ["start", *(name for name, *_ in changes), *(["mended"] if broken else [])]
        logits = {}
        for name in names:
            per_rank = [torch.load(file) for file in (tmp_path / f"logits-{name}.{rank}" for rank in ranks) if file.exists()]
            assert per_rank, name
            assert all(row["contiguous"] and row["logits"].dtype == torch.float32 for row in per_rank), name
            assert all(row["logits"].shape == (len(hidden), VOCAB) for row in per_rank), name
            logits[name] = per_rank[0]["logits"]
            assert all(torch.equal(row["logits"], logits[name]) for row in per_rank), name
        assert found["tokens"] == 4
        return found, logits, hidden

    return go


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_changing_the_weight(run, engine, made, tmp_path, kind) -> None:
    """Copied in place, loaded, and reloaded: the next logits are the new weight's float32 product each time, and the self-test at
    the end of an update refuses a head that kept a copy of the old one."""
    weight = load_file(made(kind) / "model.safetensors")[KINDS[kind][1]]
    other = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).mul_(float(weight.float().std())).bfloat16()
    save_file({KINDS[kind][1]: other}, tmp_path / "other.safetensors")
    changes = [
        ["in_place", "scale_in_place", [KINDS[kind][1], 0.5]],
        ["loaded", "load_tensors", [str(tmp_path / "other.safetensors")]],
    ]
    exact = {"start": weight, "in_place": weight * 0.5, "loaded": other, "mended": other * 3.0}
    if kind != "biased":
        reload_from = made(kind, 1)
        exact["reloaded"] = load_file(reload_from / "model.safetensors")[KINDS[kind][1]]
        if _release(engine) >= Version("0.19.0"):
            changes.append(["reloaded", "reload_weights", [str(reload_from)]])
            exact["mended"] = exact["reloaded"] * 3.0
    found, logits, hidden = run(kind, changes, broken=True)
    assert found["proven"]
    assert found["state"] in ("applied", "exercised")
    for name, rows in logits.items():
        right = expected(made(kind), kind, hidden, exact[name])
        assert off(rows, right) < EXACT, name
        assert off(rows.bfloat16(), right) > 1e-4, name
    kinds = [expected(made(kind), kind, hidden, exact[name]) for name in logits]
    assert all(off(a, b) > 1e-2 for a, b in itertools.pairwise(kinds))
    name, text = found["refused"]
    assert name == "WeightUpdateError"
    assert "fp32_lm_head in worker rank 0: logits differ from the float32 product with the live weight" in text
    assert "stays paused" in text
    assert "compiled product" in found["saw"][0] or "no compiled product" in found["saw"][0]
    assert "no float32 copy of" in found["saw"][0]


def _release(engine) -> Version:
    import subprocess

    code = "import importlib.metadata as m; print(m.version('vllm'))"
    return Version(
        Version(subprocess.run([engine.python, "-c", code], capture_output=True, text=True, check=True).stdout).base_version
    )


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_float32_master_weights(run, engine, made, tmp_path, kind) -> None:
    """Mode weights: float32 values that no bfloat16 has arrive by load_weights, stay, and are what the logits are made of; a
    tied embedding still feeds the model its own dtype. Mode accumulate rounds the same values to bfloat16."""
    weight = load_file(made(kind) / "model.safetensors")[KINDS[kind][1]]
    master = weight.float() * (1 + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    save_file({KINDS[kind][1]: master}, tmp_path / "master.safetensors")
    changes = [["master", "load_tensors", [str(tmp_path / "master.safetensors")]]]
    if _release(engine) >= Version("0.19.0"):
        whole = tmp_path / "whole"
        whole.mkdir()
        for file in made(kind).iterdir():
            (whole / file.name).write_bytes(file.read_bytes())
        tensors = load_file(made(kind) / "model.safetensors")
        save_file({**tensors, KINDS[kind][1]: master * 2}, whole / "model.safetensors", metadata={"format": "pt"})
        changes.append(["reloaded", "reload_weights", [str(whole)]])
    for mode, kept in (("weights", master), ("accumulate", master.bfloat16())):
        found, logits, hidden = run(kind, changes, environment={"VLLM_COMPAT_FP32_LM_HEAD": mode})
        assert found["proven"]
        assert found["kept"] == [str(kept.dtype)]
        assert off(logits["start"], expected(made(kind), kind, hidden)) < EXACT
        assert off(logits["master"], expected(made(kind), kind, hidden, kept)) < EXACT
        if "reloaded" in logits:
            assert off(logits["reloaded"], expected(made(kind), kind, hidden, kept * 2)) < EXACT
        assert ("MiB more than in torch.bfloat16" in found["saw"][0]) == (mode == "weights")
    assert off(expected(made(kind), kind, hidden, master), expected(made(kind), kind, hidden, kept)) > 1e-4


def test_tensor_parallel(run, made) -> None:
    """TP=2: each rank's shard changes in place, the gather is float32, and the ranks compare checksums."""
    found, logits, hidden = run(
        "untied",
        [["in_place", "scale_in_place", ["lm_head.weight", 0.5]]],
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        ranks=(0, 1),
        tensor_parallel_size=2,
    )
    for name, factor in (("start", 1.0), ("in_place", 0.5)):
        assert off(logits[name], factor * expected(made("untied"), "untied", hidden)) < EXACT
    assert len(found["saw"]) == 2
    assert all("2 ranks" in saw for saw in found["saw"])
    assert "with the checksums that they sent" in found["saw"][0]


def test_speculative_decoding(run, made) -> None:
    """The target's head under n-gram drafts: as without them. Its sampler is refused by name, so it is given up here."""
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    found, logits, hidden = run(
        "untied",
        [["in_place", "scale_in_place", ["lm_head.weight", 0.5]]],
        environment={"VLLM_COMPAT_PROCESSED_LOGPROBS": "0", "VLLM_COMPAT_SEEDED_SAMPLING": "0"},
        speculative_config=speculative,
    )
    assert found["proven"]
    for name, factor in (("start", 1.0), ("in_place", 0.5)):
        assert off(logits[name], factor * expected(made("untied"), "untied", hidden)) < EXACT


LORA = """
import json, sys
import vllm_compat
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, adapter, dtype = sys.argv[1:]
    llm = LLM(model=model, dtype=dtype, enforce_eager=True, gpu_memory_utilization=0.3, max_model_len=128, enable_lora=True,
              max_lora_rank=8, max_loras=1)  # one slot: "no adapter" is its number, too
    params = SamplingParams(max_tokens=12, logprobs=1, temperature=1.0, ignore_eos=True)
    requests = [LoRARequest("adapter", 1, adapter), None]
    outs = llm.generate([{"prompt_token_ids": [1, 5, 9, 200]}] * 2, params, lora_request=requests, use_tqdm=False)
    status = vllm_compat.status(llm).to_dict()
    print("RESULT " + json.dumps({
        "proven": status["proven"], "saw": [row["saw"] for row in status["behaviors"]["fp32_lm_head"]["evidence"]],
        "rows": [[list(o.outputs[0].token_ids),
                  [row[token].logprob for row, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)]] for o in outs]}))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_on_trunk_and_head(run_engine, tmp_path, dtype) -> None:
    """An adapter on attention and lm_head: with and without it in one batch, each is what a merged float32 model gives; in
    bfloat16 within its trunk's rounding, and the worker proves the head under LoRA."""
    import transformers

    rank, alpha, folder = 4, 8, tmp_path / "model"
    with mock.patch.object(make_model, "VOCAB", VOCAB):
        make_model.make(folder)
    random, adapter = torch.Generator().manual_seed(11), tmp_path / "adapter"
    adapter.mkdir()
    tensors = load_file(folder / "model.safetensors")
    merged, given = {name: value.float() for name, value in tensors.items()}, {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head"):
        rows, columns = tensors[f"{name}.weight"].shape
        down = (torch.randn(rank, columns, generator=random) * columns**-0.5).bfloat16()
        up = (torch.randn(rows, rank, generator=random) * 0.3).bfloat16()
        given[f"base_model.model.{name}.lora_A.weight"], given[f"base_model.model.{name}.lora_B.weight"] = down, up
        merged[f"{name}.weight"] += alpha / rank * up.float() @ down.float()
    save_file(given, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj", "lm_head"], "bias": "none",
        "base_model_name_or_path": str(folder), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = run_engine(LORA, str(folder), str(adapter), dtype).ok().result
    assert found["proven"]
    assert "rows without an adapter untouched" in found["saw"][0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gaps = {}
    for with_adapter, (tokens, logprobs) in zip((True, False), found["rows"], strict=True):
        for weights, name in ((merged, "merged"), ({k: v.float() for k, v in tensors.items()}, "plain")):
            model.load_state_dict(weights, strict=False)
            with torch.no_grad():
                logits = model(torch.tensor([[1, 5, 9, 200, *tokens]])).logits[0, 3:-1]
            right = logits.double().log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
            gaps[with_adapter, name] = float((right - torch.tensor(logprobs)).abs().max())
    limit = 1e-4 if dtype == "float32" else 0.2
    assert gaps[True, "merged"] < limit
    assert gaps[False, "plain"] < limit
    assert gaps[True, "plain"] > 10 * limit or gaps[True, "plain"] > 1
    assert gaps[False, "merged"] > 10 * limit or gaps[False, "merged"] > 1
