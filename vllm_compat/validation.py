"""
How far one recording is from another, in numbers; and whether that is within the bands of a profile.

A band is the reference's own noise floor times the profile's factor. A recording holds two floors:

    batch      its maker once more, one request at a time. What another order of the same sums changes.
    rounding   a maker in bfloat16 or float16 against the float32 recording that it was made ``--like``; a float32 trainer
               against itself in float64; a float32 engine against a trainer in float64 (`with_exact`). What its dtype
               changes. Two sides that both round differ by about sqrt(2) of one's floor. A batch floor alone says little of
               it: on a CPU the same rounding meets both batch sizes.

A batch floor below what float32 resolves counts as that resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_compat import metrics, recording
from vllm_compat.errors import RecordingError
from vllm_compat.recording import Recording

# Metric of a band -> the least floor. A float32 logprob of -8 nats has a spacing of 1e-6, and k3 is about half a square.
RESOLUTION: dict[str, float] = {
    "abs_dlogprob_mean": 1e-6,
    "abs_dlogprob_max": 1e-6,
    "distribution_abs_dlogprob_mean": 1e-6,
    "distribution_abs_dlogprob_max": 1e-6,
    "kl_rollout_trainer_k3": 5e-13,
    "ratio_outside_0.9_1.1": 0.0,
    "clip_rate": 0.0,
    "kept_by_one_side": 0.0,
}
MEANING: dict[str, str] = {
    "distribution_abs_dlogprob_mean": "mean |Δlogprob| over every token of every distribution",
    "distribution_abs_dlogprob_max": "max |Δlogprob| over every token of every distribution",
    "kept_by_one_side": "share of the listed tokens that one side's filters keep and the other's remove",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Two recordings compared. ``metrics`` are `metrics.mismatch` over the reference's tokens (trainer = reference,
    rollout = found), and those of ``MEANING``. ``rows`` has one (setting, prompt, kind, position, found, reference) a token,
    logprobs in nats."""

    metrics: dict[str, float]
    rows: list[tuple[int, int, str, int, float, float]]
    differences_by_setting: dict[str, dict[str, recording.Difference]]

    def differences(self) -> Any:
        """found - reference of each row's token, float32 [rows]; nan where a side removed it."""
        import numpy as np

        pairs = np.array([(row[4], row[5]) for row in self.rows], dtype=np.float64)
        with np.errstate(invalid="ignore"):
            gap = pairs[:, 0] - pairs[:, 1]
        return np.where(np.isfinite(gap), gap, np.nan).astype(np.float32)


def measure(found: Recording, reference: Recording) -> Measured:
    """Compare two recordings. Raises RecordingError where they are not of the same experiment and weights."""
    by_setting = recording.compare(found, reference)
    rows: list[tuple[int, int, str, int, float, float]] = []
    sequences: dict[tuple[int, int, str], list[tuple[float, float]]] = {}
    for row in recording.rows(found, reference):
        if row.index < 0:
            continue
        a, b = float(row.found[row.index]), float(row.reference[row.index])
        rows.append((row.setting, row.prompt, row.kind, row.position, a, b))
        sequences.setdefault((row.setting, row.prompt, row.kind), []).append((min(a, 0.0), min(b, 0.0)))
    pairs = list(sequences.values())
    numbers = metrics.mismatch([[a for a, _ in row] for row in pairs], [[b for _, b in row] for row in pairs])
    gaps = [gap for kinds in by_setting.values() for gap in kinds.values()]
    count, lonely = sum(gap.count for gap in gaps), sum(gap.support for gap in gaps)
    numbers["distribution_abs_dlogprob_mean"] = sum(gap.total for gap in gaps) / count
    numbers["distribution_abs_dlogprob_max"] = max(gap.max for gap in gaps)
    numbers["kept_by_one_side"] = lonely / (count + lonely)
    return Measured(numbers, rows, by_setting)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One band: ``value`` is held where it is at most ``limit``, the greater of ``batch`` and ``rounding`` factor times the
    reference's floor of that name."""

    metric: str
    value: float
    batch_floor: float
    rounding_floor: float | None
    batch: float
    rounding: float

    @property
    def limit(self) -> float:
        """The band's upper end."""
        limit = self.batch * max(self.batch_floor, RESOLUTION[self.metric])
        return limit if self.rounding_floor is None else max(limit, self.rounding * self.rounding_floor)

    @property
    def held(self) -> bool:
        """Whether the value is in the band; nan is not."""
        return self.value <= self.limit


def judge(measured: Mapping[str, float], reference: Recording, bands: Mapping[str, tuple[float, float]]) -> list[Verdict]:
    """One verdict a band. bands: metric of ``RESOLUTION`` -> factors of the batch and of the rounding floor."""
    floors = reference.header["floor"]
    if floors is None:
        raise RecordingError("the reference was recorded with --no-floor, and a band is a multiple of its floor: record it again")
    rounding = floors["rounding"]
    return [
        Verdict(name, measured[name], floors["batch"][name], rounding and rounding[name], batch, factor)
        for name, (batch, factor) in bands.items()
    ]


def with_exact(reference: Recording, exact: Recording) -> Recording:
    """The reference with a rounding floor: its distance to a float64 recording of the same experiment and weights.

    Raises RecordingError where ``exact`` is not that, or the reference has a rounding floor already.
    """
    made = exact.header["made_by"]
    if made["dtype"] != "float64":
        raise RecordingError(
            f"the exact recording is {made['dtype']}: want `record --engine trainer --dtype float64 --like` the reference"
        )
    floors = reference.header["floor"]
    if floors["rounding"] is not None:
        raise RecordingError("the reference has a rounding floor of its own: leave --exact out")
    return Recording({**reference.header, "floor": {**floors, "rounding": measure(reference, exact).metrics}}, reference.tensors)


def same_head(found: Recording, reference: Recording) -> None:
    """Raises RecordingError where one side has a float32 lm_head and the other has not: that is worse than none."""
    ours, theirs = (side.header["made_by"]["lm_head"] for side in (found, reference))
    if ours != theirs:
        raise RecordingError(
            f"one-sided float32 lm_head: the engine's logits are {ours}, the reference's {theirs}. A float32 head on one side "
            f"only makes the mismatch worse than none. Give both the same: record the reference again (--head for a trainer, "
            f"--profile auto for an engine), or switch fp32_lm_head off here (VLLM_COMPAT_FP32_LM_HEAD=0)"
        )


def head_dtype(dtype: str, status: list[dict[str, Any]], llm: Any) -> str:
    """What an engine's logits are rounded to: float32, or the model's dtype."""
    if dtype == "float32":
        return dtype
    if status:
        state = status[0]["behaviors"]["fp32_lm_head"]["state"]
        return "float32" if state in ("native", "applied", "exercised") else dtype
    # Honored from vLLM 0.26.0 on; before, the attribute is missing or means a pooling model's head.
    from vllm_compat import vllm_info
    from vllm_compat.resolve import within

    installed = vllm_info.installed()
    if installed is None or not within(installed.release, ">=0.26.0"):
        return dtype
    return str(llm.llm_engine.vllm_config.model_config.head_dtype).removeprefix("torch.")


def significant(value: float, digits: int = 3) -> float:
    """For a file: as many digits as mean something."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value
