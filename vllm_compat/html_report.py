"""A validation as one HTML file that needs nothing else: the verdict, the pictures people look at first, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vllm_compat import pictures
from vllm_compat.pictures import number
from vllm_compat.recording import KINDS

# Blue, orange and green of M. Okabe and K. Ito, "Color Universal Design" (2008); lighter ones on dark. Nothing is told by
# color alone: the floor is an outline or gray, percentiles are dashed, a verdict is a word.
_STYLE = """
:root{--bg:#fff;--fg:#1b1b1b;--muted:#5a5a5a;--grid:#e3e3e3;--found:#0072b2;--floor:#6f6f6f;--bad:#b3261e;--ok:#00664b;
--sampled:#0072b2;--prompt:#c77700;--prefix:#009e73;--lonely:#b3261e;--outer:#e9f1f7;--inner:#cfe3f1;--card:#f6f6f6}
@media (prefers-color-scheme:dark){:root{--bg:#15181b;--fg:#e8e8e8;--muted:#a9a9a9;--grid:#31363b;--found:#56b4e9;
--floor:#b0b0b0;--bad:#ff8a7a;--ok:#5fd3ac;--sampled:#56b4e9;--prompt:#e69f00;--prefix:#3fd0a0;--lonely:#ff8a7a;
--outer:#1d2833;--inner:#263c4f;--card:#1e2226}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:64rem;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.3rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .3rem}p{margin:.4rem 0}
.verdict{display:inline-block;padding:.15rem .7rem;border-radius:.4rem;border:2px solid;font-weight:700}
.ok{color:var(--ok)}.bad{color:var(--bad)}.muted,.read{color:var(--muted)}.read{max-width:46rem}
.note{border-left:4px solid var(--prompt);padding:.2rem .7rem;background:var(--card)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.87rem;margin:.5rem 0}
th,td{text-align:left;padding:.22rem .6rem;border-bottom:1px solid var(--grid);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.wide{overflow-wrap:anywhere;min-width:14rem}
thead th{border-bottom:2px solid var(--muted)}
code{font:.86em ui-monospace,monospace;overflow-wrap:anywhere}
code.whole{white-space:nowrap}
table.heat td{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums;border:1px solid var(--bg)}
table.heat td.none{color:var(--muted);text-align:center}
table.heat th[scope=row]{min-width:7rem}
.legend span{display:inline-block;padding:0 .5rem;font-size:.8rem}
figure{margin:.4rem 0}figcaption{font-weight:600}
svg{display:block;width:100%;height:auto;max-width:48rem;min-width:26rem}
.row svg{min-width:20rem}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:.5rem 1rem}
svg text{font:13px system-ui,sans-serif;fill:var(--muted)}svg text.name{fill:var(--fg)}svg text.small{font-size:12px}
.grid{stroke:var(--grid);stroke-width:1}rect.found{fill:var(--found)}
polyline{fill:none;stroke-linejoin:round}polyline.floor{stroke:var(--floor);stroke-width:2}
polyline.found{stroke:var(--found)}.line{stroke-width:2.2}.dashed{stroke-dasharray:6 4;stroke-width:1.6}
.diagonal{stroke:var(--muted);stroke-width:1}
.dot{fill:none;stroke-width:4.5;stroke-linecap:round;opacity:.55}
.sampled{stroke:var(--sampled)}.prompt{stroke:var(--prompt)}.prefix{stroke:var(--prefix)}
.dot.lonely{stroke:var(--lonely);opacity:1;stroke-width:7}.band.outer{fill:var(--outer)}.band.inner{fill:var(--inner)}
.key{display:inline-block;width:1.5em;height:0;border-top:3px solid;vertical-align:middle;margin:0 .3em 0 .9em}
.key.found{border-color:var(--found)}.key.floor{border-color:var(--floor)}.key.dash{border-top-style:dashed}
.key.round{width:.7em;height:.7em;border:0;border-radius:50%}
.key.sampled{background:var(--sampled)}.key.prompt{background:var(--prompt)}.key.prefix{background:var(--prefix)}
.key.lonely{background:var(--lonely)}
summary{cursor:pointer;font-weight:600;margin:.6rem 0}
@media print{body{max-width:none}details{display:block}}
"""


def page(data: Mapping[str, Any]) -> str:
    """The HTML file's text, from `vllm_compat.validation_report.build`'s data (before or after a way through JSON)."""
    found, reference = data["found"], data["reference"]
    title = f"{found['model']}: {who(found['made_by'])} against {who(reference['made_by'])}"
    word = '<span class="verdict ok">✓ HELD</span>' if data["held"] else '<span class="verdict bad">✗ FAILED</span>'
    count = f"{len(data['bands']) - len(data['failed'])} of {len(data['bands'])} bands of profile {data['profile']} held"
    parts = [
        f"<header><p>{word} {escape(count)}</p><h1>{escape(title)}</h1>",
        *(f'<p class="note">{escape(note)}</p>' for note in data["notes"]),
        "</header>",
        _verdicts(data["bands"]),
        _histogram(data),
        _scatter(data),
        _drift(data),
        _ratio(data["ratio"]),
        _heat(data),
        _worst(data["worst"]),
        _provenance(found, reference),
        _reported(found["made_by"].get("reported")),
        _metrics(data["metrics"]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>{chr(10).join(parts)}</body></html>\n"
    )


def who(made_by: Mapping[str, Any]) -> str:
    """A maker in a few words: V1 of vLLM 0.32.0, profile auto, float32."""
    if made_by["side"] == "trainer":
        name = f"transformers {made_by['transformers']}"
    else:
        name = f"{made_by['engine']} of vLLM {made_by['vllm']}"
        name += ", as it is" if made_by["profile"] == "off" else f", profile {made_by['profile']}"
    head = "" if made_by["lm_head"] == made_by["dtype"] else f" with a {made_by['lm_head']} lm_head"
    return f"{name}, {made_by['dtype']}{head}"


def limit(band: Mapping[str, Any]) -> tuple[str, str]:
    """Both ways a band's limit may come about, as factor × floor; the greater one counts."""
    floor, least = band["batch_floor"], band["resolution"]
    batch = f"{number(band['batch_factor'])} × {number(max(floor, least))}"
    if floor < least:
        batch += f" (resolution; floor {number(floor)})"
    rounding = band["rounding_floor"]
    return batch, "–" if rounding is None else f"{number(band['rounding_factor'])} × {number(rounding)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), css: str = "") -> str:
    """Cells are HTML already. ``numbers``: which columns are right-aligned."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _section(title: str, read: str, *content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="read">{read}</p>{"".join(content)}</section>'


def _picture(svg: str, caption: str = "") -> str:
    named = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{named}<div class="scroll">{svg}</div></figure>'


def _key(*entries: tuple[str, str]) -> str:
    return '<p class="muted">' + "".join(f'<span class="key {css}"></span>{escape(name)}' for css, name in entries) + "</p>"


_SIDES = _key(("found", "found"), ("floor", "floor: the reference at batch size 1 against itself in a batch"))


def _verdicts(bands: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for band in bands:
        word = '<b class="ok">held</b>' if band["held"] else '<b class="bad">FAILED</b>'
        name = f'<code class="whole" title="{escape(band["formula"])}">{escape(band["metric"])}</code>'
        rows.append([word, name, number(band["value"]), number(band["limit"]), *map(escape, limit(band))])
    read = (
        "A band holds where the measured value is at most the greater of factor × batch floor and factor × rounding floor. "
        "Formulas are at the end."
    )
    head = ["verdict", "metric", "measured", "limit", "factor × batch floor", "factor × rounding floor"]
    return _section("Bands", read, _table(head, rows, (2, 3, 4, 5)))


def _histogram(data: Mapping[str, Any]) -> str:
    names = ["mean", "p50", "p95", "p99", "max"]
    quantiles = data["quantiles"]
    rows = [[f"|Δ| {side}", *(number(quantiles[side].get(name)) for name in names)] for side in ("found", "floor")]
    rounding = {one["name"]: one["rounding_floor"] for one in data["metrics"]}
    if rounding["abs_dlogprob_mean"] is not None:
        rows.append(["|Δ| rounding floor", *(number(rounding[f"abs_dlogprob_{name}"]) for name in names)])
    read = (
        "Every compared token's Δ. Right of 0 the engine gives the token more probability than the reference. "
        "Both axes are logarithmic; the bar in the middle is no difference at all. Good: found lies where the floor does."
    )
    return _section(
        "Histogram of Δlogprob", read, _picture(pictures.histogram(data["histogram"])), _SIDES,
        _table(["nats", *names], rows, range(1, 6)),
    )  # fmt: skip


def _scatter(data: Mapping[str, Any]) -> str:
    rows, removed = data["rows"]["values"], data["removed"]
    shown = pictures.thinned(rows)
    words = f"{len(rows) - removed['both']} tokens that at least one side keeps"
    if len(shown) < len(rows):
        words += f" (drawn: {len(shown)} of {len(rows)} rows: those with the greatest |Δ|, and every n-th of the rest)"
    alone = removed["found"] + removed["reference"]
    words += (
        f"; {removed['both']} more are removed by both sides' filters. Removed by one side only: {alone}"
        f" ({removed['found']} by found, {removed['reference']} by the reference)" + (", on the edge." if alone else ".")
    )
    key = [(f"round {kind}", f"{kind} rows") for kind in KINDS] + ([("round lonely", "removed by one side")] if alone else [])
    return _section(
        "Logprobs, found over reference",
        f"On the diagonal both sides agree. {escape(words)}",
        '<div class="row">',
        _picture(pictures.scatter(shown, probability=False), "logprobs"),
        _picture(pictures.scatter(shown, probability=True), "the same as probabilities"),
        "</div>",
        _key(*key),
    )


def _drift(data: Mapping[str, Any]) -> str:
    read = (
        "Prefix rows: the prompt and the first 0, 1, 2, … tokens of a fixed continuation, so both sides stand on the same "
        "tokens. A line that rises with the position is an error that accumulates; a jump is a boundary of blocks or chunks. "
        "Prompt rows: the prompt's own tokens. Sampled rows: only while both sides sampled the same tokens."
    )
    drawn = [
        _picture(pictures.drift(data["positions"], kind), f"{kind} rows")
        for kind in ("prefix", "prompt", "sampled")
        if any(one["kind"] == kind and one["count"] for one in data["positions"])
    ]
    key = _key(
        ("found", "found, mean"), ("found dash", "found, 95th percentile"), ("floor", "floor, mean"),
        ("floor dash", "floor, 95th percentile"),
    )  # fmt: skip
    return _section("Drift by position", read, '<div class="row">', *drawn, "</div>", key)


def _ratio(ratio: Mapping[str, Any]) -> str:
    def share(value: Any) -> str:
        return "–" if value is None else f"{100 * value:.4g} %"

    rows = [[side, share(ratio[side]["inside_0.9_1.1"]), share(ratio[side]["inside_0.8_1.2"])] for side in ("found", "floor")]
    read = (
        "The importance ratio exp(−Δ) = p(reference) / p(found) of every token, sorted: what a trainer that computes the "
        "reference's logprobs multiplies the advantage by. Good: a flat line at 1. PPO with ε = 0.2 clips outside [0.8, 1.2]."
    )
    return _section(
        "Ratio band", read, _picture(pictures.ratios(ratio)), _SIDES,
        _table(["share of tokens", "inside [0.9, 1.1]", "inside [0.8, 1.2]"], rows, (1, 2)),
    )  # fmt: skip


def _heat(data: Mapping[str, Any]) -> str:
    read = (
        "|Δ| in nats over every token of every distribution, not only the reference's token. +N: that many tokens are kept by "
        "one side's filters only. ·: not recorded."
    )
    cells = data["settings"]
    left, unlisted = (sum(cell[name] for cell in cells) for name in ("diverged", "unlisted"))
    words = [f"{left} sampled steps are left out, since an earlier token already differs."] if left else []
    words += [f"{unlisted} tokens are in one side's list only and not compared."] if unlisted else []
    return _section("By sampling setting", read, pictures.heat_map(cells), *(f"<p>{word}</p>" for word in words))


def _worst(worst: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            escape(one["setting"]), one["kind"], str(one["prompt"]), str(one["position"]), number(one["found"]),
            number(one["reference"]), number(one["size"]),
        ]
        for one in worst[:12]
    ]  # fmt: skip
    head = ["setting", "kind", "prompt", "position", "found", "reference", "|Δ|"]
    read = "The greatest |Δ| of the reference's token, of each setting and kind, worst first (at most 12; report.json has all)."
    return _section("Worst rows", read, _table(head, rows, range(2, 7)))


def _provenance(found: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    def side(one: Mapping[str, Any]) -> dict[str, Any]:
        rest = {key: value for key, value in one.items() if key not in ("made_by", "settings", "prompts", "top_n", "vocab")}
        made = {key: value for key, value in one["made_by"].items() if key not in ("reported", "key")}
        listed = "all" if one["top_n"] is None else one["top_n"]
        asked = f"{one['settings']} settings × {one['prompts']} prompts; {listed} of {one['vocab']} tokens a distribution"
        return {**rest, "experiment": asked, **made}

    ours, theirs = side(found), side(reference)
    names = [*theirs, *(name for name in ours if name not in theirs)]
    rows = [
        [escape(name.replace("_", " ")), *(f"<code>{escape(str(one.get(name, '–')))}</code>" for one in (ours, theirs))]
        for name in names
    ]
    return _section("What was compared with what", "", _table(["", "found", "reference"], rows, css="wide"))


def _reported(reported: Mapping[str, Any] | None) -> str:
    title = "What the engine's processes reported"
    if reported is None:
        return _section(title, "Nothing: no vllm_compat was active in it.")
    rows = []
    for name, row in reported["behaviors"].items():
        seen = ""
        for role, rank, held, saw in row["seen"]:
            css, words = ("muted", saw) if held else ("bad", f"NOT: {saw}")
            seen += f'<br><span class="{css}">{escape(place(role, rank))}: {escape(words)}</span>'
        rows.append(
            [f"<code>{escape(name)}</code>", escape(row["state"]), escape(row["decided_by"]), escape(row["reason"]) + seen]
        )
    processes = ", ".join(place(role, rank) for role, rank in reported["processes"])
    word = "proven" if reported["proven"] else "NOT PROVEN"
    read = f"{word}, by RPC, in: {processes}." + "".join(f" {note}." for note in reported["notes"])
    return _section(title, escape(read), _table(["behavior", "state", "decided by", "why, and what each process saw"], rows))


def place(role: str, rank: Any) -> str:
    """A process by name."""
    return role.replace("_", " ") + ("" if rank is None else f" rank {rank}")


def _metrics(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for one in rows:
        values = [number(one[key]) for key in ("value", "batch_floor", "rounding_floor")]
        cells.append([f"<code>{escape(one['name'])}</code>", *values, escape(one["formula"])])
    head = ["metric", "found", "batch floor", "rounding floor", "formula"]
    read = "d = reference − found, a = found, b = reference, r = exp d: the reference stands where a trainer would."
    table = _table(head, cells, (1, 2, 3))
    return _section(
        "All metrics", read, f"<details><summary>{len(rows)} metrics with formulas and floors</summary>{table}</details>"
    )
