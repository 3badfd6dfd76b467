"""One Plan per engine: what was decided for it, read by every process of it and decided again by none.

The plan travels inside the engine's own configuration (``VllmConfig.additional_config``), as a string whose
unpickling activates vllm_compat. So it reaches spawned, forked and Ray processes alike, belongs to one engine
even where a program starts several, needs neither environment variables nor vLLM's plugin loader, and a node
without vllm_compat cannot start a worker silently unpatched. vLLM hashes ``additional_config`` into its
torch.compile cache key, so the text holds nothing that changes from run to run: a fresh seed is not in it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_compat.patching.model import State

KEY = "vllm_compat"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to one behavior of one engine, and who decided.

    ``origin``: ``engine argument``, ``environment``, ``profile`` or ``default``. ``state`` is where it starts:
    native, pending (patches to be put in), not_needed, disabled, overridden, unsupported. ``given`` is the option with the
    user's own value that overrode it. ``mode`` is the chosen one of a behavior that has modes.
    """

    behavior: str
    state: State
    origin: str
    reason: str
    sets: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    given: str = ""
    mode: str = ""

    @property
    def wanted(self) -> bool:
        """Whether the processes have to show that it is in force."""
        return self.state in (State.NATIVE, State.PENDING)

    @property
    def route(self) -> str:
        """``native``, ``patch``, ``native + patch`` or the state where there is none."""
        parts = [word for word, used in (("native", self.sets or not self.patches), ("patch", self.patches)) if used]
        return " + ".join(parts) if self.wanted else self.state.value


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All decisions for one engine, and what they were made for. ``methods``: those of a worker that its profile names as
    changing weights."""

    vllm: str
    runner: str
    profile: str
    strict: bool
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def __getitem__(self, behavior: str) -> Decision:
        return next(decision for decision in self.decisions if decision.behavior == behavior)

    def given_up(self, behavior: str, state: State, reason: str, origin: str | None = None) -> Plan:
        """The plan with one behavior in a state that promises nothing: no options set, no patches."""
        old = self[behavior]
        new = replace(old, state=state, reason=reason, origin=origin or old.origin, sets=(), patches=())
        return replace(self, decisions=tuple(new if d is old else d for d in self.decisions))

    def patch_names(self) -> tuple[str, ...]:
        """``behavior/patch`` for every patch to put in, in order."""
        return tuple(f"{d.behavior}/{patch}" for d in self.decisions for patch in d.patches)

    def text(self) -> str:
        """Canonical JSON: the same decisions give the same text."""
        data = {"format": _FORMAT, **asdict(self)}
        if not self.methods:
            del data["methods"]  # so a plan without any has the text it always had
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """A short name for `text`, which processes compare."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read `text`. Raises ValueError where it was written by another format."""
        data: dict[str, Any] = json.loads(text)
        if data.pop("format", None) != _FORMAT:
            raise ValueError("this plan was written by another release of vllm_compat")
        decisions = tuple(
            Decision(**{**d, "state": State(d["state"]), "sets": tuple(d["sets"]), "patches": tuple(d["patches"])})
            for d in data.pop("decisions")
        )
        notes, methods = tuple(data.pop("notes")), tuple(data.pop("methods", ()))
        return cls(**data, decisions=decisions, notes=notes, methods=methods)


class PlanCarrier(dict[str, Any]):
    """``additional_config`` for vLLM 0.8.5, which takes any object that can hash itself, and no plain dict."""

    def compute_hash(self) -> str:
        """What vLLM mixes into its torch.compile cache key."""
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()


class PlanText(str):
    """A plan's text inside an engine's configuration. Unpickling it activates vllm_compat in that process."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _arrive, (str(self),)


def _arrive(text: str) -> PlanText:
    from vllm_compat import bootstrap

    bootstrap.receive(Plan.parse(text))
    return PlanText(text)


def of(vllm_config: Any) -> Plan | None:
    """The plan of an engine's configuration, or None where it was made without vllm_compat."""
    extra = getattr(vllm_config, "additional_config", None)
    text = extra.get(KEY) if isinstance(extra, dict) else None
    return None if text is None else Plan.parse(text)
