"""What several behavior files need: plain engine arguments as native routes."""

from __future__ import annotations

from typing import Any

from vllm_compat.patching.model import Native

# The releases whose routes have been run on a real engine; one behavior file per trait says how.
V1_RELEASES = "==0.32.0"


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
        accepts=lambda given: given == value,
    )
