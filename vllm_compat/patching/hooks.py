"""Post-import hooks. The only file that imports wrapt.

wrapt serves the hooks alone: its proxies are skipped silently by Dynamo, so replacements are plain
functions (see `replace`). A hook that raises aborts the import of its target, once, and is consumed: a caller raises
only where the program must not go on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

Hook = Callable[[ModuleType], None]
_hooks: dict[str, list[Hook]] = {}
_ready: set[str] = set()  # modules known to be fully imported
_half: set[str] = set()  # modules wrapt called "imported" while their body was still running
_registering = False


def when_imported(module_name: str, hook: Hook) -> None:
    """Call ``hook(module)`` once the module is fully imported; at once if it already is.

    A hook cannot be taken back: it must itself ask whether it still applies.
    """
    global _registering
    hooks = _hooks.setdefault(module_name, [])
    hooks.append(hook)
    if len(hooks) == 1:
        _registering = True
        try:
            wrapt.register_post_import_hook(_fire, module_name)
        finally:
            _registering = False
    elif module_name in _ready and module_name in sys.modules:
        hook(sys.modules[module_name])


def _fire(module: Any) -> None:
    name = module.__name__
    if _registering and getattr(module.__spec__, "_initializing", False):
        _half.add(name)  # wrapt fires once only: `flush` has to come back to it
        return
    _ready.add(name)
    for hook in tuple(_hooks.get(name, ())):
        hook(module)


def flush() -> None:
    """A checkpoint: run the hooks of modules that were half imported when they were registered."""
    for name in tuple(_half):
        module = sys.modules.get(name)
        if module is None or not getattr(module.__spec__, "_initializing", False):
            _half.discard(name)
            if module is not None:
                _fire(module)
