"""Async scheduling on a CPU, for tests of what it does to a weight update: vLLM's CPU platform switches it off.

Imported where the engine is made and, as part of the worker's extension, in the worker. The engine core, its scheduler and its
queue of two batches are vLLM's own; what stands in are CUDA's streams and events, since on a CPU a copy is done when it returns.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform


class Stream:
    """Nothing is ever under way."""

    device = torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...


class Event:
    """Has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


_check = CpuPlatform.check_and_update_config.__func__


def _check_and_update_config(cls: Any, vllm_config: Any) -> None:
    asked = vllm_config.scheduler_config.async_scheduling
    _check(cls, vllm_config)
    vllm_config.scheduler_config.async_scheduling = asked


CpuPlatform.check_and_update_config = classmethod(_check_and_update_config)
torch.cuda.Stream, torch.cuda.Event = Stream, Event
torch.cuda.current_stream = lambda *_: Stream()
torch.cuda.stream = lambda *_: contextlib.nullcontext()
