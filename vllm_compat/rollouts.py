"""
What `diagnose` reads: sequences of token ids with the logprobs that the rollout returned and the trainer computed.

One sequence a row, as JSONL, or as Parquet, Arrow or Feather (needs pyarrow) with the same columns:

    prompt_ids             token ids of the prompt
    token_ids              token ids after it
    rollout_logprobs       nats, one for each of token_ids, as the engine returned them
    trainer_logprobs       nats, one for each of token_ids, as the trainer scored them
    sampling_params        the request's, with vLLM's names; or given once for all rows
    rollout_version        optional: the weights that sampled: an int, or one for each of token_ids
    trainer_version        optional: the weights that the trainer scored with, an int
    mask                   optional: 1 where a token was sampled; other places may hold null logprobs
    top_logprobs           optional: for each of token_ids the engine's top-n, {id: logprob} or [[id, logprob], ...]
    trainer_top_logprobs   optional: the trainer's
    engine                 optional: the name of the engine or replica that sampled

Other columns are not looked at. Needs nothing but the standard library for JSONL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_compat.errors import InputError

_ARROW = (".parquet", ".arrow", ".feather", ".ipc")
# How much above 0 a logprob may be by rounding, as in `metrics`.
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sequence. Logprobs are in nats, -inf for a token that a side does not keep; nan where the mask is False."""

    where: str  # file and row, for messages
    prompt_ids: list[int]
    token_ids: list[int]
    rollout_logprobs: list[float]
    trainer_logprobs: list[float]
    sampling_params: dict[str, Any]
    mask: list[bool]
    rollout_version: list[int] | None = None  # one for each of token_ids
    trainer_version: int | None = None
    top_logprobs: list[dict[int, float]] | None = None
    trainer_top_logprobs: list[dict[int, float]] | None = None
    engine: str | None = None


def read(files: Sequence[Path], sampling_params: Mapping[str, Any] | None = None) -> list[Rollout]:
    """All rows of all files, in order. ``sampling_params`` is for rows that have none of their own.

    Raises InputError with file, row and field for the first thing that is not as the module says, and where no row is.
    """
    found = [rollout(row, where, sampling_params) for file in files for where, row in _rows(file)]
    if not found:
        raise InputError(f"{', '.join(map(str, files))}: no row: one sequence a row is wanted")
    return found


def rollout(row: Mapping[str, Any], where: str, sampling_params: Mapping[str, Any] | None = None) -> Rollout:
    """One row, checked. ``where`` is its place for messages. Raises InputError."""
    prompt, tokens = _ids(row, "prompt_ids", where), _ids(row, "token_ids", where)
    if not prompt or not tokens:
        raise _wrong(where, "token_ids" if prompt else "prompt_ids", "is empty: want at least one token id")
    count = len(tokens)
    mask = [True] * count
    if row.get("mask") is not None:
        values = _listed(row, "mask", where, count)
        if any(value not in (0, 1) for value in values):
            raise _wrong(where, "mask", "holds something other than 0 and 1")
        mask = [bool(value) for value in values]
    params = row.get("sampling_params")
    if isinstance(params, str):
        try:
            params = json.loads(params)
        except ValueError:
            raise _wrong(where, "sampling_params", "is text, but no JSON") from None
    if params is None:
        params = sampling_params
    if not isinstance(params, Mapping):
        raise _wrong(where, "sampling_params", f"is {_kind(params)}: want an object with vLLM's names, or --sampling-params")
    version, trainer_version = row.get("rollout_version"), row.get("trainer_version")
    if version is not None:
        version = [version] * count if _is_int(version) else _listed(row, "rollout_version", where, count)
        if not all(map(_is_int, version)):
            raise _wrong(where, "rollout_version", "want an int, or one int for each of token_ids")
    if trainer_version is not None and not _is_int(trainer_version):
        raise _wrong(where, "trainer_version", f"is {_kind(trainer_version)}: want an int")
    return Rollout(
        where=where,
        prompt_ids=prompt,
        token_ids=tokens,
        rollout_logprobs=_logprobs(row, "rollout_logprobs", where, mask),
        trainer_logprobs=_logprobs(row, "trainer_logprobs", where, mask),
        sampling_params={key: value for key, value in params.items() if value is not None},
        mask=mask,
        rollout_version=version,
        trainer_version=trainer_version,
        top_logprobs=_tops(row, "top_logprobs", where, count),
        trainer_top_logprobs=_tops(row, "trainer_top_logprobs", where, count),
        engine=None if row.get("engine") is None else str(row["engine"]),
    )


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not file.is_file():
        raise InputError(f"{file}: there is no such file")
    if file.suffix in _ARROW:
        yield from ((f"{file} row {i}", row) for i, row in enumerate(_arrow(file), 1))
        return
    with file.open("rb") as lines:
        for i, line in enumerate(lines, 1):
            where = f"{file} line {i}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: no JSON ({error}): want one object a line") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: is {_kind(row)}: want one object a line")
            yield where, row


def _arrow(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.feather
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file}: reading it needs pyarrow: pip install pyarrow, or give JSONL") from None
    try:
        if file.suffix == ".parquet":
            table = pyarrow.parquet.read_table(file)
        elif file.read_bytes()[:6] == b"ARROW1":  # the file format, which Feather is too
            table = pyarrow.feather.read_table(file)
        else:
            with file.open("rb") as stream:
                table = pyarrow.ipc.open_stream(stream).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: not a {file.suffix} file: {error}") from None
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def _wrong(where: str, field: str, what: str) -> InputError:
    return InputError(f"{where}: {field} {what}")


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(row: Mapping[str, Any], field: str, where: str, count: int | None) -> list[Any]:
    values = row.get(field)
    if not isinstance(values, list):
        raise _wrong(where, field, f"is {_kind(values)}: want a list")
    if count is not None and len(values) != count:
        raise _wrong(where, field, f"has {len(values)} values, token_ids {count}: want one for each")
    return values


def _ids(row: Mapping[str, Any], field: str, where: str) -> list[int]:
    values = _listed(row, field, where, None)
    if not all(_is_int(value) and value >= 0 for value in values):
        raise _wrong(where, field, "holds something that is no token id: want ints from 0 on")
    return values


def _logprobs(row: Mapping[str, Any], field: str, where: str, mask: list[bool]) -> list[float]:
    values = _listed(row, field, where, len(mask))
    return [_logprob(value, field, where, at) if keep else math.nan for at, (value, keep) in enumerate(zip(values, mask))]


def _logprob(value: Any, field: str, where: str, at: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise _wrong(
            where, field, f"at token {at} is {'nan' if isinstance(value, float) else _kind(value)}: want a logprob in nats"
        )
    if value > _ROUNDING:
        raise _wrong(where, field, f"at token {at} is {value:.4g}, above 0: want natural logarithms of probabilities")
    return float(value)


def _tops(row: Mapping[str, Any], field: str, where: str, count: int) -> list[dict[int, float]] | None:
    if row.get(field) is None:
        return None
    found = []
    for at, top in enumerate(_listed(row, field, where, count)):
        pairs = [] if top is None else list(top.items()) if isinstance(top, Mapping) else top
        try:
            found.append({int(token): _logprob(value, field, where, at) for token, value in pairs})
        except (TypeError, ValueError):
            raise _wrong(where, field, f"at token {at}: want {{id: logprob}} or [[id, logprob], ...]") from None
    return found
