"""
The pictures of a validation, as SVG text for an HTML page: they use its style sheet's classes, and nothing from outside.

Every function takes a part of `vllm_compat.validation_report.build`'s data. All of them draw something sensible where every
difference is 0 or nothing is there to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vllm_compat.recording import KINDS, UNDERFLOW

MOST_POINTS = 5000  # of the scatter: the file stays small
_WIDTH, _HEIGHT = 720, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 14, 50
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Tick = tuple[float, str]  # where, from 0 to 1 of the axis, and its label
Place = Callable[[float], float]  # a value's place, from 0 to 1 of the axis


def number(value: Any) -> str:
    """Three significant digits, for people; JSON's null and "inf" too."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value == 0:
        return "0"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def power(exponent: int) -> str:
    """10ⁿ; 0.01 to 100 are written out."""
    return f"{10.0**exponent:g}" if -2 <= exponent <= 2 else "10" + str(exponent).translate(_SUPERSCRIPT)


def even(least: float, most: float, count: int = 6) -> list[float]:
    """About ``count`` round values from ``least`` to ``most``."""
    span = (most - least) or 1.0
    size: float = 10.0 ** math.floor(math.log10(span / count))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= count)
    first = math.ceil(least / step - 1e-9)
    return [step * k for k in range(first, math.floor(most / step + 1e-9) + 1)]


class Frame:
    """One picture: axes with ticks, grid and names; what is added is drawn inside them. Data come in places from 0 to 1."""

    def __init__(
        self, title: str, x: tuple[str, Sequence[Tick]], y: tuple[str, Sequence[Tick]], width: int = _WIDTH, height: int = _HEIGHT
    ) -> None:
        self._size = width, height
        self._x0, self._x1, self._y0, self._y1 = _LEFT, width - _RIGHT, height - _BOTTOM, _TOP
        self._parts = [
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        ]
        for at, label in x[1]:
            here = self.x(at)
            self._parts.append(f'<line class="grid" x1="{here}" x2="{here}" y1="{self._y0}" y2="{self._y1}"/>')
            self._parts.append(f'<text x="{here}" y="{self._y0 + 18}" text-anchor="middle">{escape(label)}</text>')
        for at, label in y[1]:
            here = self.y(at)
            self._parts.append(f'<line class="grid" x1="{self._x0}" x2="{self._x1}" y1="{here}" y2="{here}"/>')
            self._parts.append(f'<text x="{self._x0 - 8}" y="{here + 4}" text-anchor="end">{escape(label)}</text>')
        middle, center = (self._x0 + self._x1) / 2, (self._y0 + self._y1) / 2
        self._parts.append(f'<text class="name" x="{middle}" y="{height - 10}" text-anchor="middle">{escape(x[0])}</text>')
        turned = f'transform="rotate(-90 16 {center})" text-anchor="middle"'
        self._parts.append(f'<text class="name" x="16" y="{center}" {turned}>{escape(y[0])}</text>')

    def x(self, place: float) -> float:
        """Pixels from the left."""
        return round(self._x0 + place * (self._x1 - self._x0), 1)

    def y(self, place: float) -> float:
        """Pixels from the top."""
        return round(self._y0 + place * (self._y1 - self._y0), 1)

    def rectangle(self, css: str, left: float, right: float, bottom: float, top: float, tip: str = "") -> None:
        """A filled area; ``tip`` is shown by a mouse that rests on it."""
        x0, x1, y0, y1 = self.x(left), self.x(right), self.y(bottom), self.y(top)
        shape = f'<rect class="{css}" x="{x0}" y="{y1}" width="{round(x1 - x0, 1)}" height="{round(y0 - y1, 1)}"'
        self._parts.append(f"{shape}><title>{escape(tip)}</title></rect>" if tip else f"{shape}/>")

    def line(self, css: str, places: Iterable[tuple[float, float]]) -> None:
        """Places joined by a line; with one of them, a short dash."""
        points = [(self.x(a), self.y(b)) for a, b in places]
        if len(points) == 1:
            (a, b), points = points[0], []
            points = [(a - 8, b), (a + 8, b)]
        if points:
            self._parts.append(f'<polyline class="{css}" points="{" ".join(f"{a},{b}" for a, b in points)}"/>')

    def points(self, css: str, places: Iterable[tuple[float, float]]) -> None:
        """A dot at each place, in one path: strokes of no length with round ends."""
        path = "".join(f"M{self.x(a)} {self.y(b)}h0" for a, b in places)
        if path:
            self._parts.append(f'<path class="{css}" d="{path}"/>')

    def text(self, at: tuple[float, float], words: str, anchor: str = "start", css: str = "") -> None:
        """Words at a place."""
        self._parts.append(
            f'<text class="{css}" x="{self.x(at[0])}" y="{self.y(at[1])}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def svg(self) -> str:
        """The picture."""
        return "".join(self._parts) + "</svg>"


def _counts(most: int) -> tuple[Place, list[Tick]]:
    """A logarithmic axis of counts that starts below 1, so that 1 is seen and 0 is not."""
    low, high = math.log10(0.6), math.log10(max(most, 10) * 1.3)

    def place(count: float) -> float:
        return (math.log10(count) - low) / (high - low) if count else 0.0

    return place, [(place(10**k), power(k) if k > 2 else str(10**k)) for k in range(math.floor(high) + 1)]


def histogram(data: Mapping[str, Any]) -> str:
    """Counts of Δ: found filled, the floor as an outline. Both axes are logarithmic, with 0 in the middle."""
    bars, floor, per = data["found"], data["floor"], data["per_decade"]
    count, side = len(bars), (len(bars) - 1) // 2
    place, marks = _counts(max([*bars, *floor]))
    every = 1 if data["high"] - data["low"] <= 6 else 2
    ticks: list[Tick] = [((side + 0.5) / count, "0")]
    for k in range(data["low"], data["high"] + 1):
        if (data["high"] - k) % every == 0 and k > data["low"]:
            steps = (k - data["low"]) * per
            ticks += [((side + 1 + steps) / count, power(k)), ((side - steps) / count, "−" + power(k))]
    frame = Frame("histogram of Δ", ("Δ = found − reference [nats]", ticks), ("tokens", marks))
    edges = data["edges"]
    for i, bar in enumerate(bars):
        if i == side:
            what = f"|Δ| < {number(edges[0])}"
        else:
            k = abs(i - side)
            sign = "−" if i < side else ""
            what = f"Δ from {sign}{number(edges[k - 1])} to {sign}{number(edges[k])}"
        if bar:
            tip = f"{what}: {bar} tokens, floor {floor[i]}"
            frame.rectangle("found", (i + 0.06) / count, (i + 0.94) / count, 0, place(bar), tip)
    outline = [(0.0, 0.0)]
    for i, bar in enumerate(floor):
        outline += [(i / count, place(bar)), ((i + 1) / count, place(bar))]
    frame.line("floor", outline)
    return frame.svg()


def thinned(rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """At most `MOST_POINTS` rows, the same ones every time: those with the greatest |Δ|, and every k-th of the rest."""
    if len(rows) <= MOST_POINTS:
        return list(rows)

    def size(i: int) -> float:
        found, reference = (_value(one) for one in rows[i][4:6])
        return 0.0 if found == reference else abs(found - reference)

    order = sorted(range(len(rows)), key=lambda i: (-size(i), i))
    worst = MOST_POINTS // 5
    rest = sorted(order[worst:])
    step = math.ceil(len(rest) / (MOST_POINTS - worst))
    return [rows[i] for i in sorted([*order[:worst], *rest[::step]])]


def _value(logprob: Any) -> float:
    """JSON's "-inf" as a number."""
    return float(logprob)


def scatter(rows: Sequence[Sequence[Any]], *, probability: bool) -> str:
    """found over reference, with the diagonal, of rows as in ``rows.values``; as logprobs, or as probabilities.

    Left out are tokens that both sides removed, or that one removed and the other has below what float32 can hold. Another
    token that only one side removed lies on the edge, in its own color.
    """
    pairs = [(row[2], _value(row[5]), _value(row[4])) for row in rows]
    pairs = [(kind, a, b) for kind, a, b in pairs if math.isfinite(min(a, b)) or max(a, b) > UNDERFLOW]
    alone = [math.isinf(a) != math.isinf(b) for _, a, b in pairs]
    if probability:
        least, most, unit = 0.0, 1.0, "probability"
        pairs = [(kind, math.exp(min(a, 0.0)), math.exp(min(b, 0.0))) for kind, a, b in pairs]
    else:
        finite = [value for _, a, b in pairs for value in (a, b) if math.isfinite(value)]
        least, most, unit = min([*finite, -1.0]), 0.0, "logprob [nats]"
        least -= 0.03 * (most - least)

    def place(value: float) -> float:
        return min(max((value - least) / (most - least), 0.0), 1.0)

    values = even(least, most, 6)
    ticks = [(place(value), f"{value:g}".replace("-", "−")) for value in values]
    frame = Frame(f"{unit} of found over reference", (f"reference: {unit}", ticks), (f"found: {unit}", ticks), 470, 430)
    frame.line("diagonal", [(0, 0), (1, 1)])
    for kind in KINDS:
        inside = [(place(a), place(b)) for (which, a, b), one in zip(pairs, alone) if which == kind and not one]
        frame.points(f"dot {kind}", inside)
    frame.points("dot lonely", [(place(a), place(b)) for (_, a, b), one in zip(pairs, alone) if one])
    return frame.svg()


def drift(positions: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Mean (line) and 95th percentile (dashes) of |Δ| by position, found and floor. Logarithmic, with 0 at the bottom."""
    here = [one for one in positions if one["kind"] == kind and one["count"]]
    series = {
        "found": [(one["position"], one["mean"], one["p95"]) for one in here],
        "floor": [(one["position"], one["floor"]["mean"], one["floor"]["p95"]) for one in here if one["floor"]["count"]],
    }
    sizes = [size for values in series.values() for _, *both in values for size in both if size]
    low, high = (math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))) if sizes else (-7, -5)
    high = max(high, low + 1)
    pad = 0.1  # below the least power of ten: 0

    def place(size: float) -> float:
        return 0.0 if size < 10.0**low * 0.999 else pad + (1 - pad) * (math.log10(size) - low) / (high - low)

    last = max([one["position"] for one in here], default=0)

    def along(position: float) -> float:
        return 0.5 if not last else 0.02 + 0.96 * position / last

    every = 1 if high - low <= 6 else 2
    marks = [(0.0, "0"), *((place(10.0**k), power(k)) for k in range(high, low - 1, -every))]
    ticks = [(along(value), f"{value:g}") for value in even(0, last, 8) if value == int(value)]
    frame = Frame(f"|Δ| by position, {kind} rows", ("position", ticks), ("|Δ| [nats]", marks), 470, 300)
    for css in ("floor", "found"):
        frame.line(f"{css} line", [(along(k), place(mean)) for k, mean, _ in series[css]])
        frame.line(f"{css} line dashed", [(along(k), place(p95)) for k, _, p95 in series[css]])
    return frame.svg()


def ratios(data: Mapping[str, Any]) -> str:
    """The sorted ratios, found and floor, over the bands [0.9, 1.1] and [0.8, 1.2]."""
    curves = {side: [(q, _value(r)) for q, r in data[side]["curve"]] for side in ("floor", "found")}
    finite = [r for curve in curves.values() for _, r in curve if 0 < r < math.inf]
    least, most = max(0.05, min([*finite, 0.72]) * 0.97), min(20.0, max([*finite, 1.36]) * 1.03)

    def place(ratio: float) -> float:
        return (math.log(min(max(ratio, least), most)) - math.log(least)) / (math.log(most) - math.log(least))

    wide = math.log(most / least)  # where the whole axis is far wider than the bands, their labels would lie on each other
    labels = [0.05, 0.1, 0.2, 0.5, *([0.8, 1.2] if wide < 3 else []), *([0.9, 1.1] if wide < 1.5 else []), 1, 2, 5, 10, 20]
    marks = [(place(value), f"{value:g}") for value in labels if least <= value <= most]
    name = "ratio, reference / found" + ("" if least > 0.05 and most < 20 else " (cut)")
    ticks = [(share / 100, f"{share} %") for share in range(0, 101, 20)]
    frame = Frame("sorted ratios", ("share of tokens with a smaller ratio", ticks), (name, marks))
    frame.rectangle("band outer", 0, 1, place(0.8), place(1.2))
    frame.rectangle("band inner", 0, 1, place(0.9), place(1.1))
    if wide < 1.5:
        frame.text((0.01, place(1.13)), "[0.8, 1.2]", css="small")
        frame.text((0.01, place(1.04)), "[0.9, 1.1]", css="small")
    for css, curve in curves.items():
        frame.line(f"{css} line", [(q, place(r)) for q, r in curve])
    return frame.svg()


# From light to dark in even steps of lightness: readable without telling colors apart. 1e-7 nats and less, to 1 and more.
_SCALE = ((247, 251, 255), (198, 219, 239), (133, 188, 220), (66, 146, 198), (24, 100, 170), (8, 48, 107))
_LIGHT, _DARK = -7, 0


def shade(size: Any) -> str:
    """The heat map's style of a cell: a color by log10 |Δ|, and a readable text color on it."""
    if size is None:
        return ""
    value = _value(size)
    where = 0.0 if value <= 0 else 1.0 if math.isinf(value) else (math.log10(value) - _LIGHT) / (_DARK - _LIGHT)
    where = min(max(where, 0.0), 1.0) * (len(_SCALE) - 1)
    k = min(int(where), len(_SCALE) - 2)
    color = [round(a + (b - a) * (where - k)) for a, b in zip(_SCALE[k], _SCALE[k + 1])]
    return f"background:rgb({','.join(map(str, color))});color:{'#fff' if where > 2.6 else '#111'}"


def heat_map(cells: Sequence[Mapping[str, Any]]) -> str:
    """Setting by kind: mean and max |Δ| in log color, and how many tokens only one side keeps. A table: it can be read."""
    by: dict[str, dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        by.setdefault(cell["setting"], {})[cell["kind"]] = cell
    head = "".join(f'<th colspan="2" scope="colgroup">{kind}</th>' for kind in KINDS)
    columns = '<th scope="col">mean</th><th scope="col">max</th>'
    rows = [f'<thead><tr><th rowspan="2" scope="col">setting</th>{head}</tr><tr>{columns * len(KINDS)}</tr></thead><tbody>']
    for setting, kinds in by.items():
        row = ""
        for kind in KINDS:
            found = kinds.get(kind)
            if not found or not found["distributions"]:
                row += '<td class="none">·</td><td class="none">·</td>'
                continue
            lonely = found["kept_by_one_side"]
            more = f' <b title="{lonely} tokens are kept by one side only">+{lonely}</b>' if lonely else ""
            tip = f"{found['distributions']} distributions, {found['tokens']} tokens, {found['diverged']} steps left out"
            row += (
                f'<td style="{shade(found["mean"])}" title="{tip}">{number(found["mean"])}</td>'
                f'<td style="{shade(found["max"])}" title="{tip}">{number(found["max"])}{more}</td>'
            )
        rows.append(f'<tr><th scope="row">{escape(setting)}</th>{row}</tr>')
    legend = "".join(f'<span style="{shade(10.0**k)}">{power(k)}</span>' for k in range(_LIGHT, _DARK + 1))
    return (
        f'<div class="scroll"><table class="heat">{"".join(rows)}</tbody></table></div>'
        f'<p class="legend"><span style="{shade(0)}">0</span>{legend} nats</p>'
    )
