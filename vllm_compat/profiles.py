"""Profiles: one TOML file per model family. Find, read, check and match them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_compat.behaviors import BY_NAME
from vllm_compat.errors import ProfileError


class Match(BaseModel):
    """Which models a profile is for, by what their config.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()

    def fits(self, config: Mapping[str, Any]) -> bool:
        """By architecture; by model type only where the config names no architecture."""
        names = config.get("architectures") or ()
        return bool(set(names) & set(self.architectures)) if names else config.get("model_type") in self.model_types


class Profile(BaseModel):
    """One file. ``behaviors`` holds only what differs from, or insists on, the behavior's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1]
    name: str = Field(min_length=1)
    description: str = ""
    match: Match = Match()
    behaviors: dict[str, bool] = {}


def folder() -> Path:
    """Where the shipped profiles are: inside the installed wheel, or beside the package in an editable install."""
    package = Path(__file__).resolve().parent
    for place in (package / "_profiles", package.parent / "profiles"):
        if place.is_dir():
            return place
    raise ProfileError(f"the shipped profiles are missing beside {package}: install vllm_compat again")


@cache
def shipped() -> dict[str, Profile]:
    """All shipped profiles by name."""
    found = [read(file) for file in sorted(folder().glob("*.toml"))]
    return {profile.name: profile for profile in found}


def read(file: Path) -> Profile:
    """Parse and check one file. Raises ProfileError naming the file, the key and what to do."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(f"{file}: cannot be read as a profile: {error}") from None
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ProfileError(f"{file}: {key}: {first['msg']}; see profiles/default.toml for the form") from None
    unknown = sorted(set(profile.behaviors) - set(BY_NAME))
    if unknown:
        raise ProfileError(f"{file}: behaviors.{unknown[0]}: no such behavior; known: {', '.join(BY_NAME)}")
    return profile


def choose(wanted: str, config: Mapping[str, Any] | None) -> tuple[Profile, tuple[str, ...]]:
    """The profile for ``wanted`` (a name, a path, or ``auto``) and a model's config.json, with notes for the report.

    ``config`` is None where the model has no readable config.json. Raises ProfileError for a name nobody has.
    """
    known = shipped()
    if wanted == "auto":
        if config is None:
            return known["default"], ("the model's config.json could not be read: profile default",)
        for profile in known.values():
            if profile.match.fits(config):
                return profile, ()
        what = ", ".join(config.get("architectures") or ()) or config.get("model_type") or "this model"
        return known["default"], (f"no profile names {what}: profile default",)
    if wanted.endswith(".toml") or "/" in wanted:
        profile = read(Path(wanted))
    elif wanted in known:
        profile = known[wanted]
    else:
        raise ProfileError(f"no profile {wanted!r}: use one of {', '.join(known)}, a path to a .toml file, auto or off")
    if config is not None and profile.name != "default" and not profile.match.fits(config):
        what = ", ".join(config.get("architectures") or ()) or str(config.get("model_type"))
        return profile, (f"profile {profile.name} was named, but does not list {what}",)
    return profile, ()
