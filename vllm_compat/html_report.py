"""A validation as one HTML file that needs nothing else: the verdict, the pictures people look at first, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vllm_compat import pictures
from vllm_compat.html_page import frame, picture, section, table
from vllm_compat.pictures import number
from vllm_compat.recording import KINDS


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
    return frame(title, parts)


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
    return section("Bands", read, table(head, rows, (2, 3, 4, 5)))


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
    return section(
        "Histogram of Δlogprob", read, picture(pictures.histogram(data["histogram"])), _SIDES,
        table(["nats", *names], rows, range(1, 6)),
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
    return section(
        "Logprobs, found over reference",
        f"On the diagonal both sides agree. {escape(words)}",
        '<div class="row">',
        picture(pictures.scatter(shown, probability=False), "logprobs"),
        picture(pictures.scatter(shown, probability=True), "the same as probabilities"),
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
        picture(pictures.drift(data["positions"], kind), f"{kind} rows")
        for kind in ("prefix", "prompt", "sampled")
        if any(one["kind"] == kind and one["count"] for one in data["positions"])
    ]
    key = _key(
        ("found", "found, mean"), ("found dash", "found, 95th percentile"), ("floor", "floor, mean"),
        ("floor dash", "floor, 95th percentile"),
    )  # fmt: skip
    return section("Drift by position", read, '<div class="row">', *drawn, "</div>", key)


def _ratio(ratio: Mapping[str, Any]) -> str:
    def share(value: Any) -> str:
        return "–" if value is None else f"{100 * value:.4g} %"

    rows = [[side, share(ratio[side]["inside_0.9_1.1"]), share(ratio[side]["inside_0.8_1.2"])] for side in ("found", "floor")]
    read = (
        "The importance ratio exp(−Δ) = p(reference) / p(found) of every token, sorted: what a trainer that computes the "
        "reference's logprobs multiplies the advantage by. Good: a flat line at 1. PPO with ε = 0.2 clips outside [0.8, 1.2]."
    )
    return section(
        "Ratio band", read, picture(pictures.ratios(ratio)), _SIDES,
        table(["share of tokens", "inside [0.9, 1.1]", "inside [0.8, 1.2]"], rows, (1, 2)),
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
    return section("By sampling setting", read, pictures.heat_map(cells), *(f"<p>{word}</p>" for word in words))


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
    return section("Worst rows", read, table(head, rows, range(2, 7)))


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
    return section("What was compared with what", "", table(["", "found", "reference"], rows, css="wide"))


def _reported(reported: Mapping[str, Any] | None) -> str:
    title = "What the engine's processes reported"
    if reported is None:
        return section(title, "Nothing: no vllm_compat was active in it.")
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
    return section(title, escape(read), table(["behavior", "state", "decided by", "why, and what each process saw"], rows))


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
    all_of_them = table(head, cells, (1, 2, 3))
    return section(
        "All metrics", read, f"<details><summary>{len(rows)} metrics with formulas and floors</summary>{all_of_them}</details>"
    )
