"""Every exception and warning vllm_compat raises on purpose. Each says what, where and what to do."""

from __future__ import annotations


class VllmCompatError(Exception):
    """Base class: catching it catches everything vllm_compat refuses."""


class SettingsError(VllmCompatError):
    """A ``VLLM_COMPAT_*`` variable is unknown or does not parse."""


class ProfileError(VllmCompatError):
    """A profile cannot be found, read, or matched."""


class UnsupportedVLLMError(VllmCompatError):
    """The installed vLLM is missing or is a release no behavior has a route for."""


class TargetError(VllmCompatError):
    """A function of vLLM that a patch relies on is not as declared."""

    def __init__(self, target: str, problem: str) -> None:
        self.target, self.problem = target, problem
        super().__init__(
            f"{target}: {problem}. This vLLM is not one vllm_compat was checked against: install a "
            f"supported release (`vllm-compat doctor` names them) or update vllm_compat."
        )


class TargetMissingError(TargetError):
    """The target does not exist in this vLLM."""


class TargetChangedError(TargetError):
    """The target exists, but its parameters are not the ones the patch relies on."""


class PatchConflictError(TargetError):
    """Somebody else has already replaced the target."""

    def __init__(self, target: str, found: str) -> None:
        self.found = found
        VllmCompatError.__init__(
            self,
            f"{target} was already replaced by {found}, so what vllm_compat would put there cannot be "
            f"proven. Remove that patch, or switch the behavior off (VLLM_COMPAT_<BEHAVIOR>=0).",
        )
        self.target, self.problem = target, f"already replaced by {found}"


class PluginExcludedError(VllmCompatError):
    """``VLLM_PLUGINS`` keeps vLLM from loading our plugin in the processes it starts."""


class TooLateError(VllmCompatError):
    """An engine, or its configuration, was made before vllm_compat was active."""


class PlanConflictError(VllmCompatError):
    """Two engines inside one process would need different patches."""


class UnsupportedBehaviorError(VllmCompatError):
    """A wanted behavior has no route here (strict)."""


class ProofError(VllmCompatError):
    """An engine started, but a process of it is not in the state the plan promises (strict).

    ``failures`` lists ``(behavior, process, rank, reason)``.
    """

    def __init__(self, failures: list[tuple[str, str, int | None, str]]) -> None:
        self.failures = failures
        lines = [
            f"  {behavior} in {process}{'' if rank is None else f' rank {rank}'}: {reason}"
            for behavior, process, rank, reason in failures
        ]
        super().__init__(
            "vllm_compat could not prove V0-equivalent behavior, so no token is generated:\n"
            + "\n".join(lines)
            + "\nSwitch the named behavior off (VLLM_COMPAT_<BEHAVIOR>=0) to give it up on purpose, or set "
            "VLLM_COMPAT_STRICT=0 to turn this error into a warning."
        )


class WeightUpdateError(VllmCompatError):
    """A weight update cannot start, or did not finish."""


class RecordingError(VllmCompatError):
    """A recording is missing, damaged, of another format, or does not fit."""


class LockError(VllmCompatError):
    """A lock is missing, damaged, of another format, or cannot be written."""


class LockMismatchError(VllmCompatError):
    """An engine would differ from its lock, strict or not. ``differences`` are sentences."""

    def __init__(self, file: str, differences: tuple[str, ...]) -> None:
        self.file, self.differences = file, differences
        listed = "\n".join(f"  - {sentence}" for sentence in differences)
        super().__init__(
            f"this engine would differ from the lock {file}, so it does not start:\n{listed}\n"
            f"`vllm-compat lock MODEL --update` accepts the new state, with `--engine-args` where your program's arguments "
            f"decide; else install the locked versions and take back what changed."
        )

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return type(self), (self.file, self.differences)  # a Ray actor's error reaches its caller by pickle


class InputError(VllmCompatError):
    """A metric or a trainer function was given something it cannot compute from."""


class VllmCompatWarning(UserWarning):
    """With ``VLLM_COMPAT_STRICT=0``: what would have been raised."""
