"""What an update consists of, in which order and where its bytes lie: the same on both sides of a transport."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_compat.errors import WeightUpdateError

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
    Manifest = Mapping[str, tuple[Sequence[int], str | torch.dtype]]

ALIGNMENT = 64  # bytes: every tensor starts at a multiple, so that its bytes can be viewed as its dtype


@dataclass(frozen=True)
class Item:
    """One tensor on its way. More than one name: tied tensors, whose bytes go once."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str  # torch's word, such as "bfloat16"

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * int(dtype_of(self.dtype).itemsize)

    @property
    def room(self) -> int:
        """Its bytes, and those up to where the next may start."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


def dtype_of(word: str | torch.dtype) -> torch.dtype:
    """The dtype of torch's word for it, such as "bfloat16"."""
    import torch

    found = word if isinstance(word, torch.dtype) else getattr(torch, word, None)
    if not isinstance(found, torch.dtype) or found.is_complex or "torch.q" in str(found):
        raise WeightUpdateError(f"{word!r} is not a dtype of torch {torch.__version__} that a weight can have")
    return found


def word_of(dtype: torch.dtype) -> str:
    """torch's word for a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def describe(
    tensors: Tensors, manifest: Manifest | None, dtype: str | torch.dtype | None
) -> tuple[list[Item], Iterator[torch.Tensor]]:
    """The items of an update, and an iterator of one tensor an item, each checked when it is asked for.

    Without ``manifest`` all tensors are there at once. With it (name to (shape, dtype as sent)) they may come one at a
    time, in the manifest's order. ``dtype``: what tensors of another floating dtype are sent as (8-bit ones stay).

    Raises WeightUpdateError naming the tensor: not a tensor, sharded, without data, named twice, or not as promised.
    """
    wanted = None if dtype is None else dtype_of(dtype)
    if wanted is not None and not wanted.is_floating_point:
        raise WeightUpdateError(f"dtype={dtype!r} is not a floating dtype: weights cannot be sent as it")
    pairs = iter(tensors.items() if isinstance(tensors, Mapping) else tensors)
    if manifest:
        items = [
            _checked(Item((name,), tuple(int(size) for size in shape), word_of(dtype_of(word))))
            for name, (shape, word) in manifest.items()
        ]
        return items, _promised(items, pairs, wanted)
    seen: set[str] = set()
    tied: dict[Any, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in pairs:
        _plain(name, tensor)
        if name in seen:
            raise WeightUpdateError(f"{name} is given twice")
        seen.add(name)
        # The same bytes seen in the same way. Tensors without bytes share nothing.
        same = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        tied.setdefault(same, ([], tensor))[0].append(name)
    if not seen:
        raise WeightUpdateError("the update holds no tensor")
    items = [Item(tuple(names), tuple(tensor.shape), word_of(_sent(tensor, wanted))) for names, tensor in tied.values()]
    return items, (tensor.detach() for _, tensor in tied.values())


def dump(items: list[Item]) -> list[Any]:
    """Items as JSON knows them."""
    return [[item.names, item.shape, item.dtype] for item in items]


def parse(rows: Any) -> list[Item]:
    """What `dump` wrote. Raises WeightUpdateError where it is something else."""
    try:
        items = [_checked(Item(tuple(names), tuple(shape), dtype)) for names, shape, dtype in rows]
    except (TypeError, ValueError) as error:
        raise WeightUpdateError(f"the update's manifest is damaged: {error}") from error
    if not items or len(manifest_of(items)) != sum(len(item.names) for item in items):
        raise WeightUpdateError("the update's manifest names no tensor, or one twice")
    return items


def manifest_of(items: list[Item]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Checkpoint name to (shape, dtype word)."""
    return {name: (item.shape, item.dtype) for item in items for name in item.names}


def flat(item: Item, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes as sent, ``(nbytes,)`` uint8: its own memory where that is possible."""
    import torch

    return tensor.to(dtype_of(item.dtype)).contiguous().reshape(-1).view(torch.uint8)


def put(item: Item, tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a tensor's bytes as sent into ``target``, ``(nbytes,)`` uint8."""
    sent = dtype_of(item.dtype)
    if not item.nbytes:
        return
    if tensor.dtype == sent and tensor.is_contiguous():
        target.copy_(flat(item, tensor))  # as bytes: also of a dtype that torch cannot compute with
    else:
        target.view(sent).view(item.shape).copy_(tensor)


def view(item: Item, source: torch.Tensor) -> torch.Tensor:
    """The tensor whose bytes ``source`` (uint8) starts with; it shares their memory."""
    return source[: item.nbytes].view(dtype_of(item.dtype)).view(item.shape)


def _promised(items: list[Item], pairs: Iterator[tuple[str, torch.Tensor]], wanted: torch.dtype | None) -> Iterator[torch.Tensor]:
    for item in items:
        pair = next(pairs, None)
        if pair is None or pair[0] != item.names[0]:
            came = "the tensors ended" if pair is None else f"{pair[0]} came"
            raise WeightUpdateError(f"{came} where the manifest has {item.names[0]}: the order is the manifest's")
        name, tensor = pair
        _plain(name, tensor)
        found = tuple(tensor.shape), word_of(_sent(tensor, wanted))
        if found != (item.shape, item.dtype):
            raise WeightUpdateError(f"{name} is {found[1]} {found[0]}, but the manifest promised {item.dtype} {item.shape}")
        yield tensor.detach()
    extra = next(pairs, None)
    if extra is not None:
        raise WeightUpdateError(f"{extra[0]} came after the manifest's last tensor")


def _sent(tensor: torch.Tensor, wanted: torch.dtype | None) -> torch.dtype:
    narrow = tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point
    return tensor.dtype if wanted is None or narrow else wanted


def _plain(name: Any, tensor: Any) -> None:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise WeightUpdateError(f"{name!r}: an update consists of names and tensors, not of {type(tensor).__name__}")
    if hasattr(tensor, "full_tensor"):
        raise WeightUpdateError(f"{name} is a DTensor: send `tensor.full_tensor()`, gathered on every rank of the trainer")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise WeightUpdateError(f"{name} has no plain data ({tensor.layout}, {tensor.device}): it cannot be sent")
    dtype_of(tensor.dtype)


def _checked(item: Item) -> Item:
    if not item.names or not all(isinstance(name, str) for name in item.names):
        raise WeightUpdateError(f"the update's manifest names a tensor {item.names!r}")
    if not all(isinstance(size, int) and size >= 0 for size in item.shape):
        raise WeightUpdateError(f"{item.names[0]} has the shape {item.shape!r} in the update's manifest")
    dtype_of(item.dtype)
    return item
