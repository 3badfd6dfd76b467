"""A small model of every family: seeded random weights in bfloat16, under the names that checkpoints have.

    python tests/families/models.py FOLDER [MODEL ...]     # FOLDER/<model>/{config.json,model.safetensors,tokenizer.json,…}

One row of ``MODELS`` is one model: its family's profile and what its config.json says beyond ``COMMON``. Parameter names and
shapes follow from the config alone (`parameters`), as the architecture's checkpoints have them; transformers 4.51 (vLLM
0.8.5) to 5 and vLLM 0.8.5 to 0.32.0 read them.

Numbers a family is known for (multipliers, soft caps, windows) are chosen so that they matter in a model of this size: an
engine that ignores one is far off. As in examples/v0_parity/make_model.py, whose tokenizer is used: the vocabulary of 300 is
no multiple of 64, and the head is scaled so that distributions are peaked.

The reference is V0 (vLLM 0.8.5, CPU), except where that does not compute the model: then ``trainer`` says why, and the
reference is transformers in float32. A window that the recorded sequences outgrow is such a case: the families that have one
are there twice, with a window of 512 against V0, and one of 32 (``…-window``) against transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
VOCAB, EOS, PAD, HIDDEN = 300, 298, 299, 128
PEAK = 2.5  # standard deviation of the logits

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_dropout": 0.0,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Model:
    """``profile``: the family's. ``config``: what it says beyond ``COMMON``. ``qkv_bias`` is a checkpoint's fact that no
    config names. ``gain`` is what the last norm multiplies with: where a tied embedding is scaled up on its way in, the
    peak of the logits comes from here, or a token would always be followed by itself. ``trainer``: why V0 is no reference.
    ``engine_args`` and ``environment`` (release -> variables): what a CPU
    engine needs to compute this model."""

    profile: str
    architecture: str
    tied: bool
    config: dict[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    gain: float = 1.0
    trainer: str = ""
    engine_args: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, dict[str, str]] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)  # release -> what its engine does to this model as it comes


_WINDOW = "V0's CPU engine (0.8.5) decodes wrongly beyond the window, and in prefill gives every layer the first layer's mask"
_MOE = "V0's CPU engine (0.8.5) has no MoE kernel without intel_extension_for_pytorch"
_HEAD = {"head_dim": 32}
_GEMMA = {**_HEAD, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_GEMMA3 = {
    "model_type": "gemma3_text", **_GEMMA, "query_pre_attn_scalar": 24, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "sliding_window_pattern": 2, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
}  # fmt: skip
MODELS: dict[str, Model] = {
    "qwen2.5": Model(
        "qwen2.5", "Qwen2ForCausalLM", True, {"model_type": "qwen2", "use_sliding_window": False}, qkv_bias=True
    ),
    "qwen3": Model("qwen3", "Qwen3ForCausalLM", True, {"model_type": "qwen3", **_HEAD, "attention_bias": False}),
    "llama3": Model(
        "llama3", "LlamaForCausalLM", True,
        {
            "model_type": "llama", **_HEAD, "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": Model("mistral", "MistralForCausalLM", False, {"model_type": "mistral", **_HEAD, "sliding_window": None}),
    "mistral-window": Model(
        "mistral", "MistralForCausalLM", False, {"model_type": "mistral", **_HEAD, "sliding_window": 32}, trainer=_WINDOW
    ),
    "gemma2": Model(
        "gemma2", "Gemma2ForCausalLM", True,
        {
            "model_type": "gemma2", **_GEMMA, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0, "sliding_window": 32,
        },
        gain=5.0, trainer=f"V0's CPU engine (0.8.5) leaves attn_logit_softcapping out; {_WINDOW}",
    ),
    "gemma3": Model("gemma3", "Gemma3ForCausalLM", True, {**_GEMMA3, "sliding_window": 512}, gain=5.0),
    "gemma3-window": Model(
        "gemma3", "Gemma3ForCausalLM", True, {**_GEMMA3, "sliding_window": 32}, gain=5.0, trainer=_WINDOW
    ),
    "phi3": Model(
        "phi3", "Phi3ForCausalLM", False, {"model_type": "phi3", "num_key_value_heads": 4, "sliding_window": 512}
    ),
    "phi4": Model(
        "phi3", "Phi3ForCausalLM", True, {"model_type": "phi3", "sliding_window": None, "partial_rotary_factor": 0.75}
    ),
    "granite": Model(
        "granite", "GraniteForCausalLM", True,
        {
            "model_type": "granite", "attention_bias": False, "mlp_bias": False, "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4, "attention_multiplier": 0.25, "logits_scaling": 2.0,
        },
        gain=4.0,
    ),
    "olmo2": Model("olmo2", "Olmo2ForCausalLM", False, {"model_type": "olmo2", "attention_bias": False}),
    "deepseek-v2": Model(
        "deepseek-v2", "DeepseekV2ForCausalLM", False,
        {
            "model_type": "deepseek_v2", "attention_bias": False, "num_attention_heads": 2, "num_key_value_heads": 2,
            # The rank and the rotary part are those of the real ones: MLA kernels are made for these two numbers.
            "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
            "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_routed_experts": 8, "num_experts_per_tok": 3,
            "n_shared_experts": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
            "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.5,
        },
        trainer=f"transformers 4.51 (vLLM 0.8.5) does not know deepseek_v2; {_MOE}",
        # The CPU's rotary kernel reads a [tokens, heads, size] view, which is what MLA gives it, as [tokens, size].
        engine_args={"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
        environment={"0.18.1": {"VLLM_MLA_DISABLE": "1"}},  # "MLA is not supported on CPU"
        known={"0.18.1": "its CPU engine is 1e-3 nats (mean, T=1) off transformers without vllm_compat, too; cause not found"},
    ),
    "qwen3-moe": Model(
        "qwen3-moe", "Qwen3MoeForCausalLM", False,
        {
            "model_type": "qwen3_moe", **_HEAD, "attention_bias": False, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "use_sliding_window": False,
        },
        trainer=_MOE,
    ),
}  # fmt: skip


def config(model: Model) -> dict[str, Any]:
    """What config.json holds."""
    return {**COMMON, **model.config, "architectures": [model.architecture], "tie_word_embeddings": model.tied}


def parameters(model: Model) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and standard deviation of every parameter, in a fixed order; 0 stands for the weight of a norm."""
    given = config(model)
    hidden, inner, kind = given["hidden_size"], given["intermediate_size"], given["model_type"]
    gemma = kind.startswith("gemma")
    heads, pairs = given["num_attention_heads"], given["num_key_value_heads"]
    size = given.get("head_dim", hidden // heads)
    # Deviation of a row of the head that gives logits their peak; an embedding of its own is 1.
    peak = PEAK * given.get("logits_scaling", 1.0) / model.gain / math.sqrt(hidden)

    def linear(name: str, rows: int, columns: int) -> tuple[str, tuple[int, ...], float]:
        return f"{name}.weight", (rows, columns), 1.5 / math.sqrt(columns)

    def mlp(at: str, inner: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
        if kind == "phi3":
            yield linear(f"{at}.gate_up_proj", 2 * inner, hidden)
        else:
            yield linear(f"{at}.gate_proj", inner, hidden)
            yield linear(f"{at}.up_proj", inner, hidden)
        yield linear(f"{at}.down_proj", hidden, inner)

    yield "model.embed_tokens.weight", (VOCAB, hidden), peak if model.tied else 1.0
    for layer in range(given["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        if kind == "deepseek_v2":
            plain, turned, value, rank = (
                given[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
            )
            yield linear(f"{at}.self_attn.q_proj", heads * (plain + turned), hidden)
            yield linear(f"{at}.self_attn.kv_a_proj_with_mqa", rank + turned, hidden)
            yield f"{at}.self_attn.kv_a_layernorm.weight", (rank,), 0.0
            yield linear(f"{at}.self_attn.kv_b_proj", heads * (plain + value), rank)
            yield linear(f"{at}.self_attn.o_proj", hidden, heads * value)
        else:
            if kind == "phi3":
                yield linear(f"{at}.self_attn.qkv_proj", (heads + 2 * pairs) * size, hidden)
            else:
                for name, rows in (("q", heads * size), ("k", pairs * size), ("v", pairs * size)):
                    yield linear(f"{at}.self_attn.{name}_proj", rows, hidden)
                    if model.qkv_bias:
                        yield f"{at}.self_attn.{name}_proj.bias", (rows,), 0.5
            yield linear(f"{at}.self_attn.o_proj", hidden, heads * size)
        if kind in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2"):
            whole = kind == "olmo2"  # over all heads at once
            yield f"{at}.self_attn.q_norm.weight", (heads * size if whole else size,), 0.0
            yield f"{at}.self_attn.k_norm.weight", (pairs * size if whole else size,), 0.0
        experts = given.get("num_experts") or given.get("n_routed_experts") or 0
        if experts and layer >= given.get("first_k_dense_replace", 0):
            small = given["moe_intermediate_size"]
            yield linear(f"{at}.mlp.gate", experts, hidden)
            for expert in range(experts):
                yield from mlp(f"{at}.mlp.experts.{expert}", small)
            if shared := given.get("n_shared_experts", 0):
                yield from mlp(f"{at}.mlp.shared_experts", shared * small)
        else:
            yield from mlp(f"{at}.mlp", inner)
        norms = ["post_attention_layernorm"]
        norms += ["input_layernorm"] if kind != "olmo2" else []
        norms += ["post_feedforward_layernorm"] if gemma or kind == "olmo2" else []
        norms += ["pre_feedforward_layernorm"] if gemma else []
        for name in norms:
            yield f"{at}.{name}.weight", (hidden,), 0.0
    yield "model.norm.weight", (hidden,), 0.0
    if not model.tied:
        yield "lm_head.weight", (VOCAB, hidden), peak


def weights(name: str, seed: int = 0) -> dict[str, Any]:
    """Parameter name -> torch bfloat16 tensor, from numpy's PCG64 stream of the seed."""
    import torch

    model = MODELS[name]
    added = 1.0 if model.profile.startswith("gemma") else 0.0  # Gemma's norms multiply with 1 + weight
    random = np.random.Generator(np.random.PCG64(seed))
    made = {}
    for key, shape, deviation in parameters(model):
        noise = random.standard_normal(shape)
        if not deviation:
            gain = model.gain if key == "model.norm.weight" else 1.0
            noise, deviation = gain * (1 + 0.1 * noise) - added, 1.0
        made[key] = torch.from_numpy(noise * deviation).to(torch.bfloat16)
    return made


def make(folder: Path, name: str, seed: int = 0) -> Path:
    """Write the model's folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(name, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(MODELS[name]), indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, "pad_token_id": PAD}) + "\n")
    runpy.run_path(str(ROOT / "examples" / "v0_parity" / "make_model.py"))["tokenizer"](folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    given = parser.parse_args()
    for wanted in given.models or MODELS:
        print(make(given.folder / wanted, wanted))
