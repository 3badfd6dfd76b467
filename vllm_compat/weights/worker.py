"""
What a worker does in a weight update: take the new weights in beside the model, check them, put them in, or put the old back.

The engine core calls `handle` by name over RPC; an error is an answer, so that every rank's is heard. Nothing of the model
changes before `commit`. Weights go in by vLLM's own loaders: ``model.load_weights`` where parameters are what the kernels
read, and its layerwise ``reload_weights`` (0.16.0 on) where something else was made of them at load (a CPU's linear layers, from
0.10.2, quantized ones and fused experts are packed; MLA keeps products of its projections), which makes it again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights import manifest, transports

_UPSTREAM_ROUTE = (
    "vLLM before 0.16.0 cannot put weights under layers that it made something else of (a CPU's linear layers, quantized ones, "
    "fused experts, MLA)"
)
_PROBES = 16  # rows of a packed layer's fixed input
loads = 0  # how often the loader of a model that is watched was called in this process


class _State:
    """What a worker knows between calls."""

    def __init__(self, worker: Any) -> None:
        # Both of the model as it started: a reload that stopped half-way leaves layers that look unpacked, and vLLM's
        # reload_weights(weights_path=...) writes its path over the model's.
        self.reloads = _needs_reload(worker)
        self.folder = manifest.folder(worker)
        self.incoming: Any = None  # staged, and where it can be read again
        self.held: dict[str, Any] | None = None  # staged, where it came once: tensors on the CPU
        self.snapshot: dict[str, Any] | None = None  # the old weights, on the CPU, between commit and finish
        self.last: tuple[Any, dict[str, Any] | None] | None = None  # what the model's weights were staged from; if `reloads`
        # no weights but those of the checkpoint, or of a staged update, are in the model
        self.own = worker.vllm_config.load_config.load_format != "dummy"
        self.baseline: dict[str, str] = {}  # fingerprint at the last finished state

    def drop(self, ok: bool = False) -> None:
        """Forget what is staged."""
        if self.incoming is not None:
            self.incoming.close(ok)
        self.incoming, self.held, self.snapshot = None, None, None


def handle(worker: Any, command: str, argument: str) -> str:
    """One command, as JSON; what goes wrong is returned as ``{"error": ...}``."""
    try:
        return json.dumps(_COMMANDS[command](worker, **json.loads(argument)))
    except WeightUpdateError as error:
        return json.dumps({"error": str(error)})
    except Exception as error:
        return json.dumps({"error": f"{type(error).__name__}: {str(error)[:500]}"})


def _state(worker: Any) -> _State:
    if "_vllm_compat_update" not in vars(worker):
        worker._vllm_compat_update = _State(worker)
    found: _State = worker._vllm_compat_update
    return found


def _model(worker: Any) -> Any:
    return worker.model_runner.get_model() if hasattr(worker.model_runner, "get_model") else worker.model_runner.model


# --- fingerprints -------------------------------------------------------------------------------------------------------


def fingerprint(worker: Any) -> dict[str, str]:
    """Parameter or buffer -> checksum of its bytes: two sums over its 64-bit words, modulo 2^64.

    A change that keeps the sum of all words and that of every other word is not seen. A layer whose weight vLLM packed away has
    no bytes to read: what it answers to a fixed input stands for it, and a change below that answer's rounding is not seen.
    """
    model, seen, found = _model(worker), set[tuple[int, tuple[int, ...]]](), {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        key = (value.data_ptr(), tuple(value.shape))
        if value.numel() and key not in seen:
            seen.add(key)
            found[name] = _checksum(value)
    for name, module in model.named_modules():
        if _packed(module):
            width = getattr(module, "input_size_per_partition", None) or module.input_size
            found[f"{name}.weight"] = _checksum(module.cpu_linear(_probe(width, module.params_dtype), module.weight, None))
    return found


@functools.cache
def _probe(width: int, dtype: Any) -> Any:
    """Rows that ask for a linear layer's inputs block by block: the fewer an output sums, the less its rounding hides."""
    import torch

    at = torch.arange(width)
    values = at * 2654435761 % 2039 / 1019.5 - 1
    return torch.where(at * _PROBES // width == torch.arange(_PROBES)[:, None], values, 0.0).to(dtype)


def _packed(module: Any) -> bool:
    return hasattr(module, "cpu_linear") and getattr(module, "weight", None) is not None and not module.weight.numel()


def _checksum(value: Any) -> str:
    import torch

    data = value.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # only what is aligned can be seen as words
    whole = data.numel() // 8 * 8
    # 64 bits are summed as they are: what is widened on the way takes 20 times as long.
    words, rest = data[:whole].view(torch.int64), data[whole:]
    sums = torch.stack((words.sum(), words[::2].sum(), rest.sum(dtype=torch.int64)))
    return " ".join(map(str, sums.tolist()))  # one wait for the device


def _changed(worker: Any) -> list[str]:
    return _other(fingerprint(worker), _state(worker).baseline)


def _other(now: dict[str, str], before: dict[str, str]) -> list[str]:
    return sorted(name for name in {*now, *before} if now.get(name) != before.get(name))


def _replicated(worker: Any, found: dict[str, str]) -> dict[str, str]:
    """Of a fingerprint, what every tensor-parallel rank holds alike: parameters that have no loader of their own (norms)."""
    if worker.parallel_config.tensor_parallel_size == 1:
        return {}
    alike = [name for name, value in _model(worker).named_parameters() if value.numel() and not hasattr(value, "weight_loader")]
    return {name: found[name] for name in alike if name in found}


# --- commands -----------------------------------------------------------------------------------------------------------


def _baseline(worker: Any, anew: bool = False) -> dict[str, Any]:
    state = _state(worker)
    if state.reloads and _has_reload(worker):
        _forget_half_done(worker)
    if anew or not state.baseline:
        state.baseline = fingerprint(worker)
    return {}


def _watch(worker: Any) -> dict[str, Any]:
    """Know the weights an engine starts with, and count the calls of its model's loader: the caller's own code may reach it."""
    _baseline(worker)
    model = _model(worker)
    load = model.load_weights

    @functools.wraps(load)
    def load_weights(*args: Any, **kwargs: Any) -> Any:
        global loads
        loads += 1
        return load(*args, **kwargs)

    model.load_weights = load_weights
    return {}


def _stage(worker: Any, source: dict[str, Any], timeout: float, finite: bool, partial: bool) -> dict[str, Any]:
    state = _state(worker)
    state.drop()
    wanted = manifest.expected(worker, state.folder)
    if state.reloads and not _has_reload(worker):
        raise WeightUpdateError(f"{_UPSTREAM_ROUTE}: use a newer one, or layers that are not packed")
    if state.reloads and partial:
        raise WeightUpdateError("this engine packs its layers, which are loaded whole: send all tensors")
    incoming = transports.open_source(source, worker.model_runner.device, timeout)
    try:
        manifest.check(wanted, incoming.manifest, manifest.tied(worker), partial)
        held: dict[str, Any] | None = None if incoming.rereadable else {}
        total, seen = 0, set()
        for name, tensor in incoming.tensors():
            manifest.same(name, tensor, incoming.manifest, finite)
            if name in seen:
                raise WeightUpdateError(f"{name} arrived twice")
            seen.add(name)
            total ^= _mixed(name, _checksum(tensor))
            if held is not None:
                held[name] = tensor.to("cpu", copy=True)
        lost = sorted(set(incoming.manifest) - seen)
        if lost:
            raise WeightUpdateError(f"{lost[0]} did not arrive ({len(lost)} of {len(incoming.manifest)} tensors)")
    except BaseException:
        incoming.close(False)
        raise
    state.incoming, state.held = incoming, held
    return {"checksum": f"{total:016x}", "tensors": len(seen), "rank": worker.rank}


def _mixed(name: str, checksum: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.blake2b(f"{name} {checksum}".encode(), digest_size=8).digest(), "big")


def _commit(worker: Any, keep_old: bool) -> dict[str, Any]:
    state = _state(worker)
    if state.incoming is None:
        raise WeightUpdateError("nothing is staged")
    if keep_old and not state.reloads:
        state.snapshot = {name: value.detach().to("cpu", copy=True) for name, value in _values(worker)}
    _load(worker, _tensors(state.incoming, state.held), state.reloads)
    return {}


def _rollback(worker: Any) -> dict[str, Any]:
    """The old weights, from the snapshot or from where they came; what was found afterwards must be the fingerprint before."""
    state = _state(worker)
    if state.snapshot is not None:
        for name, value in _values(worker):
            value.data.copy_(state.snapshot[name])
    elif not state.reloads:
        if _changed(worker):
            raise WeightUpdateError("the old weights were not kept (keep_old=False)")
    elif state.own:
        old = state.last or (_checkpoint(state), None)
        _load(worker, _tensors(*old), reload=True)
    else:
        raise WeightUpdateError(
            "this engine packs its weights, and the old ones came by a transport of your own: nobody kept them"
        )
    now = fingerprint(worker)
    other = _other(now, state.baseline)
    state.drop()
    if other:
        raise WeightUpdateError(f"{other[0]} is not what it was ({len(other)} parameters)")
    state.baseline = now
    return {}


def _drop(worker: Any) -> dict[str, Any]:
    _state(worker).drop()
    return {}


def _changes(worker: Any, parameters: bool = False) -> dict[str, Any]:
    """``parameters``: of these alone. A model's own steps may write its buffers."""
    only = dict(_model(worker).named_parameters()) if parameters else None
    return {"changed": [name for name in _changed(worker) if only is None or name in only]}


def _finish(worker: Any) -> dict[str, Any]:
    """The update is over: this worker's report with its self-test, and what ranks compare."""
    from vllm_compat import proof

    state, now = _state(worker), fingerprint(worker)
    found = {
        "report": proof.worker_report(worker, updated=True), "replicated": _replicated(worker, now), "rank": worker.rank,
        "changed": _other(now, state.baseline),
    }  # fmt: skip
    state.own = state.incoming is not None or (state.own and now == state.baseline)
    before = state.last
    if state.incoming is not None and state.reloads:
        state.last = (state.incoming, state.held)
        state.incoming = state.held = None
    elif not state.own:
        state.last = None
    if before is not None and before is not state.last:
        before[0].close(True)
    state.drop(ok=True)
    state.baseline = now
    return found


_COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "baseline": _baseline, "watch": _watch, "stage": _stage, "commit": _commit, "rollback": _rollback, "drop": _drop,
    "changes": _changes, "finish": _finish,
}  # fmt: skip


# --- into the model -----------------------------------------------------------------------------------------------------


def _values(worker: Any) -> Iterator[tuple[str, Any]]:
    model = _model(worker)
    yield from model.named_parameters()
    yield from model.named_buffers()


def _tensors(incoming: Any, held: dict[str, Any] | None) -> Iterator[tuple[str, Any]]:
    return iter(held.items()) if held is not None else incoming.tensors()


def _checkpoint(state: _State) -> Any:
    from vllm_compat.weights.transports.files import Files

    if state.folder is None:
        raise WeightUpdateError("the old weights are in no folder of this host")
    return Files(state.folder)


def _needs_reload(worker: Any) -> bool:
    def derived(module: Any) -> bool:
        absorbed = hasattr(module, "W_UV") or hasattr(getattr(module, "impl", None), "W_UV")
        return _packed(module) or absorbed or hasattr(module, "w13_weight")

    return worker.model_config.quantization is not None or any(derived(module) for module in _model(worker).modules())


def _has_reload(worker: Any) -> bool:
    import inspect

    method = getattr(worker.model_runner, "reload_weights", None)
    return method is not None and "weights_iterator" in inspect.signature(method).parameters


def _forget_half_done(worker: Any) -> None:
    """A reload that stopped half-way left what it had of a layer. vLLM would count it twice, and take the layer for whole."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in _model(worker).modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0


def _load(worker: Any, tensors: Iterator[tuple[str, Any]], reload: bool) -> None:
    import torch

    if reload:
        from vllm.config import set_current_vllm_config

        _forget_half_done(worker)
        with set_current_vllm_config(worker.vllm_config):
            worker.model_runner.reload_weights(weights_iterator=tensors)
    else:
        with torch.no_grad():
            _model(worker).load_weights(tensors)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
