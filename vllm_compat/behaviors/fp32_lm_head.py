"""
Logits accumulated and returned in float32.

Hidden states and lm_head stay in the model's dtype; products are summed in float32 and the sums are not rounded
back. A bfloat16 head is the largest numeric source of rollout/trainer mismatch that teams have measured (MiniMax-M1,
arXiv 2506.13585: correlation 0.987 -> 0.997; ScaleRL, arXiv 2510.13786: asymptote 0.52 -> 0.61). V0 had a bfloat16
head as well: this trait goes beyond V0, to the values that V0 computes in float32. Give the trainer the same head.

Modes: ``accumulate`` (the default) keeps no float32 weight anywhere; ``weights`` keeps the head's weight, and an embedding
tied to it, in float32, for a trainer that has float32 master weights of the head and sends them; ``model`` is off.

The head is what a model hands to its LogitsProcessor, by object and not by name. From 0.26.0 vLLM's own
``hf_overrides={"head_dtype": "float32"}`` says so, and `apply_head` does the product, since vLLM's own widens the whole
weight at every step where there is no CUDA; before, the option was accepted and ignored, and `float32_product` does both.
The arithmetic is `vllm_compat.head`; it reads the live weight, so nothing can go stale. A quantized head, and a model that
goes around the LogitsProcessor, are refused by name: ``model``, on both sides, is the way out.

The logits are contiguous: vLLM 0.17.0 to 0.21.0 have a top-k/top-p kernel that misreads a float32 slice of a padded
vocabulary (bfloat16 logits were copied on their way).

Upstream: https://github.com/vllm-project/vllm/pull/48390. Delete when: never, it is an option of vLLM.
"""

from __future__ import annotations

import inspect
from typing import Any

from vllm_compat import head as arithmetic
from vllm_compat.patching.model import UNSET, Behavior, Check, CheckFailed, Native, Patch, Role, Target

_PLAIN = ("UnquantizedEmbeddingMethod", "UnquantizedLinearMethod")
_PROBE_ROWS, _PROBE_COLUMNS = 4, 1024
# Of the largest logit. Float32 sums are good to about 1e-6; TF32 or float16 sums, a bfloat16 head, or a stale weight are not.
_EXACT = 2e-5
_WITHOUT_LORA = "turn LoRA off, or keep the model's own head on both sides (VLLM_COMPAT_FP32_LM_HEAD=model)"
_PROCESSOR = "vllm.model_executor.layers.logits_processor:LogitsProcessor"


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


# --- the product ------------------------------------------------------------------------------------------------------


def _plain(layer: Any) -> bool:
    """Whether the layer's product is its weight's. On the CPU, vLLM packs the weight of some away and leaves none."""
    return type(getattr(layer, "quant_method", None)).__name__ in _PLAIN and layer.weight.numel() > 0


def _batch_invariant() -> bool:
    from vllm import envs

    return bool(getattr(envs, "VLLM_BATCH_INVARIANT", False))


def _linear(layer: Any, hidden: Any, bias: Any) -> Any:
    return arithmetic.linear(hidden, layer.weight, bias, batch_invariant=_batch_invariant())


class _Float32Layer:
    """A plain lm_head as a LogitsProcessor up to 0.25.1 sees it: the same layer, whose product is float32."""

    def __init__(self, layer: Any) -> None:
        self._layer, self.quant_method = layer, self

    def __getattr__(self, name: str) -> Any:
        if name == "base_layer":  # LoRA's own wrapping of the layer: it was taken off
            raise AttributeError(name)
        return getattr(self._layer, name)

    def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
        return _linear(self._layer, x, bias)


def _unwrapped(layer: Any) -> Any:
    """The layer itself where LoRA wrapped it."""
    return getattr(layer, "base_layer", layer)


def _build_product(original: Any, module: Any) -> Any:
    def forward(self: Any, lm_head: Any, *args: Any, **kwargs: Any) -> Any:
        layer = _unwrapped(lm_head)
        logits = original(self, _Float32Layer(layer) if _plain(layer) else lm_head, *args, **kwargs)
        return None if logits is None else logits.contiguous()

    return forward


def _build_apply_head(original: Any, module: Any) -> Any:
    def _apply_head(self: Any, lm_head: Any, hidden_states: Any, embedding_bias: Any = None) -> Any:
        if _plain(lm_head):
            return _linear(lm_head, hidden_states, embedding_bias)
        # vLLM would stop here, in the first forward pass, with an error that does not say which head. Let the engine come
        # up with the model's own head: the check below names it, and strict refuses.
        return lm_head.quant_method.apply(lm_head, hidden_states, bias=embedding_bias)

    return _apply_head


def _build_contiguous(original: Any, module: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        logits = original(self, *args, **kwargs)
        return None if logits is None else logits.contiguous()

    return forward


def _build_adapter_rows(original: Any, module: Any) -> Any:
    def bgmv_shrink(
        inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # Slot -1 is a row without an adapter; as an index it is the last slot. What is 0 here stays 0 in what follows.
        without = (lora_indices_tensor < 0).unsqueeze(-1)
        return original(inputs.masked_fill(without, 0), lora_b_weights, output_tensor, lora_indices_tensor, *args, **kwargs)

    return bgmv_shrink


# --- the weight in float32 ----------------------------------------------------------------------------------------------


def _build_load(original: Any, module: Any) -> Any:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        found = _head(self) if _generates(self) else None
        if found and _plain(found[1]):
            _widen(self.model_runner.get_model(), found[1].weight)
        return result

    return load_model


def _widen(model: Any, weight: Any) -> None:
    """Make the head's parameter float32 where it is, so that every loader of vLLM or of a trainer writes float32 into it."""
    dtype, weight.data = weight.dtype, weight.data.float()
    layers = [module for module in model.modules() if vars(module).get("_parameters", {}).get("weight") is weight]
    for layer in layers:
        layer.vllm_compat_dtype = dtype  # what an embedding that is tied to it returns
    try:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.reload.meta import capture_layer_to_meta
    except ImportError:  # up to 0.16.0: nothing remembers the parameter's dtype
        return
    for layer in layers:
        get_layerwise_info(layer).restore_metadata = capture_layer_to_meta(layer)


def _build_embedding(original: Any, module: Any) -> Any:
    def embedding(self: Any, layer: Any, input_: Any) -> Any:
        found = original(self, layer, input_)
        dtype = getattr(layer, "vllm_compat_dtype", None)
        return found if dtype is None else found.to(dtype)

    return embedding


# --- the self-test ------------------------------------------------------------------------------------------------------


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
        processor, layer = found.args
        return None if layer is None else (processor, _unwrapped(layer))  # None: it is handed logits
    finally:
        for handle in handles:
            handle.remove()
    return None


def _logits_processors(model: Any) -> list[Any]:
    """Also LoRA's, which take the place of vLLM's own and call them by function, not as modules."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    return [
        module
        for module in model.modules()
        if isinstance(module, LogitsProcessor) or isinstance(vars(module).get("_modules", {}).get("base_layer"), LogitsProcessor)
    ]


def _generates(worker: Any) -> bool:
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank and worker.model_config.runner_type == "generate")


class _Probe:
    """One pass of random rows through ``compute_logits``, with everything the LogitsProcessor saw and made of it."""

    def __init__(self, worker: Any, processor: Any) -> None:
        import torch

        self.seen: dict[str, Any] = {}
        model, dtype, device = worker.model_runner.get_model(), worker.model_config.dtype, worker.model_runner.device
        hidden = torch.randn(_PROBE_ROWS, worker.model_config.get_hidden_size(), generator=torch.Generator().manual_seed(0))
        gathers = getattr(processor, "base_layer", processor)
        gather, adapter = gathers._gather_logits, getattr(processor, "punica_wrapper", None)
        handle = processor.register_forward_hook(self._keep, with_kwargs=True)

        def kept_gather(local: Any) -> Any:
            gathered = gather(local)
            self.seen.update(local=local.clone(), gathered=None if gathered is None else gathered.clone())
            return gathered

        gathers._gather_logits = kept_gather
        if adapter is not None:  # which adapter the last batch had is no business of the head's
            adapter.add_lora_logits = lambda logits, *args, **kwargs: logits
        try:
            with torch.inference_mode():
                self.returned = _compute_logits(model, hidden.to(device, dtype))
        finally:
            handle.remove()
            del gathers._gather_logits
            if adapter is not None:
                del adapter.add_lora_logits

    def _keep(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        forward = type(getattr(module, "base_layer", module)).forward  # LoRA's takes anything and calls this
        named = dict(zip(list(inspect.signature(forward).parameters)[1:], args)) | kwargs
        hidden = args[1] if len(args) > 1 else kwargs["hidden_states"]
        self.seen.update(hidden=hidden, logits=output, bias=named.get("embedding_bias"))

    def ranks(self) -> str:
        """What the tensor-parallel ranks say of the gather. Each sends a checksum of the logits it computed, and who has the
        gathered ones compares theirs: collective, so nothing may be raised in front of it."""
        import torch
        from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

        size = get_tensor_model_parallel_world_size()
        if size == 1:
            return ""
        local, gathered = self.seen["local"], self.seen["gathered"]
        sent = tensor_model_parallel_all_gather(_checksum(local)).flatten()
        if gathered is None:
            return f"; its part sent to be gathered over {size} ranks"
        if gathered.dtype != torch.float32 or local.dtype != torch.float32:
            raise CheckFailed(f"the logits are gathered as {local.dtype}, not torch.float32")
        for rank, part in enumerate(gathered.chunk(size, dim=-1)):
            if not torch.equal(_checksum(part).flatten(), sent[rank : rank + 1]):
                raise CheckFailed(f"the gathered logits of rank {rank} are not those that it computed")
        return f"; gathered in float32 from {size} ranks, with the checksums that they sent"


def _checksum(logits: Any) -> Any:
    """[1, 1] float32: the sum of the values' bits, modulo 2**24."""
    import torch

    bits = logits.contiguous().view(torch.int16).long() & 0xFFFF
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return ((bits.flatten() * places).sum() % 2**24).float().reshape(1, 1)


def _worker(worker: Any) -> str:
    import torch

    if not _generates(worker):
        return "this process has no head"
    found = _head(worker)
    if found is None:
        raise CheckFailed(
            "the model computes its logits without a LogitsProcessor, where the head cannot be seen: "
            "VLLM_COMPAT_FP32_LM_HEAD=model, and the model's own head in the trainer too"
        )
    processor, head = found
    method = type(getattr(head, "quant_method", None)).__name__
    if not _plain(head):
        what = f"quantized ({method}) and stays so" if method not in _PLAIN else "packed away by vLLM, which leaves no weight"
        raise CheckFailed(
            f"the lm_head ({type(head).__name__}) is {what}: exclude lm_head from the quantization, or "
            f"VLLM_COMPAT_FP32_LM_HEAD=model, and the same head in the trainer"
        )
    dtype, weight, probe = worker.model_config.dtype, head.weight, _Probe(worker, processor)
    ranks, seen = probe.ranks(), probe.seen
    if probe.returned is None:
        return "the logits are gathered on another rank" + ranks
    for name, logits in (("LogitsProcessor", seen["logits"]), ("compute_logits", probe.returned)):
        if logits.dtype != torch.float32:
            raise CheckFailed(f"{name} returns {logits.dtype}, not torch.float32")
        if not logits.is_contiguous():
            raise CheckFailed(f"{name} returns logits that are not contiguous")
    # This rank's own columns of the gathered logits, against the live weight in float64.
    shard = head.shard_indices
    stop = min(shard.org_vocab_end_index, processor.org_vocab_size)
    columns = torch.linspace(shard.org_vocab_start_index, stop - 1, _PROBE_COLUMNS, dtype=torch.float64).long().unique()
    rows = (columns - shard.org_vocab_start_index).to(weight.device)
    expected = seen["hidden"].double() @ weight[rows].double().t()
    if seen["bias"] is not None:
        expected = expected + seen["bias"][rows].double()
    if processor.soft_cap is not None:
        expected = torch.tanh(expected / processor.soft_cap) * processor.soft_cap
    expected = expected * processor.scale
    logits = seen["logits"][:, columns.to(seen["logits"].device)]
    worst, size = float((logits.double() - expected).abs().max()), float(expected.abs().max())
    if not worst <= _EXACT * max(size, 1e-3):
        raise CheckFailed(f"logits differ from the float32 product with the live weight by {worst:.2g} of {size:.2g}")
    if dtype != torch.float32 and float((logits == logits.to(dtype).float()).double().mean()) > 0.5:
        raise CheckFailed(f"the logits were rounded to {dtype} and cast back")
    how, _ = arithmetic.way(seen["hidden"], weight, _batch_invariant())
    return (
        f"float32 logits, within {worst / max(size, 1e-30):.1g} of the live {weight.dtype} weight's product, by {how}; "
        f"{_memory(weight, dtype)}{ranks}{_adapters(worker, hidden=seen['hidden'])}"
    )


def _adapters(worker: Any, hidden: Any) -> str:
    """What LoRA's own kernels do to float32 logits: rows with an adapter get its product, rows without one nothing.

    The adapter is random and in no slot of the model. Kernels for GPUs round the small product to the adapter's dtype, as a
    trainer with adapters in that dtype does; the sum with the logits is float32's.
    """
    import torch

    if worker.lora_config is None:
        return ""
    try:
        from vllm.lora.layers import LoRAMapping
    except ImportError as error:
        raise CheckFailed(f"LoRA's kernels are not where they were ({error}): {_WITHOUT_LORA}") from None
    model, config = worker.model_runner.get_model(), worker.lora_config
    wrapper = next((found for module in model.modules() if (found := vars(module).get("punica_wrapper")) is not None), None)
    if wrapper is None or "extra_vocab_size" in inspect.signature(wrapper.update_metadata).parameters:
        raise CheckFailed(f"LoRA on this vLLM was not proven: {_WITHOUT_LORA}")
    random, rank, columns = torch.Generator().manual_seed(1), config.max_lora_rank, 64
    shape = ((config.max_loras, 1, rank, hidden.shape[1]), (config.max_loras, 1, columns, rank))
    down, up = ((torch.randn(size, generator=random) * size[-1] ** -0.5).to(hidden.device, config.lora_dtype) for size in shape)
    slots = tuple(row % 2 for row in range(len(hidden)))  # adapter 1, in the last slot, for every other row
    wrapper.update_metadata(
        LoRAMapping(slots, slots, is_prefill=True), [None] * (config.max_loras - 1) + [1], config.max_loras, columns
    )
    logits = torch.zeros(len(hidden), columns, device=hidden.device)
    with torch.inference_mode():
        wrapper.add_lora_logits(logits, hidden, down, up, 1.0)
    expected = hidden.double() @ down[-1, 0].double().t() @ up[-1, 0].double().t()
    expected[::2] = 0
    worst, size = float((logits.double() - expected).abs().max()), float(expected.abs().max())
    if float(logits[::2].abs().max()) > 0:
        raise CheckFailed(f"LoRA's kernels give rows without an adapter the one in the last slot: {_WITHOUT_LORA}")
    if not worst <= 2.0**-7 * size:
        raise CheckFailed(f"LoRA's part of the logits differs from its product by {worst:.2g} of {size:.2g}: {_WITHOUT_LORA}")
    return f"; LoRA's part within {worst / size:.1g}, rows without an adapter untouched"


def _memory(weight: Any, dtype: Any) -> str:
    """What the head's mode costs on this rank."""
    import torch

    held, wide = (weight.numel() * size / 2**20 for size in (weight.element_size(), 4))
    if weight.dtype == dtype:
        more = "" if dtype == torch.float32 else f", and no float32 copy of {wide:.0f} MiB"
        return f"weight of {held:.0f} MiB{more}"
    return f"weight of {held:.0f} MiB, {held - weight.numel() * dtype.itemsize / 2**20:.0f} MiB more than in {dtype}"


def _weights(worker: Any) -> str:
    import torch

    found = _head(worker) if _generates(worker) else None
    if found is None:
        return "this process has no head"
    if found[1].weight.dtype != torch.float32:
        raise CheckFailed(f"the lm_head's weight is {found[1].weight.dtype}: mode weights needs V1 and a plain head")
    return "the lm_head's weight is kept in float32"


BEHAVIOR = Behavior(
    name="fp32_lm_head",
    v0="logits in the model's dtype; restored are the float32 values behind them",
    v1="logits rounded to the model's dtype (bfloat16: 8 bits)",
    cost="every logit is rounded to the model's dtype (bfloat16: by up to 0.2 % of its value)",
    modes=("accumulate", "weights"),
    off="model",
    routes=(
        Patch(
            name="float32_product",
            versions=">=0.8.5,<0.26.0",
            runners=("v0", "v1", "v2"),
            role=Role.WORKER,
            target=Target(path=f"{_PROCESSOR}.forward", params=("lm_head", "hidden_states")),
            build=_build_product,
            upstream="https://github.com/vllm-project/vllm/pull/48390 is in 0.26.0",
            remove_when="the floor is vLLM 0.26.0",
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
            name="apply_head",
            versions=">=0.26.0",
            runners=("v1", "v2"),
            role=Role.WORKER,
            target=Target(path=f"{_PROCESSOR}._apply_head", params=("lm_head", "hidden_states", "embedding_bias")),
            build=_build_apply_head,
            upstream="it widens the whole weight at every step without CUDA, and raises at a quantized head without a name",
            remove_when="vLLM widens no weight on the CPU, keeps float32 weights apart, and names the head it refuses",
        ),
        Patch(
            name="contiguous_logits",
            versions=">=0.26.0",
            runners=("v1", "v2"),
            role=Role.WORKER,
            target=Target(path=f"{_PROCESSOR}.forward", params=("lm_head", "hidden_states")),
            build=_build_contiguous,
            upstream="a padded vocabulary is cut off as a view",
            remove_when="vLLM's logits are contiguous",
        ),
        Patch(
            name="adapter_rows",
            versions=">=0.12.0,<0.33.0",
            runners=("v1", "v2"),
            role=Role.WORKER,
            target=Target(
                path="vllm.lora.ops.torch_ops.lora_ops:bgmv_shrink",
                params=("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor"),
            ),
            build=_build_adapter_rows,
            lazy=True,
            upstream="on a CPU a request without an adapter beside one that has one gets the adapter of the last slot",
            remove_when="the floor is vLLM 0.33.0, which leaves such rows alone",
        ),
        Patch(
            name="float32_weight",
            versions=">=0.8.5",
            runners=("v1", "v2"),
            modes=("weights",),
            role=Role.WORKER,
            target=Target(path="vllm.v1.worker.gpu_worker:Worker.load_model"),
            build=_build_load,
            upstream="vLLM has one dtype for all parameters",
            remove_when="vLLM takes a dtype for the head's parameter",
        ),
        Patch(
            name="tied_embedding",
            versions=">=0.8.5",
            runners=("v1", "v2"),
            modes=("weights",),
            role=Role.WORKER,
            target=Target(
                path="vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod.embedding",
                params=("layer", "input_"),
                traced=True,
            ),
            build=_build_embedding,
            upstream="vLLM has one dtype for all parameters",
            remove_when="vLLM takes a dtype for the head's parameter",
        ),
    ),
    checks=(
        Check(name="head", role=Role.WORKER, run=_worker, of_weights=True),
        Check(name="float32_weight", role=Role.WORKER, run=_weights, modes=("weights",), of_weights=True),
    ),
)
