"""What several behavior files need: version ranges, plain engine arguments as native routes."""

from __future__ import annotations

from typing import Any

from vllm_compat.patching.model import Native

# No range ends at the newest release: one without a row in tests/releases/releases.toml is refused before any route is asked.
V0_RELEASES = ">=0.8.5,<0.11.0"  # V0's code is gone in 0.11.0
V1_RELEASES = ">=0.8.5"
V2_RELEASES = ">=0.12.0"  # the first with Model Runner V2


def engine_arg(name: str, value: Any, *, runners: tuple[str, ...] = ("v1",), versions: str = V1_RELEASES) -> Native:
    """A native route that is one engine argument with one V0 value."""

    def write(args: Any) -> None:
        setattr(args, name, value)

    return Native(
        versions=versions,
        runners=runners,
        option=name,
        value=f"{name}={value!r}",
        read=lambda args: args.explicit(name),
        write=write,
        accepts=lambda given: getattr(given, "value", given) == value,  # vLLM 0.10.2 has an Enum for logprobs_mode
    )
