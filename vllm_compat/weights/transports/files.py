"""Weights from a safetensors file, or a folder of them, that each worker reads by itself.

``{"transport": "files", "path": PATH}``: the folder must be there on every host. Nothing but safetensors is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights.transports import Manifest

_WORDS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


class Files:
    """`Incoming` of safetensors files. The bytes are mapped, and read where a tensor is asked for."""

    rereadable = True

    def __init__(self, path: Path) -> None:
        import safetensors

        self.manifest: Manifest = {}
        self._opened: list[tuple[Path, tuple[int, ...], Any, list[str]]] = []
        for file in _files(path):
            stamp = _stamp(file)
            try:
                opened: Any = safetensors.safe_open(str(file), framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise WeightUpdateError(f"{file} is damaged or not whole: {error}") from None
            names = list(opened.keys())
            for name in names:
                part = opened.get_slice(name)
                if name in self.manifest:
                    raise WeightUpdateError(f"{name} is in {file} and in another file of {path}")
                self.manifest[name] = (tuple(part.get_shape()), _WORDS.get(part.get_dtype(), part.get_dtype()))
            self._opened.append((file, stamp, opened, names))

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Each tensor, on the CPU. Raises WeightUpdateError where a file is not the one that was opened: the trainer wrote the
        next update over it."""
        for file, stamp, opened, names in self._opened:
            for name in names:
                if _stamp(file) != stamp:
                    raise WeightUpdateError(f"{file} was changed after it was opened, at the latest while {name} was read")
                yield name, opened.get_tensor(name)

    def close(self, ok: bool) -> None:
        """Let go of the files."""
        self._opened = []


def open_source(source: Mapping[str, Any], device: Any, timeout: float) -> Files:
    """``source["path"]`` on this host. Raises WeightUpdateError where it is not there, not whole or not safetensors."""
    path = source.get("path")
    if not isinstance(path, str):
        raise WeightUpdateError(f"{dict(source)!r} is not a source of files: its path is a string")
    return Files(Path(path))


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightUpdateError(f"{path}: only safetensors files are read")
        return [path]
    if not path.is_dir():
        raise WeightUpdateError(f"{path}: there is no such file or folder on this worker's host")
    found = sorted(path.glob("*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightUpdateError(f"{index} cannot be read: {error}") from None
        missing = sorted(named - {file.name for file in found})
        if missing:
            raise WeightUpdateError(f"{path} lacks the shard {missing[0]}, which its index names")
        found = [file for file in found if file.name in named]
    if not found:
        raise WeightUpdateError(f"{path} holds no safetensors file")
    return found
