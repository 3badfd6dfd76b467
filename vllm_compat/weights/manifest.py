"""What tensors an update must bring, and whether those that come are they."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights.transports import Manifest

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_SHOWN = 5


def expected(worker: Any, start: Path | None) -> Manifest:
    """The tensors of the checkpoint this engine was started from: of the safetensors headers in ``start``, or, where there are
    none (``load_format="dummy"`` with a config alone, other formats), of the transformers model that its config describes.

    Raises WeightUpdateError where neither is to be had.
    """
    kept: Manifest | None = vars(worker).get("_vllm_compat_manifest")
    if kept is None:
        if start is not None and any(start.glob("*.safetensors")):
            from vllm_compat.weights.transports.files import Files

            kept = Files(start).manifest
        else:
            kept = _of_config(worker.model_config)
        worker._vllm_compat_manifest = kept
    return kept


def folder(worker: Any) -> Path | None:
    """Where the checkpoint of a hub name or of a folder is on this host; None where it is not."""
    config = worker.model_config
    found = Path(config.model)
    if found.is_dir():
        return found
    try:
        from huggingface_hub import snapshot_download

        cache = worker.vllm_config.load_config.download_dir
        return Path(snapshot_download(config.model, revision=config.revision, cache_dir=cache, local_files_only=True))
    except Exception:  # no such name, or never downloaded: both are what None says
        return None


def _of_config(config: Any) -> Manifest:
    import torch
    import transformers

    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config.hf_config)
    except Exception as error:
        raise WeightUpdateError(
            f"which tensors {config.model} has cannot be told: there are no safetensors files in it, and transformers makes no "
            f"model of its config ({type(error).__name__}: {str(error)[:200]})"
        ) from None
    return {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in model.state_dict().items()}


def check(wanted: Manifest, given: Manifest, tied: bool, partial: bool) -> None:
    """Names and shapes equal; dtypes too, but float kinds may differ: vLLM's loaders cast those. A head that is tied to the
    embedding may be named or not. ``partial``: names may be missing.

    Raises WeightUpdateError naming the first tensors that are wrong.
    """
    aside = {"lm_head.weight"} if tied else set()
    aside |= {name for name in (*wanted, *given) if name.endswith("rotary_emb.inv_freq")}
    unknown = sorted(set(given) - set(wanted) - aside)
    if unknown:
        raise WeightUpdateError(f"the model has no tensor {_listed(unknown)}: send the names of its checkpoint")
    missing = sorted(set(wanted) - set(given) - aside)
    if missing and not partial:
        raise WeightUpdateError(
            f"the update lacks {_listed(missing)} of {len(wanted)} tensors: send all, or say partial=True where the others stay"
        )
    if not given:
        raise WeightUpdateError("the update has no tensors")
    for name in sorted(set(given) & set(wanted)):
        (shape, dtype), (other_shape, other) = wanted[name], given[name]
        if shape != other_shape:
            raise WeightUpdateError(f"{name} has shape {list(other_shape)}, the model's {list(shape)}")
        if dtype != other and not (dtype in _FLOATS and other in _FLOATS):
            raise WeightUpdateError(f"{name} is {other}, the model's {dtype}: only float kinds are cast")


def same(name: str, tensor: Any, announced: Manifest, finite: bool) -> None:
    """A tensor that arrived is the one announced. Raises WeightUpdateError."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if announced.get(name) != (shape, dtype):
        raise WeightUpdateError(f"{name} arrived as {list(shape)} {dtype}, announced was {announced.get(name)}")
    if finite and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise WeightUpdateError(f"{name} holds values that are not finite")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def tied(worker: Any) -> bool:
    """Whether the config ties the head to the embedding."""
    config: Any = worker.model_config.hf_config
    text: Mapping[str, Any] | Any = getattr(config, "text_config", config)
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))
