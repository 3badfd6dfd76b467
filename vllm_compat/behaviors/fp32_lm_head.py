"""
Logits accumulated and returned in float32.

Hidden states and lm_head stay in the model's dtype; products are summed in float32 and the sums are not rounded
back. A bfloat16 head is the largest numeric source of rollout/trainer mismatch that teams have measured (MiniMax-M1,
arXiv 2506.13585: correlation 0.987 -> 0.997; ScaleRL, arXiv 2510.13786: asymptote 0.52 -> 0.61). V0 had a bfloat16
head as well: this trait goes beyond V0, to the values that V0 computes in float32. Give the trainer the same head.

From 0.26.0 vLLM's own ``hf_overrides={"head_dtype": "float32"}`` does it, tied heads included; before, it was accepted and
ignored, and `apply` replaces the product of every unquantized head: whatever layer a model hands to its
LogitsProcessor, by object and not by name. No float32 copy of the weight is kept, so none can go stale. A quantized head
cannot: it is refused by name.

vLLM 0.17.0 to 0.21.0 have a top-k/top-p kernel that misreads a float32 slice of a padded vocabulary (bfloat16 logits were
copied on their way): `contiguous_logits` hands on a copy there.

Upstream: https://github.com/vllm-project/vllm/pull/48390. Delete when: never, it is an option of vLLM.
"""

from __future__ import annotations

import inspect
from typing import Any

from vllm_compat.patching.model import UNSET, Behavior, Check, CheckFailed, Native, Patch, Role, Target

_PLAIN = ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")
_PROBE_ROWS, _PROBE_COLUMNS = 4, 1024
_APPLY = Target(
    path="vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.apply", params=("layer", "x", "bias")
)


class MergedOverrides:
    """A user's ``hf_overrides`` function, then ``head_dtype``. A class, so that it pickles if the function does."""

    def __init__(self, first: Any) -> None:
        self.first = first

    def __call__(self, config: Any) -> Any:
        """Change and return a transformers config, as vLLM wants of ``hf_overrides``."""
        config = self.first(config)
        if getattr(config, "head_dtype", None) is None:
            config.head_dtype = "float32"
        return config


def _read(args: Any) -> Any:
    overrides = args.hf_overrides
    return overrides.get("head_dtype", UNSET) if isinstance(overrides, dict) else UNSET


def _write(args: Any) -> None:
    overrides = args.hf_overrides
    args.hf_overrides = MergedOverrides(overrides) if callable(overrides) else {**(overrides or {}), "head_dtype": "float32"}


def _accepts(value: Any) -> bool:
    """Whether a head_dtype (a name or a torch.dtype) is float32."""
    return str(value).removeprefix("torch.").lower() in ("float32", "float")


def _build_apply(original: Any, module: Any) -> Any:
    def apply(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        import torch

        weight = layer.weight
        if x.dtype == torch.float32 and weight.dtype == torch.float32:
            return original(self, layer, x, bias)
        flat = x.reshape(-1, x.shape[-1])
        # bfloat16 in, float32 sums out, without a float32 copy of the weight: torch 2.8 on, on CUDA only.
        if x.is_cuda and x.dtype == weight.dtype and "dtype" in torch.ops.aten.mm.overloads():
            logits = torch.mm(flat, weight.t(), out_dtype=torch.float32)
        else:
            tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
            try:
                logits = flat.float() @ weight.float().t()
            finally:
                torch.backends.cuda.matmul.allow_tf32 = tf32
        if bias is not None:
            logits = logits + bias.float()
        return logits.reshape(*x.shape[:-1], logits.shape[-1])

    return apply


def _build_contiguous(original: Any, module: Any) -> Any:
    def _get_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits = original(self, *args, **kwargs)
        return None if logits is None else logits.contiguous()

    return _get_logits


def _compute_logits(model: Any, hidden: Any) -> Any:
    """The model's logits. Up to 0.10.2 a second argument says which rows to keep; None keeps all."""
    takes = inspect.signature(model.compute_logits).parameters
    return model.compute_logits(hidden, None) if "sampling_metadata" in takes else model.compute_logits(hidden)


class _Seen(Exception):
    """Carries what a model hands to its LogitsProcessor out of ``compute_logits``."""


def _head(worker: Any) -> tuple[Any, Any] | None:
    """The (LogitsProcessor, lm_head) the model really uses, by object and not by name; None if it uses none."""
    import torch

    def seen(module: Any, args: Any, kwargs: Any) -> None:
        raise _Seen(module, args[0] if args else kwargs["lm_head"])

    model = worker.model_runner.get_model()
    handles = [module.register_forward_pre_hook(seen, with_kwargs=True) for module in _logits_processors(model)]
    hidden = torch.zeros(
        1, worker.model_config.get_hidden_size(), dtype=worker.model_config.dtype, device=worker.model_runner.device
    )
    try:
        with torch.inference_mode():
            _compute_logits(model, hidden)
    except _Seen as found:
        return found.args[0], found.args[1]
    finally:
        for handle in handles:
            handle.remove()
    return None


def _logits_processors(model: Any) -> list[Any]:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [module for module in model.modules() if isinstance(module, LogitsProcessor)]


def _generates(worker: Any) -> bool:
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank and worker.model_config.runner_type == "generate")


def _build_load(original: Any, module: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if _generates(self) and self.lora_config is None:
            found = _head(self)
            if found and type(found[1].quant_method).__name__ not in _PLAIN:
                # vLLM would stop in the first forward pass with an error that does not say which head. Let the engine
                # come up with the model's own head: the check below names it, and strict refuses.
                found[0].head_dtype = None
        return result

    return load_model


def _worker(worker: Any) -> str:
    import torch

    if not _generates(worker):
        return "this process has no head"
    if worker.lora_config is not None:
        raise CheckFailed(
            "LoRA wraps the head, and that was not proven: turn LoRA off, or keep the model's own head on both sides"
        )
    found = _head(worker)
    if found is None:
        raise CheckFailed("the model computes its logits without a LogitsProcessor, where the head cannot be seen")
    processor, head = found
    method = type(head.quant_method).__name__
    if method not in _PLAIN:
        raise CheckFailed(f"the lm_head is quantized ({method}) and stays so: exclude lm_head from the quantization")
    model, dtype, device = worker.model_runner.get_model(), worker.model_config.dtype, worker.model_runner.device
    hidden = torch.randn(_PROBE_ROWS, worker.model_config.get_hidden_size(), generator=torch.Generator().manual_seed(0))
    seen: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(hidden=args[1] if len(args) > 1 else kwargs["hidden_states"], logits=output)
        named = dict(zip(list(inspect.signature(module.forward).parameters), args)) | kwargs
        seen["bias"] = named.get("embedding_bias")

    handle = processor.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            returned = _compute_logits(model, hidden.to(device, dtype))
    finally:
        handle.remove()
    if returned is None:
        return "the logits are gathered on another rank"
    for name, logits in (("LogitsProcessor", seen["logits"]), ("compute_logits", returned)):
        if logits.dtype != torch.float32:
            raise CheckFailed(f"{name} returns {logits.dtype}, not torch.float32")
    # This rank's own columns of the gathered logits, against the live weight in float64.
    shard = head.shard_indices
    stop = min(shard.org_vocab_end_index, processor.org_vocab_size)
    columns = torch.linspace(shard.org_vocab_start_index, stop - 1, _PROBE_COLUMNS, dtype=torch.float64).long().unique()
    rows = (columns - shard.org_vocab_start_index).to(head.weight.device)
    expected = seen["hidden"].double() @ head.weight[rows].double().t()
    if seen["bias"] is not None:
        expected = expected + seen["bias"][rows].double()
    if processor.soft_cap is not None:
        expected = torch.tanh(expected / processor.soft_cap) * processor.soft_cap
    expected = expected * processor.scale
    logits = seen["logits"][:, columns.to(seen["logits"].device)]
    worst, size = float((logits.double() - expected).abs().max()), float(expected.abs().max())
    # Sums of float32 products are good to about 1e-6; a bfloat16 head, or one with stale weights, is not.
    if not worst <= 2e-4 * max(size, 1e-3):
        raise CheckFailed(f"logits differ from the float32 product with the live weight by {worst:.2g} of {size:.2g}")
    if dtype != torch.float32 and float((logits == logits.to(dtype).float()).double().mean()) > 0.5:
        raise CheckFailed(f"the logits were rounded to {dtype} and cast back")
    return f"float32 logits, within {worst / max(size, 1e-30):.1g} of the live {dtype} weight's product"


BEHAVIOR = Behavior(
    name="fp32_lm_head",
    v0="logits in the model's dtype; restored are the float32 values behind them",
    v1="logits rounded to the model's dtype (bfloat16: 8 bits)",
    cost="every logit is rounded to the model's dtype (bfloat16: by up to 0.2 % of its value)",
    routes=(
        Patch(
            name="float32_product",
            versions=">=0.8.5,<0.26.0",
            runners=("v0", "v1", "v2"),
            role=Role.WORKER,
            target=_APPLY,
            build=_build_apply,
            upstream="https://github.com/vllm-project/vllm/pull/48390 is in 0.26.0",
            remove_when="the floor is vLLM 0.26.0",
        ),
        Patch(
            name="contiguous_logits",
            versions=">=0.17.0,<0.22.0",
            runners=("v1", "v2"),
            role=Role.WORKER,
            target=Target(path="vllm.model_executor.layers.logits_processor:LogitsProcessor._get_logits"),
            build=_build_contiguous,
            upstream="vllm/v1/sample/ops/topk_topp_triton.py indexes rows by the vocabulary's size; mended in 0.22.0",
            remove_when="the floor is vLLM 0.22.0",
        ),
        Native(
            versions=">=0.26.0",
            runners=("v1", "v2"),
            option="hf_overrides.head_dtype",
            value="hf_overrides={'head_dtype': 'float32'}",
            read=_read,
            write=_write,
            accepts=_accepts,
            made=lambda config: config.model_config.head_dtype,  # a user's hf_overrides function may have the last word
        ),
        Patch(
            name="quantized_head",
            versions=">=0.26.0",
            runners=("v1", "v2"),
            role=Role.WORKER,
            target=Target(path="vllm.v1.worker.gpu_worker:Worker.load_model"),
            build=_build_load,
            upstream="vllm/model_executor/layers/logits_processor.py raises in the first forward pass, without a name",
            remove_when="vLLM names the quantized head before it allocates the KV cache",
        ),
    ),
    checks=(Check(name="head", role=Role.WORKER, run=_worker),),
    relies_on=(
        Target(
            path="vllm.model_executor.layers.logits_processor:LogitsProcessor._apply_head",
            params=("lm_head", "hidden_states", "embedding_bias"),
            versions=">=0.26.0",
        ),
    ),
)
