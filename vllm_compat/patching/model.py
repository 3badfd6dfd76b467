"""What a behavior is made of: pure data plus the few functions its author writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Role(str, Enum):
    """A process that takes part in an engine. Under a uniprocess executor one process has several."""

    FRONT = "front"
    ENGINE_CORE = "engine_core"
    WORKER = "worker"


class State(str, Enum):
    """How a behavior, or one patch of it, ended up. Every state comes with a sentence."""

    PENDING = "pending"  # wanted, its module is not imported yet
    APPLIED = "applied"  # our code is in place
    EXERCISED = "exercised"  # our code is in place and has run for a request
    NATIVE = "native"  # vLLM's own option does it
    NOT_NEEDED = "not_needed"  # this engine behaves like V0 by itself
    DISABLED = "disabled"  # switched off
    OVERRIDDEN = "overridden"  # the user's own engine argument won
    UNSUPPORTED = "unsupported"  # no route here
    FAILED = "failed"  # wanted, tried, not in force


UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET", "__bool__": lambda self: False})()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A function of the patched library: ``module:Class.method`` or ``module:function``.

    ``params`` are the parameter names relied on (a superset in the library is fine). ``traced``
    targets run inside ``torch.compile``, so no bookkeeping may be added around them. ``versions`` narrows a target that
    is only relied on to the releases that have it.
    """

    path: str
    params: tuple[str, ...] = ()
    traced: bool = False
    versions: str = ""

    @property
    def module(self) -> str:
        """The module to import."""
        return self.path.partition(":")[0]

    @property
    def qualname(self) -> str:
        """The name inside the module."""
        return self.path.partition(":")[2]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where a route applies: a PEP 440 range, the model runners (``v0``, ``v1``, ``v2``), and of a behavior that has modes
    those it is for (empty: all)."""

    versions: str
    runners: tuple[str, ...] = ("v1",)
    modes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Native(Route):
    """vLLM has an option for it.

    ``read(args)`` gives the user's explicit value or `UNSET`; ``write(args)`` puts V0's value into the
    engine arguments, or raises CheckFailed where that cannot be; ``accepts(value)`` says whether a user's explicit value
    already means V0. ``env`` is set in the environment of the engine's processes instead
    of an engine argument (``read`` then gets the environment). ``made(config)`` reads the value back from vLLM's finished
    configuration, where more than the arguments decides.
    """

    option: str
    value: str
    read: Callable[[Any], Any]
    write: Callable[[Any], None]
    accepts: Callable[[Any], bool]
    env: bool = False
    made: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Patch(Route):
    """A replacement for one function. ``build(original, module)`` returns a plain function.

    ``adds`` marks a new attribute: nothing may be there yet. ``lazy``: vLLM imports the module only where it is used, so a
    process without it lacks nothing. ``upstream`` and ``remove_when`` say why the
    patch exists and when it goes.
    """

    name: str
    role: Role
    target: Target
    build: Callable[[Any, Any], Callable[..., Any]]
    adds: bool = False
    lazy: bool = False
    upstream: str = ""
    remove_when: str = ""


def frame_patch(
    name: str, role: Role, path: str, build: Callable[[Any, Any], Any], *params: str, adds: bool = False, versions: str = ""
) -> Patch:
    """A patch of the frame around every engine, which is no behavior's."""
    return Patch(
        name=name, versions=versions, role=role, target=Target(path=path, params=params), build=build, adds=adds,
        upstream="vLLM offers no hook here", remove_when="never",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NotNeeded(Route):
    """The engine does what V0 did."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Unsupported(Route):
    """Known not to be possible; the reason is for the user."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question put to a running process of the engine.

    ``run(subject)`` gets the live ``EngineCore`` or ``Worker`` and returns a sentence about what it saw, or raises
    ``CheckFailed``. ``modes`` as of a route. ``of_weights``: asked again at the end of every weight update.
    """

    name: str
    role: Role
    run: Callable[[Any], str]
    modes: tuple[str, ...] = ()
    of_weights: bool = False


class CheckFailed(Exception):
    """What a check saw is not what V0-equivalence needs."""


@dataclass(frozen=True, kw_only=True)
class Behavior:
    """One trait of V0: what it was, what V1 does, how to get it back, how to tell that it is back.

    ``modes`` are the ways in which it can be on, the default first; ``off`` is the word of the same kind for switching it
    off. Switch and profile take these words besides on and off.
    """

    name: str
    v0: str
    v1: str
    cost: str  # what V0-equivalence loses when the behavior is off
    routes: tuple[Route, ...]
    checks: tuple[Check, ...] = ()
    relies_on: tuple[Target, ...] = ()
    default: bool = True
    modes: tuple[str, ...] = ()
    off: str = ""

    @property
    def variable(self) -> str:
        """The switch in the environment."""
        return f"VLLM_COMPAT_{self.name.upper()}"

    def patches(self) -> tuple[Patch, ...]:
        """The patches of all releases."""
        return tuple(route for route in self.routes if isinstance(route, Patch))


@dataclass
class Entry:
    """The ledger's row for one replacement that is in place."""

    patch: Patch
    owner: Any
    attribute: str
    own: Any  # what stood in the owner's own namespace, or UNSET where it was inherited or absent
    replacement: Any
    exercised: bool = False
