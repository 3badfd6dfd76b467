"""
A validation as data: everything that `vllm_compat.html_report` shows and ``report.json`` holds, and nothing else.

Throughout, Δ = found - reference, the logprobs of the reference's token in nats, at each place where both keep it. The
ratio is exp(-Δ) = p_reference / p_found, the importance ratio of a trainer that computes what the reference computed. The
floor is the reference's batch floor: its maker at batch size 1 minus its maker in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_compat import metrics, recording, validation
from vllm_compat.errors import RecordingError
from vllm_compat.recording import KINDS, Recording

FORMAT, VERSION = "vllm_compat.validation", 1
_QUANTILES = (("p50", 0.50), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
_LEAST = -9  # decades of |Δ| below 1e-9 nats are shown as 0
_CURVE = 401  # points of the ratio's quantile curve


def build(
    found: Recording,
    reference: Recording,
    measured: validation.Measured,
    verdicts: Sequence[validation.Verdict],
    profile: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The report's data: JSON types only; nan is null, infinite values are "inf" and "-inf", a removed token is null.

    ``profile`` is the one whose bands were used; ``notes`` is what the reader must know about this run.
    """
    import numpy as np

    pairs = np.array([row[4:] for row in measured.rows], dtype=np.float64)
    gone: Any = np.isneginf(pairs)
    lonely: Any = gone.any(1) & (pairs.max(1) > recording.UNDERFLOW)
    both = ~gone.any(1)
    gaps = (pairs[both, 0] - pairs[both, 1]).astype(np.float64)
    floor = reference.tensors["floor"].astype(np.float64)
    floor = floor[np.isfinite(floor)]
    floors = reference.header["floor"]
    data = {
        "format": FORMAT,
        "version": VERSION,
        "held": all(verdict.held for verdict in verdicts),
        "failed": [verdict.metric for verdict in verdicts if not verdict.held],
        "profile": profile,
        "notes": list(notes),
        "found": _side(found),
        "reference": _side(reference),
        "bands": [_band(verdict) for verdict in verdicts],
        "metrics": [
            {
                "name": name,
                "formula": metrics.FORMULAS.get(name) or validation.MEANING[name],
                "value": measured.metrics[name],
                "batch_floor": floors["batch"].get(name),
                "rounding_floor": (floors["rounding"] or {}).get(name),
            }
            for name in measured.metrics
        ],
        "settings": _settings(measured),
        "worst": _worst(measured, reference),
        "removed": {
            "found": int((gone[:, 0] & lonely).sum()),
            "reference": int((gone[:, 1] & lonely).sum()),
            "both": int((gone.any(1) & ~lonely).sum()),  # or the only one that keeps it has less than float32 can hold
        },
        "quantiles": {"found": _quantiles(gaps), "floor": _quantiles(floor)},
        "histogram": _histogram(gaps, floor),
        "positions": _positions(measured, reference),
        "ratio": {"found": _ratio(gaps), "floor": _ratio(floor)},
        "rows": {
            "columns": ["setting", "prompt", "kind", "position", "found", "reference"],
            "values": [list(row) for row in measured.rows],
        },
    }
    plain: dict[str, Any] = _plain(data)
    return plain


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _side(one: Recording) -> dict[str, Any]:
    model = one.header["model"]
    return {
        "model": model["name"],
        "weights_sha256": model["weights_sha256"],
        "checksum": one.checksum(),
        "settings": len(one.settings),
        "prompts": len(one.prompts),
        "top_n": one.experiment["top_n"],
        "vocab": one.experiment["vocab"],
        "made_by": one.header["made_by"],
    }


def _band(verdict: validation.Verdict) -> dict[str, Any]:
    return {
        "metric": verdict.metric,
        "formula": metrics.FORMULAS.get(verdict.metric) or validation.MEANING[verdict.metric],
        "value": verdict.value,
        "limit": verdict.limit,
        "held": verdict.held,
        "batch_factor": verdict.batch,
        "batch_floor": verdict.batch_floor,
        "resolution": validation.RESOLUTION[verdict.metric],
        "rounding_factor": verdict.rounding,
        "rounding_floor": verdict.rounding_floor,
    }


def _settings(measured: validation.Measured) -> list[dict[str, Any]]:
    """One entry a cell of the heat map: over every token of every distribution, not only the reference's."""
    return [
        {
            "setting": name,
            "kind": kind,
            "distributions": gap.rows,
            "tokens": gap.count,
            "mean": gap.mean,
            "max": gap.max,
            "kept_by_one_side": gap.support,
            "diverged": gap.diverged,
            "unlisted": gap.unlisted,
        }
        for name, kinds in measured.differences_by_setting.items()
        for kind, gap in kinds.items()
    ]


def _worst(measured: validation.Measured, reference: Recording) -> list[dict[str, Any]]:
    """Each setting's and kind's row with the greatest |Δ|; a token that one side removed is farther than any number."""
    worst: dict[tuple[int, str], tuple[float, float, tuple[int, int, str, int, float, float]]] = {}
    for row in measured.rows:
        s, _, kind, _, a, b = row
        # of removed tokens, the most probable is the worst; less than float32 can hold is no probability
        size = 0.0 if a == b or (math.inf in (-a, -b) and max(a, b) <= recording.UNDERFLOW) else abs(a - b)
        entry = (size, max(a, b), row)
        if (s, kind) not in worst or entry[:2] > worst[s, kind][:2]:
            worst[s, kind] = entry
    names = reference.settings
    return [
        {"setting": names[s], "prompt": p, "kind": kind, "position": k, "found": a, "reference": b, "size": size}
        for size, _, (s, p, kind, k, a, b) in sorted(worst.values(), key=lambda one: one[:2], reverse=True)
    ]


def _quantiles(gaps: Any) -> dict[str, float]:
    import numpy as np

    if not len(gaps):
        return {}
    size = np.abs(gaps)
    return {"mean": float(size.mean()), **{name: float(np.quantile(size, q)) for name, q in _QUANTILES}}


def _histogram(gaps: Any, floor: Any) -> dict[str, Any]:
    """Counts of Δ in bins that are even in log |Δ|: negative from large to small, one around 0, positive. ``edges`` are
    those of the positive side, ascending; the bin around 0 is |Δ| below the first."""
    import numpy as np

    sizes = np.abs(np.concatenate([gaps, floor]))
    sizes = sizes[sizes > 0]
    low, high = (math.floor(math.log10(sizes.min())), math.ceil(math.log10(sizes.max()) + 1e-12)) if len(sizes) else (-7, -5)
    low, high = max(low, _LEAST), max(high, _LEAST + 1)
    low = min(low, high - 2)
    per_decade = 4 if high - low <= 5 else 3
    edges = 10.0 ** (low + np.arange((high - low) * per_decade + 1) / per_decade)

    def counts(values: Any) -> list[int]:
        inner = [values[(values >= 0) == positive] for positive in (False, True)]
        sides = [np.histogram(np.abs(one), edges)[0] for one in inner]
        # rounding at the last edge loses nobody
        for one, side in zip(inner, sides):
            side[-1] += int((np.abs(one) > edges[-1]).sum())
        return [*map(int, sides[0][::-1]), int((np.abs(values) < edges[0]).sum()), *map(int, sides[1])]

    return {
        "low": low,
        "high": high,
        "per_decade": per_decade,
        "edges": edges.tolist(),
        "found": counts(gaps),
        "floor": counts(floor),
    }


def _positions(measured: validation.Measured, reference: Recording) -> list[dict[str, Any]]:
    """|Δ| by kind of row and position, with the floor's."""
    import numpy as np

    found: dict[tuple[str, int], list[float]] = {}
    for (_, _, kind, position, *_), gap in zip(measured.rows, measured.differences().tolist()):
        found.setdefault((kind, position), []).append(abs(gap))
    floor: dict[tuple[str, int], list[float]] = {}
    places = [(row.kind, row.position) for row in recording.rows(reference, reference) if row.index >= 0]
    if len(places) != len(reference.tensors["floor"]):
        raise RecordingError("the reference's floor has not one value for each of its rows: record it again")
    for place, gap in zip(places, reference.tensors["floor"].tolist()):
        floor.setdefault(place, []).append(abs(gap))

    def numbers(values: Sequence[float]) -> dict[str, Any]:
        kept: Any = np.array(values, dtype=np.float64)
        kept = kept[np.isfinite(kept)]
        if not len(kept):
            return {"count": 0, "mean": None, "p95": None, "max": None}
        return {
            "count": len(kept),
            "mean": float(kept.mean()),
            "p95": float(np.quantile(kept, 0.95)),
            "max": float(kept.max()),
        }

    return [
        {
            "kind": kind,
            "position": position,
            **numbers(values),
            "floor": {name: number for name, number in numbers(floor.get((kind, position), ())).items() if name != "max"},
        }
        for (kind, position), values in sorted(found.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
    ]


def _ratio(gaps: Any) -> dict[str, Any]:
    """exp(-Δ): shares inside the two bands, and the quantile curve as [share, ratio] pairs."""
    import numpy as np

    if not len(gaps):
        return {"inside_0.9_1.1": None, "inside_0.8_1.2": None, "curve": []}
    with np.errstate(over="ignore"):
        ratios = np.exp(-gaps)
    shares: Any = np.linspace(0, 1, min(_CURVE, max(2, len(ratios))))
    sorted_ratios: Any = np.quantile(ratios, shares, method="nearest")
    return {
        "inside_0.9_1.1": float(((ratios >= 0.9) & (ratios <= 1.1)).mean()),
        "inside_0.8_1.2": float(((ratios >= 0.8) & (ratios <= 1.2)).mean()),
        "curve": [list(pair) for pair in zip(shares.tolist(), sorted_ratios.tolist())],
    }
