"""The weight version of this process: 0 for the weights an engine started with, then what each complete update carries.

It lives in the engine core's process, where an update ends and steps begin. Behaviors read it (prefix caching per version).
"""

from __future__ import annotations

_current = 0


def current() -> int:
    """The version of the weights that the next step computes with."""
    return _current


def advance(to: int) -> None:
    """An update is complete. Raises ValueError for a version that is not newer."""
    global _current
    if to <= _current:
        raise ValueError(f"weight version {to} is not newer than {_current}")
    _current = to
