"""How weights come into a worker. A source is a JSON-able dict, ``{"transport": NAME, ...}``; one file per transport."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from vllm_compat.errors import WeightUpdateError

# name -> module with ``open_source(source, device, timeout) -> Incoming``
NAMES = {
    "files": "vllm_compat.weights.transports.files",
    "shared_memory": "vllm_compat.weights.transports.shared_memory",
    "process_group": "vllm_compat.weights.transports.process_group",
}
Manifest = dict[str, tuple[tuple[int, ...], str]]  # checkpoint name -> (shape, dtype word such as "bfloat16")


class Incoming(Protocol):
    """Weights that are on their way, or at hand.

    ``manifest`` is known before any tensor is read. ``rereadable``: `tensors` can be called again and gives the same bytes.
    """

    manifest: Manifest
    rereadable: bool

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """(checkpoint name, whole tensor) of everything in the manifest. A tensor is valid until the next one is asked for.
        Raises WeightUpdateError where one does not arrive, or not as announced."""

    def close(self, ok: bool) -> None:
        """The update is over, well or not."""


def open_source(source: Mapping[str, Any], device: Any, timeout: float) -> Incoming:
    """Open a source in this worker. Raises WeightUpdateError for an unknown transport or a source that is not there."""
    name = source.get("transport")
    if name not in NAMES:
        raise WeightUpdateError(f"there is no weight transport {name!r}: {', '.join(NAMES)}")
    found: Incoming = importlib.import_module(NAMES[name]).open_source(source, device, timeout)
    return found
