"""Every ``VLLM_COMPAT_*`` variable, in one place. The only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from vllm_compat.errors import SettingsError

PREFIX = "VLLM_COMPAT_"


class Settings(BaseSettings):
    """The variables with their meaning. Behaviors are unset (``None``) unless named: profile and default decide."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore")

    profile: str = Field(
        default="auto",
        min_length=1,
        description="a profile's name, a path to a TOML file, auto (match by model) or off (vllm_compat does nothing)",
    )
    strict: bool = Field(
        default=True,
        description="1: raise where V0-equivalence cannot be had or proven; 0: warn and go on with named states",
    )
    report_dir: str | None = Field(
        default=None,
        description="folder for the reports of running engines, which doctor reads (default: below the temporary folder)",
    )
    lock: str | None = Field(
        default=None,
        description="the lock that every engine must meet (default: vllm-compat.lock in the working directory, if there is one)",
    )
    unbracketed_updates: Literal["bracket", "refuse", "allow"] = Field(
        default="bracket",
        description="calls that change weights outside a weight_update block: bracket, refuse or allow them",
    )
    http_token_file: str | None = Field(
        default=None,
        description="a file with the bearer token of the weight endpoints of vllm serve; unset: there are none",
    )
    http_roots: str | None = Field(
        default=None,
        description="folders below which checkpoints must lie that are named over HTTP, separated as in PATH",
    )
    http_transports: str = Field(
        default="files",
        description="weight transports that may be named over HTTP, comma-separated: files, shared_memory, process_group",
    )
    model_runner_v1: bool | None = Field(default=None, description="pin Model Runner V1")
    processed_logprobs: bool | None = Field(
        default=None, description="logprobs of the distribution sampled from, prompt rows included, in V0's order of filters"
    )
    seeded_sampling: bool | None = Field(default=None, description="V0's noise for requests with a seed")
    # v0, as 1: off; per_version: blocks are found by requests of the weight version that wrote them; v1, as 0: vLLM's own
    no_prefix_caching: bool | Literal["v0", "per_version", "v1"] | None = Field(
        default=None, description="no KV blocks shared between requests"
    )
    no_async_scheduling: bool | None = Field(default=None, description="no step scheduled ahead")
    # accumulate, as 1: from weights in the model's dtype; weights: from float32 weights that the trainer sends; model, as 0: off
    fp32_lm_head: bool | Literal["accumulate", "weights", "model"] | None = Field(default=None, description="logits in float32")
    synchronized_weight_update: bool | None = Field(
        default=None, description="vllm_compat.weight_update(engine): all parameters change between two steps"
    )
    unshared_engine_seed: bool | None = Field(default=None, description="a fresh seed per engine where you gave none")


def variables() -> tuple[str, ...]:
    """The names of all variables we know."""
    return tuple(PREFIX + name.upper() for name in Settings.model_fields)


def load() -> Settings:
    """Read the environment. Raises SettingsError for an unknown variable or a value that does not parse."""
    known = variables()
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            import difflib

            close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
            raise SettingsError(
                f"unknown environment variable {name}; did you mean {close[0]}? Known: {', '.join(known)}. Correct or unset it."
            )
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper()
        raise SettingsError(
            f"{name}={os.environ.get(name, '')!r}: {first['msg']}. Use 0 or 1 for a switch, or a mode it has (or unset it); "
            f"`vllm-compat doctor --help` lists the variables."
        ) from None


def vllm_plugins() -> tuple[str, ...] | None:
    """vLLM's own ``VLLM_PLUGINS``, read as vLLM does: unset loads every plugin, else exact names, comma-separated."""
    value = os.environ.get("VLLM_PLUGINS")
    return None if value is None else tuple(value.split(","))


def environ() -> MutableMapping[str, str]:
    """The process environment, for behaviors whose route is one of vLLM's own variables."""
    return os.environ
