"""Profiles: one TOML file per model family. Find, read, check and match them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_compat.behaviors import BY_NAME
from vllm_compat.errors import ProfileError
from vllm_compat.validation import RESOLUTION


class Match(BaseModel):
    """Which models a profile is for, by what their config.json says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()

    def fits(self, config: Mapping[str, Any]) -> bool:
        """By architecture; by model type only where the config names no architecture."""
        names = config.get("architectures") or ()
        return bool(set(names) & set(self.architectures)) if names else config.get("model_type") in self.model_types


class Band(BaseModel):
    """How many times the reference's own noise floor a metric may be: see `vllm_compat.validation`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    batch: float = Field(gt=0)
    rounding: float = Field(gt=0)


class Evidence(BaseModel):
    """One validation that was run. ``kind`` says what it is evidence for; ``held`` whether every band was; ``metrics`` are
    what was measured, by name; ``reference`` is the checksum of the recording it was measured against."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["architecture", "checkpoint"]  # seeded weights of its shape, or a real model
    model: str
    weights: str
    reference: str
    reference_by: str
    engine: str
    vllm: str
    dtype: str
    lm_head: str
    device: str
    date: date
    vllm_compat: str
    command: str
    held: bool
    failed: tuple[str, ...] = ()
    note: str = ""
    metrics: dict[str, float]


class WeightUpdate(BaseModel):
    """How this model's trainer sends weights. ``methods``: of the worker, called by ``collective_rpc``, which change them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    methods: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], ...] = ()


class Profile(BaseModel):
    """One file. ``behaviors`` holds only what differs from, or insists on, the behavior's default; ``bands`` what differs
    from those of the profile ``default``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1]
    name: str = Field(min_length=1)
    description: str = ""
    match: Match = Match()
    behaviors: dict[str, bool | str] = {}  # on, off, or a mode
    bands: dict[str, Band] = {}
    weight_update: WeightUpdate = WeightUpdate()
    evidence: tuple[Evidence, ...] = ()

    def all_bands(self) -> dict[str, Band]:
        """Every band: the default profile's, and this one's own in their place."""
        return {**shipped()["default"].bands, **self.bands}


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
    for name, choice in profile.behaviors.items():
        words = (*BY_NAME[name].modes, BY_NAME[name].off) if BY_NAME[name].modes else ()
        if isinstance(choice, str) and choice not in words:
            raise ProfileError(f"{file}: behaviors.{name}: {choice!r} is none of {', '.join(('true', 'false', *words))}")
    unknown = sorted(set(profile.bands) - set(RESOLUTION))
    if unknown:
        raise ProfileError(f"{file}: bands.{unknown[0]}: no such metric has a band; known: {', '.join(RESOLUTION)}")
    return profile


def missing_evidence(profile: Profile, release: str, device: str) -> str | None:
    """The sentence for a model whose profile was never validated on this release and kind of device; None where it was."""
    held = [one for one in profile.evidence if one.held]
    if any((Version(one.vllm).public, one.device) == (release, device) for one in held):
        return None
    known = sorted({f"{one.device} {one.kind} on vLLM {one.vllm}" for one in held})
    return (
        f"profile {profile.name} has no evidence on vLLM {release}, {device} (it has {', '.join(known) or 'none at all'}): "
        f"`vllm-compat validate` compares your model with a reference"
    )


def add_evidence(file: Path, entry: Evidence) -> None:
    """Write an entry into a profile's file, in the place of an older one of the same model, release, dtype and device.

    Everything above the first entry stays as it is; a comment between entries goes. Raises ProfileError for a bad file.
    """

    def subject(one: Evidence) -> tuple[str, ...]:
        return (one.model, one.engine, one.vllm, one.dtype, one.lm_head, one.device)

    kept = [one for one in read(file).evidence if subject(one) != subject(entry)]
    text = file.read_text(encoding="utf-8").partition("[[evidence]]")[0].rstrip() + "\n"
    for one in sorted([*kept, entry], key=subject):
        text += "\n[[evidence]]\n"
        for key, value in one.model_dump(mode="json", exclude_defaults=True).items():
            if key == "date":
                text += f"date = {value}\n"
            elif key == "metrics":
                text += "metrics = { " + ", ".join(f"{json.dumps(name)} = {number!r}" for name, number in value.items()) + " }\n"
            else:
                text += f"{key} = {json.dumps(value)}\n"  # JSON's texts, lists and truth values are TOML's
    draft = file.with_name(file.name + ".partial")
    draft.write_text(text, encoding="utf-8")
    read(draft)  # what cannot be read back is not put in the place of what could
    draft.replace(file)


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
