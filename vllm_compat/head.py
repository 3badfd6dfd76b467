"""
The arithmetic of the float32 head, one for the engine and for the trainer: 16-bit values in, float32 sums out.

A product of two bfloat16 or float16 numbers fits float32, so the only rounding is that of the sums, and no float32 copy of
the weight is needed. Nothing of the weight is kept between calls: what changes in place counts in the next product. The
result belongs to the call.

Needs torch; nothing of vLLM or transformers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

# Elements of a temporary float32 block: 64 MiB, 16 MiB on the CPU.
_BLOCK, _CPU_BLOCK = 2**24, 2**22
# Elements of a weight from which building the compiled product pays: 2 MiB.
_WORTH_COMPILING = 2**20
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")

Product = Callable[[Any, Any], Any]


def linear(hidden: Any, weight: Any, bias: Any = None, *, batch_invariant: bool = False) -> Any:
    """float32 ``hidden @ weight.T + bias``, contiguous.

    hidden: [..., width], weight: [vocab, width], bias: [vocab] or None; each bfloat16, float16 or float32.
    batch_invariant: on CUDA, keep off ``mm(out_dtype=)``, which vLLM's batch-invariant mode does not replace.
    Returns [..., vocab].
    """
    _, product = way(hidden, weight, batch_invariant)
    logits = product(hidden.reshape(-1, hidden.shape[-1]), weight)
    if bias is not None:
        logits += bias.float()
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def way(hidden: Any, weight: Any, batch_invariant: bool = False) -> tuple[str, Product]:
    """How `linear` multiplies these two, in words and as a function of hidden [rows, width] and weight [vocab, width]."""
    import torch

    if weight.dtype == torch.float32:
        return "one float32 product", _float32
    if hidden.dtype != weight.dtype:
        return "blocks of the weight widened in turn", blocked
    if hidden.is_cuda:
        if not batch_invariant and "dtype" in torch.ops.aten.mm.overloads():
            return "mm(out_dtype=float32)", _out_dtype
        return "blocks of the weight widened in turn" + (", batch-invariant" if batch_invariant else ""), blocked
    if hidden.device.type != "cpu" or weight.numel() < _WORTH_COMPILING:
        return "blocks of the weight widened in turn", blocked
    if weight.dtype != torch.bfloat16 or not weight.is_contiguous():
        return "blocks of the weight widened in turn (only a contiguous bfloat16 weight has a compiled product)", blocked
    words, compiled = _compiled()
    return words, compiled or blocked


def _float32(hidden: Any, weight: Any) -> Any:
    import torch

    with full_float32(hidden.device.type):
        return torch.mm(hidden.float(), weight.t())


def _out_dtype(hidden: Any, weight: Any) -> Any:
    """bfloat16 in, float32 sums out, without a float32 copy of the weight: torch 2.8 on, on CUDA only."""
    import torch

    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)


def blocked(hidden: Any, weight: Any) -> Any:
    """The product where there is nothing better: blocks of the vocabulary are widened to float32 in turn, TF32 off."""
    import torch

    wide, rows = hidden.float(), block_rows(weight)
    # One buffer for all blocks: on the CPU, allocating it anew costs more than filling it.
    buffer = weight.new_empty(min(rows, len(weight)), weight.shape[-1], dtype=torch.float32)
    with full_float32(hidden.device.type):
        if hidden.device.type == "cpu":  # a tall block times few columns is the faster way round here
            logits = hidden.new_empty(len(weight), len(hidden), dtype=torch.float32)
            for out, block in zip(logits.split(rows), weight.split(rows)):
                torch.mm(buffer[: len(block)].copy_(block), wide.t(), out=out)
            return logits.t().contiguous()
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        for out, block in zip(logits.split(rows, 1), weight.split(rows)):
            # no out=: vLLM's batch-invariant mode replaces mm, and mm.out not in every release
            out.copy_(torch.mm(wide, buffer[: len(block)].copy_(block).t()))
    return logits


def block_rows(table: Any) -> int:
    """How many rows of [rows, width] are one block."""
    return max(1, (_CPU_BLOCK if table.device.type == "cpu" else _BLOCK) // int(table.shape[-1]))


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """Float32 matrix products as written: no autocast, no TF32, no bfloat16 passes."""
    import torch

    # From torch 2.9 on the older switch raises where the program has used the newer one.
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    switches = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if new else [torch.backends.cuda.matmul]
    name, off = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, off)
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before):
            setattr(switch, name, value)


@cache
def _compiled() -> tuple[str, Product | None]:
    """The product of head.c, built for this processor in half a second and held by this process alone, or why there is none."""
    names = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    why = "no C compiler"
    for name in names:
        try:
            words, product = _build(name)
            if _is_exact(product):
                return words, product
            why = f"what {name} made of it is not exact"
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            text = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
            why = f"{name}: {' '.join(text.split())[:160]}"
    return f"blocks of the weight widened in turn (no compiled product: {why})", None


def _build(compiler: str, *flags: str) -> tuple[str, Product]:
    import torch

    with tempfile.TemporaryDirectory(prefix="vllm_compat-") as folder:
        made, library = Path(folder, "head.o"), Path(folder, "head.so")
        # Linked without OpenMP's library, so that its threads are those of the one that torch has loaded.
        for command in (
            [compiler, *_FLAGS, *flags, str(Path(__file__).with_name("head.c")), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(library)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        loaded = ctypes.CDLL(str(library))
    loaded.instructions.restype = ctypes.c_char_p
    loaded.product.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3, ctypes.c_int]
    loaded.product.restype = None
    widened = loaded.hidden_bytes() == 4

    def product(hidden: Any, weight: Any) -> Any:
        hidden = (hidden.float() if widened else hidden).contiguous()
        logits = torch.empty(len(hidden), len(weight), dtype=torch.float32)
        loaded.product(
            weight.data_ptr(), hidden.data_ptr(), logits.data_ptr(), *weight.shape, len(hidden), torch.get_num_threads()
        )
        return logits

    return f"a compiled product ({loaded.instructions().decode()})", product


def _is_exact(product: Product) -> bool:
    """Whether it is right on shapes that no step divides."""
    import torch

    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 203, generator=random).bfloat16() for rows in (7, 133))
    exact = hidden.double() @ weight.double().t()
    return float((product(hidden, weight) - exact).abs().max()) < 1e-6 * float(exact.abs().max())
